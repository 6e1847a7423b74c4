"""`hydra/launcher=local`: one job after the other, in this process."""

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn


class Local(BasicLauncher):
    """Hydra's own launcher, with the table of failures in place of the first traceback."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from clipsae.tasks.outcome import cells, conclude, outcome_of

        returns = super().launch(job_overrides, initial_job_idx)
        conclude([outcome_of(*job) for job in zip(returns, cells(job_overrides), strict=True)])
        return returns
