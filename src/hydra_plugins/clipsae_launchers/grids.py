"""`hydra/sweeper=grids`: a sweep of one grid, or of several where one would have cells that nobody
needs."""

from collections.abc import Mapping, Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from clipsae.errors import ConfigError


class Grids(BasicSweeper):
    """As Hydra's own sweeper, over the cells of all grids in their order; each cell once.

    Args:
        params: axes of every grid that has none of that name itself.
        grids: by name, axes as in `params`; none: those of `params` alone.
        only: names of grids; None: all.
    """

    def __init__(
        self,
        params: Mapping[str, str] | None = None,
        grids: Mapping[str, Mapping[str, Any]] | None = None,
        only: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__(None, {})
        self.common = dict(params or {})
        self.grids = dict(grids or {})
        only = [only] if isinstance(only, str) else only
        self.only = list(self.grids) if only is None else list(only)

    def split_arguments(  # type: ignore[override]
        self, overrides: Sequence[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        """The jobs of all grids, in one batch; the command's `overrides` replace axes."""
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        jobs: dict[tuple[str, ...], list[str]] = {}
        for axes in self._chosen():
            axes = {**axes, **{k: v for k, v in self.common.items() if k not in axes}}
            own = parser.parse_overrides([f"{name}={values}" for name, values in axes.items()])
            (cells,) = BasicSweeper.split_arguments([*own, *overrides], None)
            for cell in cells:
                jobs.setdefault(tuple(sorted(cell)), cell)
        return [list(jobs.values())]

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Nothing: the launchers themselves compose all jobs before the first of them begins."""

    def _chosen(self) -> list[Mapping[str, Any]]:
        if not self.grids and not self.only:
            return [{}]
        if not self.grids:
            raise ConfigError(
                f"hydra.sweeper.only={','.join(self.only)}: this sweep has no grids: leave it out"
            )
        for name in self.only or [""]:
            if name not in self.grids:
                names = ", ".join(self.grids)
                raise ConfigError(f"hydra.sweeper.only has {name!r}: expected names among {names}")
        return [self.grids[name] for name in self.grids if name in self.only]
