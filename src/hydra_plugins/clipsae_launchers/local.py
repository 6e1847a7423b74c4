"""`hydra/launcher=local`: one job after the other, in this process."""

import logging
from collections.abc import Callable, Sequence
from copy import deepcopy

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn, configure_log, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.utils import get_method
from omegaconf import DictConfig, open_dict

log = logging.getLogger(__name__)

# Their modules have a `prepare`, too.
TOGETHER = ("clipsae.tasks.experiment.run", "clipsae.tasks.evaluate.run")
# Theirs have a `show_sweep`.
LOOKING = tuple(f"clipsae.tasks.{task}.run" for task in ("status", "check", "findings"))


class Local(BasicLauncher):
    """As Hydra's own launcher, with a table of how all ended in place of the first traceback.

    With `together=true` the jobs that train on the same tokens do so at the same time.
    """

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from clipsae.tasks.sweep import Sweep, outcome_of

        if only_looks(self, job_overrides):
            return []
        sweep = Sweep(self, job_overrides)

        def run(i: int) -> JobReturn:
            config = deepcopy(sweep.configs[i])
            with open_dict(config.hydra.job) as job:
                job.id = job.num = initial_job_idx + i
            where = "hydra.sweep.dir", "hydra.sweep.subdir", self.hydra_context
            done = run_job(self.task_function, config, *where)
            self._log_as_hydra()
            return done

        setup_globals()
        self._log_as_hydra()
        returns: dict[int, JobReturn] = {}
        for cells in groups_of(self, sweep.configs):
            for i in cells:
                said = " ".join(filter_overrides(job_overrides[i]))
                log.info("\t#%d : %s", initial_job_idx + i, said)
            returns |= zip(cells, run_cells(self, run, cells), strict=True)
        ordered = [returns[i] for i in range(len(job_overrides))]
        sweep.conclude([outcome_of(*job) for job in zip(ordered, sweep.names, strict=True)])
        return ordered

    def _log_as_hydra(self) -> None:
        """As it was before a job set up a log of its own."""
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)


def only_looks(launcher: Launcher, job_overrides: Sequence[Sequence[str]]) -> bool:
    """Whether the task looks at a sweep as a whole: then it does so here, and no job starts."""
    target = launcher.config.task.get("_target_")
    if target not in LOOKING:
        return False
    get_method(f"{target.removesuffix('run')}show_sweep")(launcher, job_overrides)
    return True


def groups_of(launcher: Launcher, configs: Sequence[DictConfig]) -> list[list[int]]:
    """The jobs by number: one by one, or with `together=true` those that share their tokens."""
    if not launcher.config.together or launcher.config.task._target_ not in TOGETHER:
        return [[i] for i in range(len(configs))]
    from clipsae.tasks.together import by_stream

    return by_stream(configs)


def run_cells(
    launcher: Launcher, run: Callable[[int], JobReturn], cells: Sequence[int]
) -> list[JobReturn]:
    """Run the cells of a group in this process.

    Args:
        run: runs the launcher's task as the job of a cell.
    """
    if len(cells) == 1:
        return [run(cells[0])]
    from clipsae.tasks.together import run_group

    return run_group(launcher, run, cells)
