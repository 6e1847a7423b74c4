"""`task=cache`: only make the cache of tokens or of decoded images, or verify it."""

import logging

from omegaconf import DictConfig

from clipsae.errors import ConfigError
from clipsae.tasks import build, precision
from clipsae.tasks.stages import features

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """Make the cache of the training images, unless it is there.

    Raises:
        ConfigError: something invalid in the config, or a disk that is too small.
    """
    if not features.cached(cfg):
        raise ConfigError(
            "task=cache writes the cache that features=cached or features=images reads: leave out "
            "features=online"
        )
    build.check_keys(cfg)
    clip = build.build_clip(cfg)
    train_set = build.build_dataset(cfg.train_dataset, "train", clip.image_size)
    precision.resolve(cfg, lambda: features.stage(cfg, train_set))
    features.check(cfg, clip, train_set, content=cfg.task.verify)
    folder = features.make(cfg, clip, train_set, content=cfg.task.verify)
    log.info("the cache is in %s", folder)
