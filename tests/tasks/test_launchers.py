"""How launchers order the jobs of a sweep: an SAE that several cells need comes first."""

from dataclasses import dataclass

import pytest

from clipsae.tasks.sweep import Job, Outcome

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")

from hydra_plugins.clipsae_launchers import submitit as launchers


@dataclass
class Handle:
    """Of a submitted job: submitit's."""

    job_id: str
    why: str | None = None
    over: bool = True
    cancelled: bool = False

    def done(self) -> bool:
        return self.over

    def cancel(self, check: bool) -> None:
        self.cancelled = True


@pytest.fixture
def jobs(monkeypatch):
    """Two trainings, two cells of the first and one of the second, and one of neither."""
    monkeypatch.setattr(launchers, "_outcome", lambda job, name: Outcome(name, job.why, "log"))
    first, second = (Job(f"training {n}", [], [], [], trains=True) for n in "ab")
    after = [first, first, second, None]
    cells = [Job(f"cell {i}", [i], [i], [[f"seed={i}"]], one) for i, one in enumerate(after)]
    return [first, second, *cells]


def test_slurm_starts_a_cell_when_its_training_is_done(jobs):
    launcher = launchers.Slurm(additional_parameters={"requeue": True})
    first, second, *cells = jobs
    assert [launcher._may_start(job) for job in jobs] == [True, True, False, False, False, True]
    first.handle, second.handle = Handle("12_0", over=False), Handle("12_1")
    assert all(launcher._may_start(job) for job in jobs)
    assert launcher._dependency(cells[1].after) == {
        "additional_parameters": {
            "requeue": True,
            "dependency": "afterok:12_0",
            "kill-on-invalid-dep": "yes",
        }
    }
    launchers._collect(jobs)
    assert launcher._dependency(cells[2].after) == {}  # done already
    assert launcher._dependency(None) == {}


def test_many_cores_starts_as_many_jobs_as_there_is_room_for(jobs):
    launcher = launchers.ManyCores(parallel=2)
    first, second, *cells = jobs
    first.handle = Handle("1")
    assert launcher._places(jobs) == 1
    second.handle = Handle("2", over=False)
    assert launcher._places(jobs) == 0
    assert launchers._collect(jobs)
    assert launcher._places(jobs) == 1
    assert [launcher._may_start(job) for job in cells] == [True, True, False, True]


def test_a_failed_training_fails_the_cells_that_wait_for_it_and_no_other(jobs):
    first, second, *cells = jobs
    first.handle, second.handle = Handle("1", why="NaN"), Handle("2")
    cells[0].handle = Handle("3", over=False)
    cells[3].handle = Handle("4", why="no such image")
    assert launchers._collect(jobs)
    assert [job.outcome and job.outcome.why for job in cells] == [
        "the training of its SAE failed: NaN",
        "the training of its SAE failed: NaN",
        None,
        "no such image",
    ]
    assert cells[0].handle.cancelled
    assert cells[0].outcome.log == "log"
    assert cells[2].is_open
    assert not launchers._collect(jobs)
