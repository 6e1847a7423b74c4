"""What a multirun says before it begins and when it has ended, the order of its jobs, and the
launchers' presets."""

import io
import warnings
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf
from rich.console import Console

from clipsae.errors import ConfigError
from clipsae.store import Store
from clipsae.store.files import seal
from clipsae.tasks import warn_in_one_line
from clipsae.tasks.sweep import (
    Cell,
    Outcome,
    Sweep,
    abouts,
    conclude,
    duration,
    forecast,
    job_names,
    outcome_of,
    summary,
)
from clipsae.tasks.table import accuracy_table
from run import ROOT


class Work:
    """A store with finished stages of known times."""

    def __init__(self, root):
        self.store = Store(root)

    def sae(self, model, steps, seconds=None, seed=0, batch=32):
        training = {"trainer": {"max_steps": steps}, "features": {"batch_size": batch}}
        key = {"model": model, "seed": seed, "training": training}
        return self.made("sae", {"model": model}, key, seconds)

    def evaluation(self, trained, dataset, seconds=None, accuracy=None):
        about = {"model": trained.about["model"], "dataset": dataset}
        key = {"sae": trained.path.name, "dataset": dataset}
        return self.made("evaluation", about, key, seconds, accuracy)

    def made(self, kind, about, key, seconds, accuracy=None):
        about = {**about, "clip": "tiny", "latents": 64}
        stage = self.store.stage(kind, list(map(str, about.values())), key, about)

        def build(folder):
            rows = [("no_sae", None, 99.0), ("on", 1, 1.0), ("on", 10, accuracy), ("on", 64, 98)]
            frame = pd.DataFrame(rows, columns=["setting", "n", "accuracy"])
            if accuracy is not None:
                frame.to_csv(folder / "results.csv", index=False)

        def sealed(folder, meta):
            seal(folder, meta | {"seconds": seconds})

        if seconds is not None:
            with patch("clipsae.store.files.seal", sealed):
                stage.make(build)
        return stage


@pytest.fixture
def work(tmp_path):
    return Work(tmp_path)


def test_how_much_is_there_and_how_long_the_rest_takes(work):
    trained = work.sae("relu", 600, seconds=60.0)
    done = work.evaluation(trained, "a", seconds=7.0)
    cells = [Cell({"dataset": "a"}, (trained, done))]
    assert forecast(cells) == "1 cell, 1 of them finished; 1 SAE, 0 to train"
    # Nothing has been evaluated on b: no time is made up.
    cells.append(Cell({"dataset": "b"}, (trained, work.evaluation(trained, "b"))))
    said = "2 cells, 1 of them finished; 1 SAE, 0 to train; how long it takes is not"
    assert forecast(cells).startswith(said)
    # Half the images a step, by an SAE that three cells need.
    smaller = work.sae("relu", 600, batch=16)
    said = forecast([Cell({"dataset": d}, (smaller,)) for d in "abc"])
    assert said.startswith("3 cells, 0 of them finished; 1 SAE, 1 to train; about 30 s, one after")
    # 3,000 steps at a tenth of a second, then 7 s.
    longer = work.sae("relu", 3000, seed=1)
    said = forecast([Cell({}, (longer, work.evaluation(longer, "a")))])
    assert "1 SAE, 1 to train; about 5 min, one after the other" in said


def test_a_models_own_times_count_before_others(work):
    work.sae("relu", 100, seconds=10.0)
    work.sae("topk", 100, seconds=80.0)
    assert "about 10 s" in forecast([Cell({}, (work.sae("relu", 100, seed=1),))])
    assert "about 45 s" in forecast([Cell({}, (work.sae("gated", 100, seed=1),))])
    # An untrained SAE says nothing about a training, of the same model either.
    work.sae("relu", 0, seconds=1.0)
    assert "about 10 s" in forecast([Cell({}, (work.sae("relu", 100, seed=1),))])
    assert "about 1 s" in forecast([Cell({}, (work.sae("topk", 0),))])


def test_the_summary_is_by_model_and_dataset(work):
    trained = work.sae("topk", 600, seconds=60.0)
    cells = [
        Cell(
            {"model": "topk", "dataset": dataset, "k": "8"},
            (trained, work.evaluation(trained, dataset, seconds=30.0, accuracy=accuracy)),
        )
        for dataset, accuracy in (("a", 12.5), ("b", 50.0))
    ]
    cells.append(Cell({"model": "topk", "dataset": "a", "k": "0"}, (), "k=0: expected more"))
    title, table = summary(cells, {2})
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    said = console.file.getvalue()
    assert title == "2 of 3 cells are finished: macro accuracy, %, on_10"
    (row,) = [line.split() for line in said.splitlines() if "k=8" in line]
    # The SAE's minute counts once.
    assert " ".join(word for word in row if word not in "│┃") == "topk k=8 12.50 50.00 2 min"
    (row,) = [line for line in said.splitlines() if "k=0" in line]
    assert "failed" in row


