"""`hydra/launcher=local`: one job after the other, in this process."""

from collections.abc import Callable, Sequence

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

# Their modules have a `prepare`, too.
TOGETHER = ("clipsae.tasks.experiment.run", "clipsae.tasks.evaluate.run")


class Local(BasicLauncher):
    """Hydra's own launcher, with a table of how all ended in place of the first traceback.

    With `together=true` the jobs that train on the same tokens do so at the same time.
    """

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from clipsae.tasks.sweep import Sweep, outcome_of

        if shows_status(self, job_overrides):
            return []
        sweep = Sweep(self, job_overrides)
        launch = super().launch

        def run(i: int) -> JobReturn:
            return launch([job_overrides[i]], initial_job_idx + i)[0]

        returns: dict[int, JobReturn] = {}
        for cells in groups_of(self, sweep.configs):
            returns |= zip(cells, run_cells(self, run, cells), strict=True)
        ordered = [returns[i] for i in range(len(job_overrides))]
        sweep.conclude([outcome_of(*job) for job in zip(ordered, sweep.names, strict=True)])
        return ordered


def shows_status(launcher: Launcher, job_overrides: Sequence[Sequence[str]]) -> bool:
    """Whether this is `task=status`: then the sweep's state is printed here, and nothing starts."""
    from clipsae.tasks import status

    if launcher.config.task.get("_target_") != status.TARGET:
        return False
    status.show_sweep(launcher, job_overrides)
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
