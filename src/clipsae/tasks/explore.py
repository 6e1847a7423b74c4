"""`task=explore`: a page to walk through a trained dictionary."""

import hashlib
import io
import logging
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from clipsae.clip import FrozenCLIP
from clipsae.data import ImageDataset, read_image
from clipsae.errors import ConfigError
from clipsae.evaluation.interventions import Interventions, likely
from clipsae.naming import Names
from clipsae.progress import Bar
from clipsae.rules import where
from clipsae.sae import SAE
from clipsae.store import Stage, Store, write_json
from clipsae.store.files import read_json
from clipsae.tasks import build, pictures, precision
from clipsae.tasks.pictures import Dictionary
from clipsae.tasks.stages import classifier, evaluation
from clipsae.tasks.stages import names as naming
from clipsae.tasks.table import terminal
from clipsae.tasks.tracking import Run
from clipsae.training.logging import log_page, log_sae
from clipsae.visualization import References, page
from clipsae.visualization.page.images import image_activations
from clipsae.visualization.page.serve import ADDRESS, PageServer

log = logging.getLogger(__name__)

KEY = "key.json"  # beside the page: what decides its content
OPTIONS = ("pages", "thumbnails", "effect_images", "neighbours")


def run(cfg: DictConfig) -> None:
    """Write the page, collecting the reference images first where they are missing.

    Raises:
        ConfigError: an invalid option, an SAE that is not trained yet.
    """
    check(cfg)
    store = Store(cfg.paths.output_dir)
    configs = pictures.configs_of_models(cfg)
    clip, dataset, found = pictures.prepare(configs, store, check_text)
    cfg = found[0].cfg
    name = f"{pictures.folder_name([one.trained.path.name for one in found])}-{cfg.dataset.name}"
    folder = Path(cfg.paths.output_dir) / "explore" / name
    test_set = build.build_dataset(cfg.dataset, cfg.evaluation.split, clip.image_size)
    evaluated = [evaluation.stage(one.cfg, store, one.trained, test_set) for one in found]
    named = {}
    if clip.has_text and cfg.task.names:
        for one in found:
            named[one.cfg.model.name] = naming.make_names(
                one.cfg, store, clip, dataset, one.pictures, one.trained
            )
    key = {
        "pictures": [one.pictures.path.name for one in found],
        "task": {name: cfg.task[name] for name in OPTIONS},
        "names": [place.path.name for place in named.values()],
        "ranked": [stage is not None and stage.finished for stage in evaluated],
        "code": _digest(Path(page.__file__).parent),
    }
    if read_json(folder / KEY) == key:
        log.info("using the finished %s", folder)
    else:
        aside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        aside.mkdir(parents=True)
        try:
            write(found, named, store, clip, dataset, test_set, aside)
            write_json(aside / KEY, key)
            if folder.exists():
                shutil.rmtree(folder)
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    terminal().print(f"page        {folder / 'index.html'}", soft_wrap=True, highlight=False)
    if cfg.task.upload or cfg.logger.get("upload_sae"):
        seed = f"seed-{cfg.seed}"
        with Run(cfg, found[0].pictures, "explore") as run:
            for one in found:
                log_sae(run.logger(), one.trained.path, [one.cfg.model.name, seed])
            if cfg.task.upload:
                aliases = [*(one.cfg.model.name for one in found), seed, cfg.dataset.name]
                log_page(run.logger(), folder, aliases)
    if cfg.task.serve:
        serve(found, store, clip, dataset, folder)


def check(cfg: DictConfig) -> None:
    """Refuse options that cannot be met here.

    Raises:
        ConfigError: SAEs asked for in two ways, a port that is taken, an upload without W&B.
    """
    task = cfg.task
    pictures.check_models(cfg)
    if task.serve:
        try:
            socket.create_server((ADDRESS, task.port)).close()  # opened when the page is there
        except OSError as error:
            raise _port_error(task.port, error) from error
    if task.upload and not cfg.logger._target_.endswith(".wandb_logger"):
        raise ConfigError("task.upload=true sends the page to W&B: choose logger=wandb with it")


def check_text(cfg: DictConfig, clip: FrozenCLIP, dataset: ImageDataset) -> None:
    """Refuse options that need texts where the model has none.

    Raises:
        ConfigError: `task.serve` without a text tower, names that cannot be made.
    """
    if cfg.task.serve:
        clip.require_text()
    if clip.has_text and cfg.task.names:
        naming.check(cfg, clip, dataset)