def test_a_job_is_known_by_what_sets_it_apart():
    jobs = [
        ["logger=none", f"model={m}", f"model.k={k}", "dataset=a", "hydra.sweep.dir=x"]
        for m in "xy"
        for k in (1, 2)
    ]
    assert abouts(jobs)[1] == {"model": "x", "k": "2", "dataset": "a"}
    assert job_names(jobs)[1] == "model=x model.k=2"
    assert job_names(jobs[:1]) == ["logger=none model=x model.k=1 dataset=a"]
    jobs = [["model=x", f"seed={s}", f"+measurement.seed={s}"] for s in (0, 1)]
    assert abouts(jobs)[1] == {"model": "x", "seed": "1", "measurement.seed": "1"}


def test_durations_have_one_unit():
    said = [duration(s) for s in (0.4, 89, 100, 5000, 7200)]
    assert said == ["0 s", "89 s", "2 min", "83 min", "2.0 h"]


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (None, None),
        (ConfigError("k=0: expected more"), "k=0: expected more"),
        (RuntimeError("first\nlast"), "RuntimeError: last"),
        (RuntimeError(), "RuntimeError: "),
    ],
)
def test_why_a_job_failed(error, why):
    done = JobReturn()
    done.status = JobStatus.FAILED if error else JobStatus.COMPLETED
    done.return_value = error
    runtime = {"runtime": {"output_dir": "/out"}, "job": {"name": "run"}}
    done.hydra_cfg = OmegaConf.create({"hydra": runtime})
    assert outcome_of(done, "model=topk").why == why


def test_the_table_names_what_failed_and_the_status_is_1(capsys):
    conclude([Outcome("model=relu")])
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit) as end:
        conclude([Outcome("model=relu"), Outcome("model=topk", "k=[0]: no", "/x/run.log")])
    assert end.value.code == 1
    said = capsys.readouterr().out
    assert "1 of 2 jobs failed" in said
    assert "k=[0]: no" in said
    assert "model=relu" not in said


