"""The configs of a sweep's jobs; Hydra composes one for each choice of groups, not for each job.

Composing one takes 0.1 s: mainly to read and merge the files that the choices of groups name, such
as `model=topk dataset=dtd`. Values, such as `seed=1`, are set afterwards. So jobs that choose the
same files get copies of one config, in which their own values are set as Hydra sets them.
"""

from collections.abc import Sequence
from copy import deepcopy
from functools import cache

from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clipsae.rules import EMBEDDINGS, check_layers
from clipsae.tasks import options


class Composer:
    """Composes the configs that the jobs of a sweep run with.

    Args:
        launcher: of the sweep.
    """

    def __init__(self, launcher: Launcher) -> None:
        self._command = launcher.config
        self._load = launcher.hydra_context.config_loader.load_sweep_config
        self._groups = set(self._command.hydra.runtime.choices)
        self._chosen: dict[tuple[str, ...], DictConfig] = {}
        self._layers: set[int] = set()  # of jobs that train together on image embeddings
        parser = OverridesParser.create()
        self._parse = cache(lambda text: parser.parse_override(text))

    def config(self, overrides: Sequence[str]) -> DictConfig:
        """The config that a job runs with, as `load_sweep_config` of Hydra returns it.

        Args:
            overrides: of the job: no axes.

        Raises:
            ConfigError: an invalid value in it.
            HydraException: it does not compose, such as for an unknown key.
        """
        config = self._quick([self._parse(text) for text in overrides])
        if config is None:
            config = self._load(self._command, list(overrides))
        options.check(config, overrides)
        if config.together and config.clip.get("hook") in EMBEDDINGS:
            self._layers.add(config.clip.layer)
            check_layers(config.clip.hook, self._layers)
        return config

    def _quick(self, overrides: Sequence[Override]) -> DictConfig | None:
        """A copy with values set; None where there is more to it, or a value cannot be set: then
        Hydra composes the config, or says why not."""
        choices = [o for o in overrides if o.key_or_group in self._groups]
        values = [o for o in overrides if o.key_or_group not in self._groups]
        if not (all(map(_is_choice, choices)) and all(map(_is_value, values))):
            return None
        chosen = tuple(str(o.input_line) for o in choices)
        if chosen not in self._chosen:
            self._chosen[chosen] = self._load(self._command, list(chosen))
        config = deepcopy(self._chosen[chosen])
        try:
            for o in values:
                if o.is_add() and OmegaConf.select(config, o.key_or_group) is not None:
                    return None
                new = o.is_add() or o.is_force_add()
                OmegaConf.update(config, o.key_or_group, o.value(), force_add=new)
        except OmegaConfBaseException:
            return None
        job = config.hydra.job
        config.hydra.overrides.task = [o.input_line for o in overrides]
        job.override_dirname = get_overrides_dirname(overrides, **job.config.override_dirname)
        return config


def _is_choice(override: Override) -> bool:
    """Whether it does nothing but choose a file of a group."""
    plain = override.type == OverrideType.CHANGE and override.package is None
    return plain and isinstance(override.value(), str)


def _is_value(override: Override) -> bool:
    """Whether it does nothing but set or add a value."""
    key = override.key_or_group
    if override.package is not None or override.is_delete() or key.startswith("hydra"):
        return False
    # What is added without a dot may be a group.
    return override.type == OverrideType.CHANGE or "." in key
