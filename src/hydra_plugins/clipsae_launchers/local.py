"""`hydra/launcher=local`: one job after the other, in this process."""

from collections.abc import Sequence
from functools import partial

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn


class Local(BasicLauncher):
    """Hydra's own launcher, with the table of failures in place of the first traceback.

    With `together=true` the jobs that train on the same tokens take turns.
    """

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from clipsae.tasks.outcome import cells, conclude, outcome_of

        if self.config.together:
            returns = self._take_turns(job_overrides, initial_job_idx)
        else:
            returns = super().launch(job_overrides, initial_job_idx)
        conclude([outcome_of(*job) for job in zip(returns, cells(job_overrides), strict=True)])
        return returns

    def _take_turns(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from clipsae.tasks.together import Turns, by_stream

        launch = super().launch
        load = self.hydra_context.config_loader.load_sweep_config
        returns: dict[int, JobReturn] = {}
        for group in by_stream([load(self.config, list(some)) for some in job_overrides]):
            jobs = [partial(launch, [job_overrides[i]], initial_job_idx + i) for i in group]
            returns |= zip(group, (done for (done,) in Turns().run(jobs)), strict=True)
        return [returns[i] for i in range(len(job_overrides))]
