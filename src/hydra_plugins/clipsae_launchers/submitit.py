"""`hydra/launcher=slurm` and `submitit_local`: jobs of their own, through submitit."""

import logging
import os
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher

try:
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher
except ImportError:  # the extra `slurm` is not installed: Hydra says that there is no such launcher
    BaseSubmititLauncher = Launcher

if TYPE_CHECKING:
    import submitit

    from clipsae.tasks.outcome import Outcome

log = logging.getLogger("clipsae.launcher")

LOOK_EVERY = 2.0  # seconds between two looks at the jobs
LARGEST_ARRAY = 1000  # SLURM's MaxArraySize where it does not tell


class _Awaited(BaseSubmititLauncher):
    """Submits all jobs, waits for every one of them, however it ends."""

    def __call__(self, *args: Any, **kwargs: Any) -> JobReturn:
        done = super().__call__(*args, **kwargs)
        _ = done.return_value  # raises what the job raised: SLURM is to see that it failed
        return done

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:

        from clipsae.tasks.outcome import cells, conclude

        jobs = []
        with _no_allocation():
            executor = self._executor()
            for start in range(0, len(job_overrides), self._at_once()):
                some = job_overrides[start : start + self._at_once()]
                first = initial_job_idx + start
                numbers = range(first, first + len(some))
                jobs += executor.map_array(
                    self,
                    [list(overrides) for overrides in some],
                    ["hydra.sweep.dir"] * len(some),
                    numbers,
                    [f"job_id_for_{n}" for n in numbers],
                    [Singleton.get_state()] * len(some),
                )
        log.info("submitted %d jobs, %s ...; logs in %s", len(jobs), jobs[0].job_id, self._logs())
        try:
            outcomes = self._wait(jobs, cells(job_overrides))
        except KeyboardInterrupt:
            log.warning(
                "stopped waiting; the jobs go on: %s ends them, task=status shows them", self._end
            )
            raise
        conclude(outcomes)
        return [job.results()[0] for job in jobs]

    _end = "scancel"

    def _executor(self) -> "submitit.Executor":
        import submitit

        common = set(BaseQueueConf.__dataclass_fields__)
        options = {
            name if name in common else f"{self._EXECUTOR}_{name}": value
            for name, value in self.params.items()
        }
        at_start = {
            name: options.pop(name)
            for name in (f"{self._EXECUTOR}_max_num_timeout",)
            if name in options
        }
        executor = submitit.AutoExecutor(
            cluster=self._EXECUTOR, folder=options.pop("submitit_folder"), **at_start
        )
        executor.update_parameters(**options)
        return executor

    def _logs(self) -> str:
        return str(self.params["submitit_folder"]).removesuffix("/%j")

    def _at_once(self) -> int:
        """Jobs in one array."""
        return LARGEST_ARRAY

    def _wait(self, jobs: list["submitit.Job"], names: list[str]) -> list["Outcome"]:
        """The outcome of each job, in their order; says when one is over."""
        found: dict[int, Outcome] = {}
        while len(found) < len(jobs):
            for i in sorted(set(range(len(jobs))) - set(found)):
                if jobs[i].done():
                    found[i] = _outcome(jobs[i], names[i])
                    log.info("%d of %d: %s", len(found), len(jobs), found[i])
            time.sleep(LOOK_EVERY)
        return [found[i] for i in range(len(jobs))]


class Slurm(_Awaited):
    """A SLURM job for each cell, in arrays as large as the cluster allows."""

    _EXECUTOR = "slurm"

    def _at_once(self) -> int:
        try:
            told = subprocess.run(
                ["scontrol", "show", "config"], capture_output=True, text=True, timeout=30
            ).stdout
        except (OSError, subprocess.TimeoutExpired):
            told = ""
        match = re.search(r"MaxArraySize\s*=\s*(\d+)", told)
        return max(1, int(match[1]) - 1) if match else LARGEST_ARRAY


class ManyCores(_Awaited):
    """All jobs at once on this machine, each a process of its own."""

    _EXECUTOR = "local"
    _end = "kill"


@contextmanager
def _no_allocation() -> Iterator[None]:
    """Inside an allocation its variables would decide what the jobs get."""
    import submitit

    keep = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    with submitit.helpers.clean_env():
        os.environ.update(keep)
        yield


def _outcome(job: "submitit.Job", cell: str) -> "Outcome":
    """How a job that is over has ended."""
    import submitit

    from clipsae.tasks.outcome import Outcome

    error = job.exception()
    if error is None:
        return Outcome(cell)
    if isinstance(error, submitit.core.utils.FailedJobError):
        trace = str(error).split("-" * 22)[1]
        return Outcome(cell, trace.strip().splitlines()[-1], str(job.paths.stdout))
    # Killed, out of memory, cancelled, the node failed: only the cluster knows.
    return Outcome(cell, f"ended without a result, {job.state}", str(job.paths.stderr))
