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
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf

from hydra_plugins.clipsae_launchers.local import groups_of, only_looks, run_cells

try:
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher
except ImportError:  # the extra `slurm` is not installed: Hydra says that there is no such launcher
    BaseSubmititLauncher = Launcher

if TYPE_CHECKING:
    import submitit

    from clipsae.tasks.sweep import Job, Outcome

log = logging.getLogger("clipsae.launcher")

POLL_SECONDS = 2.0
STOP_SECONDS = 15  # for the step in which a local job is asked to stop, and its checkpoint
ENDING = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
LARGEST_ARRAY = 1000  # SLURM's MaxArraySize where `scontrol` does not show it
# Until submitit listens to them, seconds after the start, these would end a job that is only asked
# to leave, and it would count as failed.
DEAF = """sh -c 'trap "" TERM USR2; exec "$@"' sh """


class _Awaited(BaseSubmititLauncher):
    """Submits all jobs and waits for every one of them, however it ends.

    Pickled with each job, and again in the job when it is preempted: by then Hydra has reloaded
    this module, so that the class is pickled, too, with all it refers to (no locks, no `cache`).
    """

    leaving = False  # preempted, and queued again

    def __call__(
        self, overrides: list[list[str]], numbers: list[int], *rest: Any
    ) -> list[JobReturn]:
        """In the job: one cell, or with `together=true` those that train on the same tokens.

        Raises:
            Exception: what the cell raised: SLURM is to see that it failed.
            ConfigError: which of several failed, and why.
        """
        import submitit

        from clipsae.errors import ConfigError
        from clipsae.tasks.sweep import job_names, outcome_of

        call = super().__call__

        def run(i: int) -> JobReturn:
            return call(overrides[i], "hydra.sweep.dir", numbers[i], *rest)

        try:
            done = run_cells(self, run, range(len(overrides)))
            if len(done) == 1:
                _ = done[0].return_value  # raises
                return done
            ends = [outcome_of(*job) for job in zip(done, job_names(overrides), strict=True)]
            if failed := [str(end) for end in ends if end.why is not None]:
                raise ConfigError("; ".join(failed))
            return done
        except Exception as error:
            if not self.leaving or isinstance(error, submitit.core.utils.UncompletedJobError):
                raise
            # Interrupted anywhere, libraries clean up as well as they can: that is no result.
            raise SystemExit(1) from error

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
        from clipsae.tasks.sweep import Sweep

        if only_looks(self, job_overrides):
            return []
        self._require()
        sweep = Sweep(self, job_overrides)
        jobs, unknown = sweep.plan(groups_of(self, sweep.configs))
        self._find(jobs)
        log.info("logs in %s", str(self.params["submitit_folder"]).removesuffix("/%j"))
        with self._awaiting(jobs):
            while unknown or any(job.outcome is None for job in jobs):
                if unknown and all(job.outcome for job in jobs if job.after is None):
                    more, unknown = sweep.plan(unknown, again=True)
                    self._find(more)
                    jobs += more
                ready = [job for job in jobs if job.is_open and self._may_start(job)]
                if ready and (places := self._places(jobs)):
                    same = [job for job in ready if job.after is ready[0].after]
                    self._submit(same[:places], initial_job_idx)
                elif not _collect(jobs):
                    time.sleep(POLL_SECONDS)
        jobs = [job for job in jobs if not job.trains]
        sweep.conclude([job.outcome for job in jobs], [job.cells for job in jobs])
        returns: dict[int, JobReturn] = {}
        for job in jobs:
            returns |= zip(job.cells, job.handle.results()[0], strict=True)
        return [returns[i] for i in range(len(job_overrides))]

    def _submit(self, jobs: "list[Job]", initial_job_idx: int) -> None:
        """Submit jobs that wait for the same training, as one array."""
        numbers = [[initial_job_idx + n for n in job.numbers] for job in jobs]
        with _no_allocation():
            handles = self._executor(jobs[0].after).map_array(
                self,
                [job.overrides for job in jobs],
                numbers,
                [f"job_id_for_{some[0]}" for some in numbers],
                [Singleton.get_state()] * len(jobs),
            )
        for job, handle in zip(jobs, handles, strict=True):
            job.handle = handle
        log.info("submitted %d jobs, %s ...", len(jobs), handles[0].job_id)

    def _find(self, jobs: "list[Job]") -> None:
        """Set the handles of jobs that an earlier command has submitted and that are not over."""

    def _may_start(self, job: "Job") -> bool:
        """Whether a job can be submitted yet."""
        return job.after is None or job.after.outcome is not None

    def _places(self, jobs: "list[Job]") -> int:
        """How many more jobs can be submitted now, in one array."""
        raise NotImplementedError

    def _require(self) -> None:
        """Refuse to begin where the jobs cannot be submitted.

        Raises:
            SystemExit: with the reason.
        """

    def _awaiting(self, jobs: "list[Job]") -> AbstractContextManager[None]:
        """A block in which the jobs are awaited; it knows what becomes of them if it is ended."""
        raise NotImplementedError

    def _executor(self, after: "Job | None") -> "submitit.Executor":
        """What submits jobs that wait for the job `after`."""
        import submitit

        common = set(BaseQueueConf.__dataclass_fields__)
        options = {
            name if name in common else f"{self._EXECUTOR}_{name}": value
            for name, value in {**self.params, **self._dependency(after)}.items()
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

    def _dependency(self, after: "Job | None") -> dict[str, Any]:
        """Parameters that let the scheduler start a job after another, which is not over."""
        return {}


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

    def _submit(self, jobs: "list[Job]", initial_job_idx: int) -> None:
        from submitit.core.utils import FailedJobError

        from clipsae.store.files import read_json, write_json

        try:
            super()._submit(jobs, initial_job_idx)
        except FailedJobError as error:
            reasons = [line.strip() for line in str(error).splitlines() if line.strip()]
            sys.exit(
                f"hydra/launcher=slurm: sbatch refuses the jobs: {'; '.join(reasons[-2:])}; what "
                "was submitted goes on, and the same command submits the rest"
            )
        submitted = zip(self._digests(jobs), (job.handle.job_id for job in jobs), strict=True)
        write_json(self._list, read_json(self._list) | dict(submitted))

    def _find(self, jobs: "list[Job]") -> None:
        import submitit

        from clipsae.store.files import read_json

        known = read_json(self._list)
        squeue = "squeue", "--me", "--noheader", "--array", "--format=%i"
        queued = set(_output(*squeue).split()) if known else set()
        tasks = range(max(1, self.params["nodes"]) * max(1, self.params["tasks_per_node"]))
        for job, digest in zip(jobs, self._digests(jobs), strict=True) if queued else ():
            if (number := known.get(digest)) in queued:
                job.handle = submitit.SlurmJob(self.params["submitit_folder"], number, list(tasks))
        if found := sum(job.handle is not None for job in jobs):
            log.info("%d jobs of an earlier command go on: waiting for them", found)

    def _may_start(self, job: "Job") -> bool:
        return job.after is None or job.after.handle is not None  # SLURM keeps the order

    def _dependency(self, after: "Job | None") -> dict[str, Any]:
        if after is None or after.outcome is not None:
            return {}
        waits = {"dependency": f"afterok:{after.handle.job_id}", "kill-on-invalid-dep": "yes"}
        return {
            "additional_parameters": {**(self.params.get("additional_parameters") or {}), **waits}
        }

    @contextmanager
    def _awaiting(self, jobs: "list[Job]") -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            log.warning(
                "stopped waiting; the jobs go on: scancel ends them, task=status shows them"
            )
            raise

    @property
    def _list(self) -> Path:
        """Which job was submitted last for which cells: digest -> number."""
        return Path(str(self.params["submitit_folder"]).removesuffix("%j"), "jobs.json")

    def _digests(self, jobs: "list[Job]") -> list[str]:
        """For each job everything that it is submitted with, but the command's own folder."""
        config = OmegaConf.masked_copy(self.config, [k for k in self.config if k != "hydra"])
        common = json.dumps([OmegaConf.to_yaml(config), self.params], sort_keys=True)
        texts = [f"{common}\0{json.dumps(job.overrides)}" for job in jobs]
        return [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]

    def _places(self, jobs: "list[Job]") -> int:
        match = re.search(r"MaxArraySize\s*=\s*(\d+)", _output("scontrol", "show", "config"))
        return max(1, int(match[1]) - 1) if match else LARGEST_ARRAY


class ManyCores(_Awaited):
    """Several jobs at a time on this machine, each a process of its own; they end with the command.

    A cluster's SIGTERM announces that a job will be killed and perhaps queued again, and submitit
    has a job go on. Here nobody kills it: it ends by itself, a training after the current step
    with a checkpoint of it.

    Args:
        parallel: how many; None: one a core.
    """

    _EXECUTOR = "local"
    stopping = False  # a job that has received SIGTERM

    def __init__(self, parallel: int | None = None, **params: Any) -> None:
        super().__init__(**params)
        self.parallel = parallel

    def __call__(self, *args: Any) -> list[JobReturn]:
        signal.signal(signal.SIGTERM, self._stop)
        return super().__call__(*args)

    def _stop(self, number: int, frame: Any) -> None:
        """In the job: end, at the latest by SIGALRM, however long a step takes."""
        if self.stopping:  # a group of processes receives it several times
            return
        self.stopping = True
        signal.alarm(STOP_SECONDS)
        # During a training this is called by Lightning's handler, which ends it after the step.
        if signal.getsignal(number) == self._stop:
            sys.exit(128 + number)

    def _submit(self, jobs: "list[Job]", initial_job_idx: int) -> None:
        # What a terminal sends to all its processes is for this one alone: submitit's process
        # beside each job would kill it before there is a checkpoint.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            super()._submit(jobs, initial_job_idx)
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def _awaiting(self, jobs: "list[Job]") -> Iterator[None]:
        from clipsae.tasks.sweep import counted

        def end(number: int, frame: Any) -> None:
            sys.exit(128 + number)

        ending = [n for n in ENDING if signal.getsignal(n) != signal.SIG_IGN]  # as nohup has it
        before = {number: signal.signal(number, end) for number in ending}
        try:
            yield
        finally:
            running = [job.handle for job in jobs if job.handle and not job.outcome]
            if running:
                said = counted(len(running), "job")
                log.warning("stopping %s; the same command continues what they did", said)
            while running := [handle for handle in running if not handle.done()]:
                for handle in running:  # again: it may have been too early to be heard
                    os.kill(int(handle.job_id), signal.SIGTERM)
                time.sleep(POLL_SECONDS / 4)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _places(self, jobs: "list[Job]") -> int:
        running = sum(job.handle is not None and job.outcome is None for job in jobs)
        return int(running < (self.parallel or os.cpu_count() or 1))


def _output(*command: str) -> str:
    """What a command of SLURM prints; empty where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


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


def _collect(jobs: "list[Job]") -> bool:
    """Note the outcome of every job that is over by now; whether there was one. A failed training
    fails the jobs that wait for it."""
    from clipsae.tasks.sweep import Outcome

    before = sum(job.outcome is not None for job in jobs)
    over = before
    for job in jobs:
        if job.outcome is not None:
            continue
        training = job.after and job.after.outcome
        if training and training.why is not None:
            if job.handle is not None:  # SLURM cancels it, too, but later
                job.handle.cancel(check=False)
            why = f"the training of its SAE failed: {training.why}"
            job.outcome = Outcome(job.name, why, training.log)
        elif job.handle is not None and job.handle.done():
            job.outcome = _outcome(job.handle, job.name)
        if job.outcome is not None:
            over += 1
            log.info("%d of %d: %s", over, len(jobs), job.outcome)
    return over > before


def _outcome(job: "submitit.Job", cell: str) -> "Outcome":
    """How a job that is over has ended."""
    import submitit

    from clipsae.tasks.sweep import Outcome

    error = job.exception()
    if error is None:
        return Outcome(cell)
    if isinstance(error, submitit.core.utils.FailedJobError):
        trace = str(error).split("-" * 22)[1]
        why = trace.strip().splitlines()[-1].removeprefix("clipsae.errors.ConfigError: ")
        return Outcome(cell, why, str(job.paths.stdout))
    # Killed, out of memory, cancelled, the node failed: only the cluster knows.
    return Outcome(cell, f"ended without a result, {job.state}", str(job.paths.stderr))
