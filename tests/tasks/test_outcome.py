"""How a multirun ends, and the launchers' presets."""

import warnings

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from clipsae.errors import ConfigError
from clipsae.store import Store
from clipsae.tasks import warn_in_one_line
from clipsae.tasks.outcome import Outcome, Sweep, cells, conclude, outcome_of
from clipsae.tasks.sweep import Cell
from clipsae.tasks.table import accuracy_table
from run import ROOT


def returned(error: Exception | None) -> JobReturn:
    done = JobReturn()
    done.status = JobStatus.FAILED if error else JobStatus.COMPLETED
    done.return_value = error
    runtime = {"runtime": {"output_dir": "/out"}, "job": {"name": "run"}}
    done.hydra_cfg = OmegaConf.create({"hydra": runtime})
    return done


def test_a_job_is_called_by_what_sets_it_apart():
    jobs = [["seed=1", f"model={model}", "hydra.sweep.dir=x"] for model in ("relu", "topk")]
    assert cells(jobs) == ["model=relu", "model=topk"]
    assert cells(jobs[:1]) == ["seed=1 model=relu"]


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
    assert outcome_of(returned(error), "model=topk").why == why


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


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A sweep whose cells need SAEs by these names; "?" is not known yet, "there" is finished."""

    def of(*saes: str) -> Sweep:
        def found(*_):
            return [
                Cell({}, why="k=auto") if sae == "?" else Cell({}, (stages[sae],)) for sae in saes
            ]

        stages = {name: Store(tmp_path).stage("sae", [name], {}) for name in {*saes, "later"}}
        if "there" in stages:
            stages["there"].make(lambda folder: None)
        monkeypatch.setattr("clipsae.tasks.sweep.cells_of", found)
        sweep = Sweep.__new__(Sweep)
        sweep.names = [f"cell {i}" for i in range(len(saes))]
        sweep.configs = []
        sweep._overrides = [[f"model={sae}", f"seed={i}"] for i, sae in enumerate(saes)]
        sweep._cells = found()
        return sweep

    return of


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


def test_cells_whose_sae_is_not_known_are_planned_again(sweep, monkeypatch):
    planned = sweep("a", "?", "?")
    jobs, unknown = planned.plan([[0], [1], [2]])
    assert [job.cells for job in jobs] == [[0]]
    still, none = planned.plan(unknown, again=True)
    assert [(job.cells, job.after, none) for job in still] == [([1], None, []), ([2], None, [])]
    sweep("a", "b", "b")  # now they are
    jobs, none = planned.plan(unknown, again=True)
    assert [job.cells for job in jobs] == [[1, 2], [1], [2]]
    assert jobs[1].after is jobs[2].after is jobs[0]


def test_cells_that_train_together_share_a_job(sweep):
    jobs, _ = sweep("a", "a", "b").plan([[0, 1], [2]])
    assert [(job.cells, job.after) for job in jobs] == [([0, 1], None), ([2], None)]
    assert jobs[0].overrides == [["model=a", "seed=0"], ["model=a", "seed=1"]]


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


def test_slurm_where_there_is_none_is_one_sentence(monkeypatch):
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


def test_what_sbatch_refuses_is_one_sentence(monkeypatch):
    utils = pytest.importorskip("submitit.core.utils")
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    from hydra_plugins.clipsae_launchers.submitit import Slurm

    def refuse(*_):
        raise utils.FailedJobError("sbatch: error: invalid partition specified: gpuu\n\nsbatch: no")

    monkeypatch.setattr(Slurm.__mro__[1], "_submit", refuse)
    with pytest.raises(SystemExit) as end:
        Slurm.__new__(Slurm)._submit([], 0)
    said = str(end.value)
    assert "sbatch refuses the jobs: sbatch: error: invalid partition specified: gpuu" in said
    assert "\n" not in said


def test_a_warning_is_one_line_without_the_source_it_comes_from(monkeypatch, caplog):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back afterwards
    warn_in_one_line()
    warnings.showwarning(UserWarning("few\n  workers"), UserWarning, "/a/loader.py", 3)
    (record,) = caplog.records
    assert record.getMessage() == "few workers (UserWarning, loader.py:3)"


@pytest.mark.parametrize(
    ("row", "title"),
    [
        (
            {"k": 8, "seed": 1, "classes": 5},
            "topk k=8 seed=1 on a: macro accuracy, % (9 images, 5 ",
        ),
        (
            {"k": None, "seed": 0, "classes": 5, "competing": 1000},
            "topk seed=0 on a: macro accuracy, % (9 images, 5 of 1,000 classes, paper",
        ),
        (
            {"k": None, "seed": 0, "classes": 5, "competing": 5},
            "topk seed=0 on a: macro accuracy, % (9 images, 5 classes, paper",
        ),
    ],
)
def test_a_tables_title_tells_the_cells_of_a_sweep_apart(row, title):
    of = {"model": "topk", "dataset": "a", "latents": 64, "images": 9, "protocol": "paper"}
    rows = pd.DataFrame([{**of, "setting": "on", "n": 1, "accuracy": 1.0, **row}])
    assert str(accuracy_table(rows).title).startswith(title)


def test_clip_without_an_sae_has_a_column_of_its_own():
    of = {"model": "topk", "dataset": "a", "latents": 64, "images": 9, "protocol": "paper"}
    found = (("no_sae", None, 99.0), ("on", 5, 40.0), ("on", 64, 90.0))
    rows = pd.DataFrame(
        [{**of, "classes": 5, "setting": s, "n": n, "accuracy": a} for s, n, a in found]
    )
    table = accuracy_table(rows)
    assert [column.header for column in table.columns][2:] == ["no SAE", "n = 5", "all 64"]
    assert [list(column.cells) for column in table.columns][2:] == [
        ["99.00", ""],
        ["", "40.00"],
        ["", "90.00"],
    ]