# --- the order of jobs ---


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A sweep whose cells need SAEs by these names; "?" is not known yet, "there" is finished."""

    def make(*saes: str) -> Sweep:
        places = {sae: Path(sae) for sae in {*saes, "later"}}  # in a store, or in another
        stages = {
            s: Store(tmp_path / p.parent).stage("sae", [p.name], {}) for s, p in places.items()
        }
        if "there" in stages:
            stages["there"].make(lambda folder: None)
        cells = [Cell({}, why="k=auto") if s == "?" else Cell({}, (stages[s],)) for s in saes]
        monkeypatch.setattr("clipsae.tasks.sweep.cells_of", lambda *_: cells)
        sweep = Sweep.__new__(Sweep)
        sweep.names = [f"cell {i}" for i in range(len(saes))]
        sweep.configs = []
        sweep._overrides = [[f"model={sae}", f"seed={i}"] for i, sae in enumerate(saes)]
        sweep._look()
        return sweep

    return make


def test_an_sae_that_several_cells_need_is_trained_first_by_a_job_of_its_own(sweep):
    jobs, unknown = sweep("a", "b", "a", "there", "there").plan([[i] for i in range(5)])
    training, *rest = jobs
    assert training.trains
    assert training.cells == [0, 2]
    assert training.overrides == [
        ["model=a", "seed=0", "evaluation.settings=[]", "measurement.metrics=[]"]
    ]
    assert [job.after for job in rest] == [training, None, training, None, None]
    assert [job.cells for job in rest] == [[i] for i in range(5)]
    assert len({n for job in jobs for n in job.numbers}) == 6
    assert unknown == []


def test_cells_whose_sae_is_not_known_are_planned_again(sweep):
    planned = sweep("a", "?", "?")
    jobs, unknown = planned.plan([[0], [1], [2]])
    assert [job.cells for job in jobs] == [[0]]
    still, none = planned.plan(unknown, again=True)
    assert [(job.cells, job.after, none) for job in still] == [([1], None, []), ([2], None, [])]
    sweep("a", "b", "b")  # now they are
    jobs, none = planned.plan(unknown, again=True)
    assert [job.cells for job in jobs] == [[1, 2], [1], [2]]
    assert jobs[1].after is jobs[2].after is jobs[0]


def test_a_group_whose_saes_are_not_known_waits_as_a_cell_does(sweep):
    planned = sweep("a", "b", "?", "?")
    jobs, unknown = planned.plan([[0, 1], [2, 3]])
    assert ([job.cells for job in jobs], unknown) == ([[0, 1]], [[2, 3]])
    still, none = planned.plan(unknown, again=True)
    assert ([job.cells for job in still], none) == ([[2, 3]], [])


def test_saes_of_one_name_in_two_stores_are_two(sweep):
    jobs, _ = sweep("a", "elsewhere/a").plan([[0], [1]])
    assert [(job.cells, job.after) for job in jobs] == [([0], None), ([1], None)]


def test_cells_that_train_together_share_a_job(sweep):
    jobs, _ = sweep("a", "a", "b").plan([[0, 1], [2]])
    assert [(job.cells, job.after) for job in jobs] == [([0, 1], None), ([2], None)]
    assert jobs[0].overrides == [["model=a", "seed=0"], ["model=a", "seed=1"]]


# --- launchers ---


@pytest.mark.parametrize("name", ["local", "many_cores", "slurm", "slurm_preempt"])
def test_every_launcher_composes(name):
    if name.startswith("slurm"):
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    overrides = [f"hydra/launcher={name}", "trainer=ddp", "trainer.devices=4", "resources.gpus=4"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides, return_hydra_config=True)
    launcher = cfg.hydra.launcher
    assert launcher._target_.startswith("hydra_plugins.clipsae_launchers.")
    if name.startswith("slurm"):
        assert (launcher.tasks_per_node, launcher.gpus_per_node) == (4, 4)
        assert launcher.additional_parameters.requeue
        assert launcher.max_num_timeout > 0


def test_slurm_where_there_is_none_and_what_sbatch_refuses_are_one_sentence(monkeypatch):
    utils = pytest.importorskip("submitit.core.utils")
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    from hydra_plugins.clipsae_launchers.submitit import ManyCores, Slurm

    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit) as end:
        Slurm.__new__(Slurm)._require()
    said = str(end.value)
    assert said.startswith("hydra/launcher=slurm: this machine has no sbatch and no srun: ")
    assert "hydra/launcher=many_cores" in said
    assert "\n" not in said
    ManyCores.__new__(ManyCores)._require()

    def refuse(*_):
        raise utils.FailedJobError("sbatch: error: invalid partition specified: gpuu\n\nsbatch: no")

    monkeypatch.setattr(Slurm.__mro__[1], "_submit", refuse)
    with pytest.raises(SystemExit) as end:
        Slurm.__new__(Slurm)._submit([], 0)
    said = str(end.value)
    assert "sbatch refuses the jobs: sbatch: error: invalid partition specified: gpuu" in said
    assert "\n" not in said


# --- what is printed ---


def test_a_warning_is_one_line_without_the_source_it_comes_from(monkeypatch, caplog):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back afterwards
    warn_in_one_line()
    warnings.showwarning(UserWarning("few\n  workers"), UserWarning, "/a/loader.py", 3)
    (record,) = caplog.records
    assert record.getMessage() == "few workers (UserWarning, loader.py:3)"


@pytest.mark.parametrize(
    ("row", "title"),
    [
        ({"k": 8, "seed": 1}, "topk k=8 seed=1 on a: macro accuracy, % (9 images, 5 "),
        ({"k": None, "competing": 1000}, "topk seed=0 on a: macro accuracy, % (9 images, 5 of 1,0"),
        ({"k": None, "competing": 5}, "topk seed=0 on a: macro accuracy, % (9 images, 5 classes, "),
    ],
)
def test_the_accuracies_of_one_evaluation(row, title):
    """CLIP without an SAE has a column of its own; the title tells the cells of a sweep apart."""
    same = {"model": "topk", "dataset": "a", "latents": 64, "images": 9, "protocol": "paper"}
    same |= {"seed": 0, "classes": 5} | row
    found = (("no_sae", None, 99.0), ("on", 5, 40.0), ("on", 64, 90.0))
    rows = pd.DataFrame([{**same, "setting": s, "n": n, "accuracy": a} for s, n, a in found])
    table = accuracy_table(rows)
    assert str(table.title).startswith(title)
    assert [(column.header, list(column.cells)) for column in table.columns[2:]] == [
        ("no SAE", ["99.00", ""]),
        ("n = 5", ["", "40.00"]),
        ("all 64", ["", "90.00"]),
    ]
