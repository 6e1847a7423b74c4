"""`hydra/launcher=slurm` and `many_cores`: jobs of their own, through submitit."""

import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf

from hydra_plugins.clipsae_launchers.local import groups_of, looked_at

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
# Until submitit listens to them, seconds after the start, these would end a job that is only asked
# to leave, and it would count as failed.
DEAF = """sh -c 'trap "" TERM USR2; exec "$@"' sh """


class _Awaited(BaseSubmititLauncher):
    """Submits all jobs, waits for every one of them, however it ends.

    Pickled with each job, and again in the job when it is preempted: by then Hydra has loaded this
    module anew, so that the class is pickled, too. It must hold nothing that cannot be (a
    `cached_property` has a lock).
    """

    leaving = False  # asked to, and queued again

    def __call__(
        self, overrides: list[list[str]], numbers: list[int], *rest: Any
    ) -> list[JobReturn]:
        """In the job: one cell, or with `together=true` those that train on the same tokens.

        Raises:
            Exception: what the cell raised: SLURM is to see that it failed.
            ConfigError: which of several failed, and why.
        """
        import submitit

        try:
            return self._run(overrides, numbers, *rest)
        except Exception as error:
            if not self.leaving or isinstance(error, submitit.core.utils.UncompletedJobError):
                raise
            # Stopped anywhere, libraries tidy up as well as they can: that is no result.
            raise SystemExit(1) from error

    def _run(self, overrides: list[list[str]], numbers: list[int], *rest: Any) -> list[JobReturn]:
        run = super().__call__
        if len(overrides) == 1:
            done = run(overrides[0], "hydra.sweep.dir", numbers[0], *rest)
            _ = done.return_value  # raises
            return [done]
        from clipsae.errors import ConfigError
        from clipsae.tasks.outcome import cells, outcome_of
        from clipsae.tasks.together import Turns

        several = Turns().run(
            [
                partial(run, some, "hydra.sweep.dir", number, *rest)
                for some, number in zip(overrides, numbers, strict=True)
            ]
        )
        ends = [outcome_of(*job) for job in zip(several, cells(overrides), strict=True)]
        if failed := [str(end) for end in ends if end.why is not None]:
            raise ConfigError("; ".join(failed))
        return several

    def checkpoint(self, *args: Any, **kwargs: Any) -> "submitit.core.utils.DelayedSubmission":
        """What the job does when it starts again; called when it is asked to leave."""
        import submitit

        from clipsae.training.logging import close_preempted

        self.leaving = True
        # Asked again before it has left, it would end with an error; and so it would had it been
        # killed here an earlier time, which leaves half a file.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        pickled = submitit.JobEnvironment().paths.submitted_pickle
        pickled.with_name(f"{pickled.name}.save_tmp").unlink(missing_ok=True)
        close_preempted()
        # As it was submitted: this object may be in the midst of anything.
        return submitit.core.utils.DelayedSubmission.load(pickled)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from clipsae.tasks.outcome import Sweep

        if looked_at(self, job_overrides):
            return []
        self._require()
        sweep = Sweep(self, job_overrides)
        groups = groups_of(self, job_overrides)
        contents = [[list(job_overrides[i]) for i in group] for group in groups]
        every = sweep.names
        names = [", ".join(every[i] for i in group) for group in groups]
        jobs: dict[int, submitit.Job] = self._submitted(contents)
        waiting = [i for i in range(len(names)) if i not in jobs]
        outcomes: dict[int, Outcome] = {}
        with _no_allocation():
            executor = self._executor()
            largest = self._array()
        log.info("logs in %s", str(self.params["submitit_folder"]).removesuffix("/%j"))
        try:
            while len(outcomes) < len(names):
                some = waiting[: min(largest, self._places - len(jobs) + len(outcomes))]
                if some:
                    del waiting[: len(some)]
                    numbers = [[initial_job_idx + i for i in groups[g]] for g in some]
                    submitted = self._submit(executor, [contents[g] for g in some], numbers)
                    jobs |= zip(some, submitted, strict=True)
                    continue
                for i in sorted(jobs.keys() - outcomes.keys()):
                    if jobs[i].done():
                        outcomes[i] = _outcome(jobs[i], names[i])
                        log.info("%d of %d: %s", len(outcomes), len(names), outcomes[i])
                time.sleep(LOOK_EVERY)
        except KeyboardInterrupt:
            log.warning(
                "stopped waiting; the jobs go on: %s ends them, task=status shows them", self._end
            )
            raise
        sweep.conclude([outcomes[i] for i in range(len(names))], groups)
        returns = {}
        for i, group in enumerate(groups):
            returns |= zip(group, jobs[i].results()[0], strict=True)
        return [returns[i] for i in range(len(every))]

    def _submit(
        self, executor: "submitit.Executor", groups: list[list[list[str]]], numbers: list[list[int]]
    ) -> list["submitit.Job"]:
        """Submit a job for each group of cells, as one array.

        Args:
            groups: the overrides of each cell of each group.
            numbers: of the cells.
        """
        with _no_allocation():
            jobs = executor.map_array(
                self,
                groups,
                numbers,
                [f"job_id_for_{some[0]}" for some in numbers],
                [Singleton.get_state()] * len(groups),
            )
        log.info("submitted %d jobs, %s ...", len(jobs), jobs[0].job_id)
        return jobs

    def _submitted(self, groups: list[list[list[str]]]) -> dict[int, "submitit.Job"]:
        """The jobs that are there already, by the number of their group."""
        return {}

    def _require(self) -> None:
        """Refuse to begin where the jobs cannot be submitted.

        Raises:
            SystemExit: with the reason.
        """

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
        if self._EXECUTOR == "slurm":
            at_start["slurm_python"] = DEAF + shlex.quote(sys.executable)
        executor = submitit.AutoExecutor(
            cluster=self._EXECUTOR, folder=options.pop("submitit_folder"), **at_start
        )
        executor.update_parameters(**options)
        return executor

    def _array(self) -> int:
        """Jobs in one array, at most."""
        return 1

    @property
    def _places(self) -> int:
        """Jobs that are submitted and not over."""
        return sys.maxsize