def write(
    found: Sequence[Dictionary],
    named: Mapping[str, Stage],
    store: Store,
    clip: FrozenCLIP,
    dataset: ImageDataset,
    test_set: ImageDataset,
    folder: Path,
) -> None:
    """Compute the page of some SAEs and write it into `folder`.

    Args:
        named: the names of their latents, by the model's name; those without are not named.
    """
    device = build.best_device()
    clip.to(device)
    models, first = {}, found[0].cfg
    for one in found:
        cfg, references = one.cfg, References.load(one.pictures.path)
        precision.apply(cfg, clip)
        classes = classifier.embeddings(cfg, store, clip, dataset) if clip.has_text else None
        names = named.get(cfg.model.name)
        models[cfg.model.name] = build.user_error(
            page.examine,
            folder,
            clip,
            SAE.load(one.trained.path).to(device),
            dataset,
            references,
            about=about(one, dataset, references),
            classifier=classes,
            ranking=evaluation.ranking(cfg, store, one.trained, test_set),
            names=None if names is None else Names.load(names.path),
            **{name: cfg.task[name] for name in OPTIONS},
            batch_size=cfg.evaluation.batch_size,
            num_workers=cfg.features.num_workers,
        )
    with Bar("writing the page") as progress:
        page.write_page(
            folder,
            models,
            title=f"{' and '.join(models)} on {first.dataset.name}",
            thumbnails=first.task.thumbnails,
            names=pictures.names(dataset),
            progress=progress,
        )


def about(found: Dictionary, dataset: ImageDataset, references: References) -> dict[str, str]:
    """The facts of the page's "About"."""
    cfg, source, few = found.cfg, references.source, ""
    if source.images < len(dataset) and build.limit_images(cfg) is not None:
        few = f" of {len(dataset):,} ({pictures.why_few(cfg)})"
    weights = Path(cfg.clip.pretrained or "random weights").name  # maybe a file of this machine
    place = where(cfg.clip.layer, cfg.clip.get("hook", "resid"))
    imported = cfg.model.get("imported")
    origin = f"imported ({imported['from']})" if imported else f"seed {cfg.seed}"
    split = pictures.split_name(dataset, source.split)
    return {
        "SAE": f"{cfg.model.name}, {references.latents:,} latents, {origin}",
        "CLIP": f"{cfg.clip.name}, {weights}, {place}",
        "Trained on": cfg.train_dataset.name,
        "Shown on": f"{source.dataset}, {split}, {source.images:,}{few} images",
        "Dead latents": f"{int((~references.alive).sum()):,}",
        "MonoSemanticity by": source.image_encoder or "not measured",
        "In the store": found.trained.path.name,
    }


def serve(
    found: Sequence[Dictionary],
    store: Store,
    clip: FrozenCLIP,
    dataset: ImageDataset,
    folder: Path,
) -> None:
    """Serve the page until it is interrupted.

    Raises:
        ConfigError: the port has been taken in the meantime.
    """
    cfg = found[0].cfg
    classes = classifier.embeddings(cfg, store, clip, dataset).to(clip.device)
    behind = {}
    for one in found:
        sae = SAE.load(one.trained.path).to(clip.device)
        behind[one.cfg.model.name] = one.cfg, Interventions(clip, sae, classes)

    def steer(name: str, index: int, strengths: dict[int, float]) -> list[tuple[int, float]]:
        if name not in behind:
            raise ValueError(f"SAE {name!r}: expected {' or '.join(behind)}")
        if not 0 <= index < len(dataset):
            raise ValueError(f"image {index}: expected 0 to {len(dataset) - 1}")
        config, interventions = behind[name]
        precision.apply(config, clip)
        return likely(interventions.steered_logits(dataset[index][0], strengths))

    def explain(name: str, picture: bytes) -> dict[str, Any]:
        if name not in behind:
            raise ValueError(f"SAE {name!r}: expected {' or '.join(behind)}")
        config, interventions = behind[name]
        precision.apply(config, clip)
        pixels = read_image(io.BytesIO(picture), clip.image_size)
        return page.image_content(image_activations(interventions, pixels))

    try:
        server = PageServer(folder, steer, explain, port=cfg.task.port)
    except OSError as error:
        raise _port_error(cfg.task.port, error) from error
    with server:
        line = f"serving     {server.url} (Ctrl-C ends it)"
        terminal().print(line, soft_wrap=True, highlight=False)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


def _port_error(port: int, error: OSError) -> ConfigError:
    return ConfigError(f"task.port={port}: {error.strerror}; choose another, or 0 for any free one")


def _digest(folder: Path) -> str:
    """SHA-256 of the files in a folder."""
    hashed = hashlib.sha256()
    for file in sorted(folder.rglob("*.*")):
        if file.suffix != ".pyc" and file.is_file():
            hashed.update(file.read_bytes())
    return hashed.hexdigest()
