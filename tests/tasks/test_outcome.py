"""How a multirun ends, and the launchers' presets."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from clipsae.errors import ConfigError
from clipsae.tasks.outcome import Outcome, cells, conclude, outcome_of
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
