"""`task=visualize`: what a trained SAE, or several, see in images (Figures 6-11)."""

import hashlib
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from clipsae.clip import FrozenCLIP
from clipsae.data import ImageDataset
from clipsae.data.images import read_image
from clipsae.errors import ConfigError
from clipsae.evaluation.passes import evenly_spaced
from clipsae.sae import SAE
from clipsae.store import Store
from clipsae.tasks import build
from clipsae.tasks.evaluate import bring_in
from clipsae.tasks.guidance import resolve_k
from clipsae.tasks.stages import pictures
from clipsae.tasks.table import terminal
from clipsae.visualization.collector import TOP
from clipsae.visualization.drawing import save
from clipsae.visualization.figure import Panel, draw
from clipsae.visualization.references import References
from clipsae.visualization.view import FILTERS, look, passes_filter

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
        ConfigError: an invalid option, an image that cannot be read, an SAE that has yet
            to be trained.
    """
    check(cfg)
    store = Store(cfg.paths.output_dir)
    if cfg.task.sae:
        cfg, clip, brought, make = bring_in(cfg, store)
        dataset, wanted = images_to_draw(cfg, clip)
        brought.make(make)
        configs, trained = [cfg], [brought]
    else:
        configs = configs_of_models(cfg)
        for of in configs:
            resolve_k(of, store)
        clip = build.build_clip(cfg)
        dataset, wanted = images_to_draw(cfg, clip)
        trained = [pictures.finished_sae(of, store, clip) for of in configs]
    stages = [
        pictures.stage(of, store, sae, dataset, cfg.task.split)
        for of, sae in zip(configs, trained, strict=True)
    ]
    pictures.make_all(configs, clip, trained, stages, dataset, cfg.task.split)

    device = build.best_device()
    clip.to(device)
    models = {}
    for of, sae, stage in zip(configs, trained, stages, strict=True):
        references = References.load(stage.path)
        shown = passes_filter(
            references,
            cfg.task.filter,
            max_frequency=cfg.task.max_frequency,
            max_strength=cfg.task.max_strength,
        )
        models[of.model.name] = (SAE.load(sae.path).to(device), references, shown)
    folder = (
        Path(cfg.paths.output_dir) / "figures" / folder_name([sae.path.name for sae in trained])
    )
    folder.mkdir(parents=True, exist_ok=True)
    console = terminal()
    for image in wanted:
        panels = {
            name: Panel(
                look(clip, sae, image.pixels, shown, cfg.task.top),
                references,
                partial(pixels_of, dataset),
                pictures.names(dataset),
            )
            for name, (sae, references, shown) in models.items()
        }
        for name, panel in panels.items():
            if not panel.view.marked:
                log.warning(
                    "%s: no active latent of %s passes task.filter=%s; try another filter or limit",
                    image.name,
                    name,
                    cfg.task.filter,
                )
        figure = draw(
            image.pixels,
            image.title,
            panels,
            references=cfg.task.references,
            mask_references=cfg.task.mask_references,
            own_index=image.index,
        )
        path = save(figure, folder / f"{cfg.dataset.name}-{image.name}")[0]
        console.print(f"figure      {path}", soft_wrap=True, highlight=False)


def check(cfg: DictConfig) -> None:
    """Refuse invalid options.

    Raises:
        ConfigError: see there.
    """
    task = cfg.task
    if task.filter not in FILTERS:
        raise ConfigError(f"task.filter={task.filter!r}: expected one of {', '.join(FILTERS)}")
    if not isinstance(task.top, int) or task.top < 1:
        raise ConfigError(f"task.top={task.top!r}: expected a whole number, 1 or more")
    if task.sae and task.models:
        raise ConfigError("task.sae and task.models: expected one of them, or neither")
    for file in task.images:
        if not Path(file).expanduser().is_file():
            raise ConfigError(f"task.images has {file}: no such file")
    if cfg.logger.get("upload_sae"):
        raise ConfigError(
            "logger.upload_sae=true: task=visualize uploads nothing; task=experiment, evaluate and "
            "explore do"
        )
    if not isinstance(task.references, int) or not 1 <= task.references <= TOP:
        raise ConfigError(f"task.references={task.references!r}: expected 1 to {TOP}")


def images_to_draw(cfg: DictConfig, clip: FrozenCLIP) -> tuple[ImageDataset, list[Wanted]]:
    """The dataset, and the images that figures are made of.

    Raises:
        ConfigError: as `wanted_images`.
    """
    dataset = build.build_dataset(cfg.dataset, cfg.task.split, clip.image_size)
    return dataset, wanted_images(cfg, dataset, clip.image_size)


def wanted_images(cfg: DictConfig, dataset: ImageDataset, image_size: int) -> list[Wanted]:
    """The images of `task.images` and `task.indices`, read.

    Raises:
        ConfigError: a file that is not there or no image, an index beyond the dataset.
    """
    found = []
    for file in cfg.task.images:
        path = Path(file).expanduser()
        pixels = build.user_error(read_image, path, image_size)
        # Two files may have the same name in different folders.
        mark = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:4]
        found.append(Wanted(f"{path.stem}-{mark}", path.name, pixels))
    indices, files = cfg.task.indices, pictures.names(dataset)
    if indices is None:
        indices = [] if found else evenly_spaced(dataset.labels, DEFAULT_IMAGES)
    for index in indices:
        if not isinstance(index, int) or not 0 <= index < len(dataset):
            raise ConfigError(
                f"task.indices has {index!r}: expected 0 to {len(dataset) - 1}, the images of "
                f"{cfg.dataset.name} ({pictures.split_name(dataset, cfg.task.split)})"
            )
        pixels, label = build.user_error(dataset.__getitem__, index)
        name = f"{cfg.task.split} image {index}" if files is None else files[index]
        title = f"{name}: {dataset.classnames[label]}"
        found.append(Wanted(f"{cfg.task.split}-{index:05d}", title, pixels, index))
    return found


def configs_of_models(cfg: DictConfig) -> list[DictConfig]:
    """One config for each of `task.models`, each with its own defaults and recipe, and what was
    overridden on the command line; `cfg` alone where there are none.

    Raises:
        ConfigError: a model that does not exist, or an override that does not fit it.
    """
    if not cfg.task.models:
        return [cfg]
    overrides = [
        override
        for override in HydraConfig.get().overrides.task
        if not override.startswith(("model=", "task.models="))
    ]
    found = []
    for model in cfg.task.models:
        try:
            of = hydra.compose("config", overrides=[*overrides, f"model={model}"])
        except (HydraException, OmegaConfBaseException) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"task.models has {model!r}: {reason}") from error
        # What depends on where the job runs has been resolved in `cfg`.
        of.paths = OmegaConf.create(build.plain(cfg.paths))
        found.append(of)
    return found


def folder_name(saes: list[str]) -> str:
    """A folder for the figures of these SAEs (names in the store)."""
    if len(saes) == 1:
        return saes[0]
    words = "+".join(name.split("-")[0] for name in saes)
    return f"{words}-{hashlib.sha256(' '.join(saes).encode()).hexdigest()[:8]}"


def pixels_of(dataset: ImageDataset, index: int) -> Tensor:
    """An image of the dataset, uint8 [3, S, S]."""
    return dataset[index][0]
