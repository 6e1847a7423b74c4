"""`task=status` on a store with a stage in every state."""

import io
import json

import pytest
from made_up import MadeUp
from rich.console import Console

from clipsae.store import Store
from clipsae.store.survey import survey
from clipsae.tasks.status import cell_table, detail, differences, stage_table, states_of
from clipsae.tasks.sweep import Cell
from tests.warm import run_py


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    made_up = MadeUp(folder)
    yield folder
    made_up.living.discard()


@pytest.fixture
def entries(root):
    return survey(root)


def printed(table, width=80):
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue().rstrip().splitlines()


def test_every_state_is_seen_and_looking_changes_nothing(root):
    before = sorted(root.rglob("*"))
    found = {
        (e.about["model"] if e.kind == "sae" else e.about["dataset"]): (e.state, detail(e))
        for e in survey(root)
    }
    assert sorted(root.rglob("*")) == before
    assert found.pop("relu")[1].startswith("step 300 of 600, process ")
    when = found.pop("topk"), found.pop("a"), found.pop("d")
    assert when == (("done", ""), ("done", ""), ("done", ""))
    assert found == {
        "gated": ("running", "process 77, SLURM job 12_3"),
        "jumprelu": ("stalled", "checkpoint at step 30 of 600"),
        "batch_topk": ("stalled", "no checkpoint"),
        "b": ("failed", "ZeroDivisionError: division by zero"),
        "c": ("stalled", "no checkpoint"),
        "e": ("damaged", "results.csv has 0 of 1 bytes"),
    }


def test_a_cell_is_as_far_as_the_very_stages_that_it_would_make(root, entries):
    made_up = MadeUp.stages(root)

    def state(*stages):
        ((_, state, entry),) = states_of([Cell({}, stages)], entries)
        return state, entry and entry.kind

    topk, relu, jumprelu = (made_up.sae(name, k) for name, k in MadeUp.SAES)
    assert state(topk, made_up.evaluation("a")) == ("done", "evaluation")
    assert state(topk, made_up.evaluation("b")) == ("failed", "evaluation")
    assert state(topk, made_up.evaluation("c")) == ("stalled", "evaluation")
    assert state(topk, made_up.evaluation("e")) == ("missing", "sae")  # damaged: recomputed
    assert state(topk, made_up.evaluation("z")) == ("missing", "sae")
    assert state(topk, made_up.evaluation("a", sae="another")) == ("missing", "sae")
    assert state(relu, made_up.evaluation("a", sae=relu.path.name)) == ("running", "sae")
    assert state(jumprelu, made_up.evaluation("z")) == ("stalled", "sae")
    assert state(made_up.sae("nobody")) == ("missing", None)
    assert state() == ("missing", None)  # it cannot be told


def test_the_store_in_80_columns_has_a_line_a_folder(entries):
    done = [e for e in entries if e.kind == "sae" and e.state == "done"]
    title, _, head, _, *rows = printed(stage_table(done * 2))
    assert title.split(", ")[:3] == ["sae: 2", "model topk", "dataset scenes"]  # said once
    assert head.split() == ["state", "when"]
    assert len(rows) == 2


def test_runs_that_their_columns_do_not_tell_apart_show_what_differs(tmp_path):
    store = Store(tmp_path)
    for steps in (3, 600):
        key = {"training": {"trainer": {"max_steps": steps, "precision": "32"}}}
        stage = store.stage("sae", ["topk"], key, {"model": "topk", "k": 8})
        stage.make(lambda folder: None)
        about = {"model": "topk", "dataset": "scenes"}
        store.stage("evaluation", ["a"], {"sae": stage.path.name}, about).make(lambda folder: None)
    store.stage("sae", ["topk"], {"other": 1}, {"model": "topk", "k": 4}).make(lambda folder: None)
    entries = survey(tmp_path)
    saes = [e for e in entries if e.kind == "sae"]
    found = differences(saes)
    differ = sorted(found[e.name]["differs in"] for e in saes if e.about["k"] == 8)
    assert differ == ["max_steps=3", "max_steps=600"]
    assert [e.about["k"] for e in saes if e.name not in found] == [4]
    # An evaluation by the SAE, which the other table shows by the same end of its name.
    of_saes = {row["name"] for row in found.values()}
    evaluations = differences([e for e in entries if e.kind == "evaluation"])
    assert {row["differs in"].removeprefix("sae=") for row in evaluations.values()} == of_saes


def test_cells_that_are_missing_share_lines():
    missing = [
        (Cell({"model": model, "dataset": dataset}), "missing", None)
        for model in ("relu", "topk")
        for dataset in ("dtd", "eurosat", "food101")
    ]
    (line,) = [line.strip() for line in printed(cell_table(missing)) if "topk" in line]
    assert line.startswith("relu, topk  dtd, eurosat, food101")
    said = "\n".join(printed(cell_table([missing[0], missing[1], missing[3]])))
    assert "relu   dtd, eurosat  missing" in said
    assert "topk   dtd           missing" in said


SMALL = [
    "features.batch_size=4",
    "trainer.val_check_interval=1",
    "trainer.limit_val_batches=1",
    "dataset.size=24",
    "evaluation.ns=[1,5]",
    "measurement=none",
    "logger=none",
    "callbacks.progress_bar=false",
]


@pytest.mark.slow
def test_a_sweep_is_looked_up_by_everything_that_decides_its_results(tmp_path):
    given = [*SMALL, f"paths.output_dir={tmp_path}", "model=topk", "model.latents=64"]
    done = run_py("-m", *given, "model.k=2", "trainer.max_steps=1", "clip.name=clipsae-tiny,RN50")
    # One of the two cells fails: no SAE reads the tokens of a ResNet.
    assert done.returncode == 1
    assert (
        "2 cells, 0 of them finished; 2 SAEs, 2 to train; how long it takes is not" in done.stdout
    )
    assert "1 of 2 cells are finished: macro accuracy, %, on_5" in done.stdout
    assert "1 of 2 jobs failed" in done.stdout

    before = sorted(tmp_path.glob("sweeps/*/*"))
    cells = ["model.k=2", "seed=0,5", "trainer.max_steps=1,2"]
    looked = run_py("-m", *given, *cells, "task=status", "task.json=true")
    assert looked.returncode == 0, looked.stderr
    told = json.loads(looked.stdout)
    assert len(told["cells"]) == 4
    assert told["counts"] == {"done": 1, "missing": 3}
    (found,) = [cell for cell in told["cells"] if cell["state"] == "done"]
    assert (found["seed"], found["max_steps"]) == ("0", "1")
    assert sorted(tmp_path.glob("sweeps/*/*")) == before  # the sweep's own record is as it was

    # Of a sweep's parameters those of the command line count, as for the sweep itself.
    looked = run_py(*given[:-2], "sweeps=demo", "model=relu", "task=status")
    assert looked.returncode == 0, looked.stderr
    assert "cells of the sweep: 5" in looked.stdout
    assert looked.stdout.strip().endswith("5 missing")


@pytest.mark.slow
def test_the_store_without_a_sweep(root):
    done = run_py("task=status", f"paths.output_dir={root}")
    assert done.returncode == 0, done.stderr
    assert "ZeroDivisionError: division by zero" in done.stdout
    assert "checkpoint at step 30 of 600" in done.stdout
    told = json.loads(run_py("task=status", f"paths.output_dir={root}", "task.json=true").stdout)
    assert told["cells"] == []
    states = {e["state"] for e in told["stages"]}
    assert states == {"done", "running", "stalled", "failed", "damaged"}
