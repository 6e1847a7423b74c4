"""`task=visualize`: figures of images through a trained SAE, or several (Figures 6-11)."""

import logging
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor

from clipsae.clip import FrozenCLIP
from clipsae.data import ImageDataset
from clipsae.data.images import read_image
from clipsae.errors import ConfigError
from clipsae.evaluation.passes import evenly_spaced
from clipsae.rules import EMBEDDINGS
from clipsae.sae import SAE
from clipsae.store import Store
from clipsae.tasks import build, pictures, precision
from clipsae.tasks.table import terminal
from clipsae.visualization import References
from clipsae.visualization.figures import Panel, draw_image, image_codes, passes_filter, save

log = logging.getLogger(__name__)

DEFAULT_IMAGES = 4


@dataclass(frozen=True)
class Wanted:
    """An image to draw.

    Attributes:
        name: of its files.
        title: of its figure.
        pixels: uint8 [3, S, S].
        index: in the dataset; None for a file.
    """

    name: str
    title: str
    pixels: Tensor
    index: int | None = None


def run(cfg: DictConfig) -> None:
    """Draw the figures, collecting the reference images first where they are missing.

    Raises:
        ConfigError: an invalid option, an image that cannot be read, an SAE not trained yet.
    """
    check(cfg)
    task, wanted = cfg.task, []

    def read_images(cfg: DictConfig, clip: FrozenCLIP, dataset: ImageDataset) -> None:
        wanted.extend(wanted_images(cfg, dataset, clip.image_size))

    clip, dataset, found = pictures.prepare(
        pictures.configs_of_models(cfg), Store(cfg.paths.output_dir), read_images
    )
    device = build.best_device()
    clip.to(device)
    models = {}
    for one in found:
        references = References.load(one.pictures.path)
        limits = {"max_frequency": task.max_frequency, "max_strength": task.max_strength}
        shown = passes_filter(references, task.filter, **limits)
        sae = SAE.load(one.trained.path).to(device)
        models[one.cfg.model.name] = one.cfg, sae, references, shown
    folder = Path(cfg.paths.output_dir) / "figures"
    folder /= pictures.folder_name([one.trained.path.name for one in found])
    folder.mkdir(parents=True, exist_ok=True)
    console = terminal()
    for image in wanted:
        panels = {}
        for name, (config, sae, references, shown) in models.items():
            precision.apply(config, clip)
            codes = image_codes(clip, sae, image.pixels, shown, task.top)
            if not codes.marked:
                log.warning(
                    "%s: no active latent of %s passes task.filter=%s; try another filter or limit",
                    *(image.name, name, task.filter),
                )
            panels[name] = Panel(
                codes, references, lambda index: dataset[index][0], pictures.names(dataset)
            )
        figure = draw_image(
            image.pixels,
            image.title,
            panels,
            references=task.references,
            mask_references=task.mask_references,
            own_index=image.index,
        )
        path = save(figure, folder / f"{cfg.dataset.name}-{image.name}")[0]
        console.print(f"figure      {path}", soft_wrap=True, highlight=False)


def check(cfg: DictConfig) -> None:
    """Refuse options that contradict each other, and files that are not there.

    Raises:
        ConfigError: the first of them.
    """
    pictures.check_models(cfg)
    for file in cfg.task.images:
        if not Path(file).expanduser().is_file():
            raise ConfigError(f"task.images has {file}: no such file")
    if (hook := cfg.clip.get("hook")) in EMBEDDINGS:
        raise ConfigError(
            f"clip.hook={hook}: task=visualize draws on which patches latents are active, and "
            "the image embedding has none; task=explore shows the images of each latent"
        )
    if cfg.logger.get("upload_sae"):
        raise ConfigError(
            "logger.upload_sae=true: task=visualize uploads nothing; task=experiment, evaluate and "
            "explore do"
        )


def wanted_images(cfg: DictConfig, dataset: ImageDataset, image_size: int) -> list[Wanted]:
    """The images of `task.images` and `task.indices`, read.

    Raises:
        ConfigError: a file that is no image, an index beyond the dataset.
    """
    found = []
    for file in cfg.task.images:
        path = Path(file).expanduser()
        pixels = build.user_error(read_image, path, image_size)
        found.append(Wanted(pictures.name_of_file(path), path.name, pixels))
    indices, files = cfg.task.indices, pictures.names(dataset)
    if indices is None:
        indices = [] if found else evenly_spaced(dataset.labels, DEFAULT_IMAGES)
    for index in indices:
        if not 0 <= index < len(dataset):
            raise ConfigError(
                f"task.indices has {index!r}: expected 0 to {len(dataset) - 1}, the images of "
                f"{cfg.dataset.name} ({pictures.split_name(dataset, cfg.task.split)})"
            )
        pixels, label = build.user_error(dataset.__getitem__, index)
        name = f"{cfg.task.split} image {index}" if files is None else files[index]
        title = f"{name}: {dataset.classnames[label]}"
        found.append(Wanted(f"{cfg.task.split}-{index:05d}", title, pixels, index))
    return found
