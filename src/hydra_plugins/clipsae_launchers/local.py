"""`hydra/launcher=local`: one job after the other, in this process."""

from collections.abc import Sequence
from functools import partial

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig


class Local(BasicLauncher):
    """Hydra's own launcher, with a table of how all ended in place of the first traceback.

    With `together=true` the jobs that train on the same tokens take turns.
    """

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from clipsae.tasks.sweep import Sweep, outcome_of

        if shows_status(self, job_overrides):
            return []
        sweep = Sweep(self, job_overrides)
        if self.config.together:
            groups = groups_of(self, sweep.configs)
            returns = self._take_turns(groups, job_overrides, initial_job_idx)
        else:
            returns = super().launch(job_overrides, initial_job_idx)
        sweep.conclude([outcome_of(*job) for job in zip(returns, sweep.names, strict=True)])
        return returns

    def _take_turns(
        self,
        groups: Sequence[Sequence[int]],
        job_overrides: Sequence[Sequence[str]],
        initial_job_idx: int,
    ) -> Sequence[JobReturn]:
        from clipsae.tasks.together import Turns

        launch = super().launch
        returns: dict[int, JobReturn] = {}
        for group in groups:
            jobs = [partial(launch, [job_overrides[i]], initial_job_idx + i) for i in group]
            returns |= {i: done for i, (done,) in zip(group, Turns().run(jobs), strict=True)}
        return [returns[i] for i in range(len(job_overrides))]


def shows_status(launcher: Launcher, job_overrides: Sequence[Sequence[str]]) -> bool:
    """Whether this is `task=status`: then the sweep's state is printed here, and nothing starts."""
    from clipsae.tasks import status

    if launcher.config.task.get("_target_") != status.TARGET:
        return False
    status.show_sweep(launcher, job_overrides)
    return True


def groups_of(launcher: Launcher, configs: Sequence[DictConfig]) -> list[list[int]]:
    """The jobs by number: one by one, or with `together=true` those that share their tokens."""
    if not launcher.config.together:
        return [[i] for i in range(len(configs))]
    from clipsae.tasks.together import by_stream

    return by_stream(configs)
