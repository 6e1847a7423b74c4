"""`task=status` on a store with a stage in every state."""

import json

import pytest
from made_up import MadeUp

from clipsae.errors import ConfigError
from clipsae.store.survey import survey
from clipsae.tasks.status import combine, detail, find_cell, swept
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


def status(root, *overrides):
    return run_py("task=status", f"paths.output_dir={root}", *overrides)


def test_every_state_is_seen(entries):
    found = {
        (e.about["model"] if e.kind == "sae" else e.about["dataset"]): (e.state, detail(e))
        for e in entries
    }
    states = {name: state for name, (state, _) in found.items()}
    assert states == {
        "topk": "done",
        "relu": "running",
        "gated": "running",
        "jumprelu": "stalled",
        "batch_topk": "stalled",
        "a": "done",
        "b": "failed",
        "c": "stalled",
        "d": "done",
        "e": "damaged",
    }
    assert found["relu"][1].startswith("step 300 of 600, process ")
    assert found["gated"][1] == "process 77, SLURM job 12_3"
    assert found["jumprelu"][1] == "checkpoint at step 30 of 600"
    assert found["c"][1] == "no checkpoint"
    assert found["b"][1] == "ZeroDivisionError: division by zero"
    assert found["e"][1] == "results.csv has 0 of 1 bytes"


def test_looking_changes_nothing(root):
    before = sorted(root.rglob("*"))
    survey(root)
    assert sorted(root.rglob("*")) == before


def test_a_cell_is_as_far_as_its_evaluation_or_else_its_sae(entries):
    def state(model, dataset, **more):
        return find_cell({"model": model, "dataset": dataset, **more}, entries, "evaluation").state

    assert state("topk", "a") == state("topk", "a", k=16, seed=0) == "done"
    assert state("topk", "a", k=8) == state("topk", "a", seed=1) == "missing"
    assert state("topk", "b") == "failed"
    assert state("topk", "e") == "missing"
    assert state("topk", "z") == "missing"
    assert state("relu", "a") == "running"
    assert state("jumprelu", "a") == "stalled"
    assert state("gated_by_nobody", "a") == "missing"


def test_what_a_sweep_runs_over():
    found = swept(["model=topk,relu", "seed=range(0,3)", "model.k=8,16", "dataset=a"])
    assert found == {"model": ["topk", "relu"], "seed": [0, 1, 2], "k": [8, 16], "dataset": ["a"]}
    assert len(combine(found)) == 12
    assert combine({}) == []
    assert swept(["clip=vit_b_16"]) == {"clip": ["ViT-B-16-quickgelu"]}
    assert swept(["trainer.max_steps=5"]) == {}
    with pytest.raises(ConfigError, match=r"trainer\.max_steps"):
        swept(["trainer.max_steps=5,6"])


@pytest.mark.slow
def test_json_alone_on_stdout_for_the_cells_of_a_sweep(root):
    done = status(root, "sweeps=demo", "task.json=true")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert len(told["cells"]) == 30
    assert told["counts"] == {"running": 10, "stalled": 10, "missing": 10}
    (relu,) = [c for c in told["cells"] if (c["model"], c["dataset"]) == ("relu", "scenes_shape")]
    assert relu["state"] == "running"
    assert relu["stage"].startswith("sae/relu-")
    assert {e["state"] for e in told["stages"]} == {
        "done", "running", "stalled", "failed", "damaged"
    }  # fmt: skip


@pytest.mark.slow
def test_the_table(root):
    done = status(root, "task.models=[topk,relu]", "task.datasets=[a,b,z]")
    assert done.returncode == 0, done.stderr
    assert "ZeroDivisionError: division by zero" in done.stdout
    assert "checkpoint at step 30 of 600" in done.stdout
    assert "3 running" in done.stdout
    assert "1 failed" in done.stdout