class Slurm(_Awaited):
    """A SLURM job for each cell, in arrays as large as the cluster allows. A command that was ended
    while its jobs go on finds them again when it is given again."""

    _EXECUTOR = "slurm"

    def _require(self) -> None:
        if absent := [name for name in ("sbatch", "srun") if shutil.which(name) is None]:
            sys.exit(
                f"hydra/launcher=slurm: this machine has no {' and no '.join(absent)}: start the "
                "sweep where jobs are submitted to SLURM, or use hydra/launcher=many_cores for "
                "several jobs at a time on this machine"
            )

    def _submit(
        self, executor: "submitit.Executor", groups: list[list[list[str]]], numbers: list[list[int]]
    ) -> list["submitit.Job"]:
        from clipsae.store import write_json

        jobs = super()._submit(executor, groups, numbers)
        ids = [job.job_id for job in jobs]
        write_json(self._list, self._known() | dict(zip(self._digests(groups), ids, strict=True)))
        return jobs

    def _submitted(self, groups: list[list[list[str]]]) -> dict[int, "submitit.Job"]:
        import submitit

        known = self._known()
        ids = [known.get(name) for name in self._digests(groups)] if known else []
        queued = _queued() if any(ids) else set()
        tasks = range(max(1, self.params["nodes"]) * max(1, self.params["tasks_per_node"]))
        found = {
            i: submitit.SlurmJob(self.params["submitit_folder"], job, list(tasks))
            for i, job in enumerate(ids)
            if job in queued
        }
        if found:
            log.info("%d jobs of an earlier command go on: waiting for them", len(found))
        return found

    @property
    def _list(self) -> Path:
        """Which job was submitted last for which cells."""
        return Path(str(self.params["submitit_folder"]).removesuffix("%j"), "jobs.json")

    def _known(self) -> dict[str, str]:
        from clipsae.store.files import read_json

        return read_json(self._list)

    def _digests(self, groups: list[list[list[str]]]) -> list[str]:
        """For each job everything that it is submitted with, but the command's own folder."""
        config = OmegaConf.masked_copy(self.config, [k for k in self.config if k != "hydra"])
        common = json.dumps([OmegaConf.to_yaml(config), self.params], sort_keys=True)
        jobs = [f"{common}\0{json.dumps(group)}" for group in groups]
        return [hashlib.sha256(job.encode()).hexdigest()[:16] for job in jobs]

    def _array(self) -> int:
        try:
            told = subprocess.run(
                ["scontrol", "show", "config"], capture_output=True, text=True, timeout=30
            ).stdout
        except (OSError, subprocess.TimeoutExpired):
            told = ""
        match = re.search(r"MaxArraySize\s*=\s*(\d+)", told)
        return max(1, int(match[1]) - 1) if match else LARGEST_ARRAY


class ManyCores(_Awaited):
    """Several jobs at a time on this machine, each a process of its own.

    Args:
        parallel: how many; None: one a core.
    """

    _EXECUTOR = "local"
    _end = "kill"

    def __init__(self, parallel: int | None = None, **params: Any) -> None:
        super().__init__(**params)
        self.parallel = parallel

    @property
    def _places(self) -> int:
        return self.parallel or os.cpu_count() or 1


def _queued() -> set[str]:
    """The user's jobs that run or are to run, as "123" or "123_4"."""
    try:
        listed = subprocess.run(
            ["squeue", "--me", "--noheader", "--array", "--format=%i"],
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return set()
    return set(listed.split())


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
        why = trace.strip().splitlines()[-1].removeprefix("clipsae.errors.ConfigError: ")
        return Outcome(cell, why, str(job.paths.stdout))
    # Killed, out of memory, cancelled, the node failed: only the cluster knows.
    return Outcome(cell, f"ended without a result, {job.state}", str(job.paths.stderr))
