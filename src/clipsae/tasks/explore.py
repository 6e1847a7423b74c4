"""`task=explore`: a page to walk through a trained dictionary."""

import hashlib
import logging
import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from clipsae.clip import FrozenCLIP
from clipsae.clip.text import text_classifier
from clipsae.data import ImageDataset
from clipsae.data.scenes import KINDS
from clipsae.errors import ConfigError
from clipsae.evaluation.interventions import Interventions, likely
from clipsae.evaluation.truth import has_truth
from clipsae.rules import where
from clipsae.sae import SAE
from clipsae.store import Store, write_json
from clipsae.store.files import read_json
from clipsae.tasks import build, pictures, precision
from clipsae.tasks.pictures import Dictionary
from clipsae.tasks.stages import classifier, evaluation
from clipsae.tasks.table import terminal
from clipsae.tasks.tracking import Run
from clipsae.training.logging import log_page, log_sae
from clipsae.visualization import References, page
from clipsae.visualization.page.serve import ADDRESS, PageServer

log = logging.getLogger(__name__)

KEY = "key.json"  # beside the page: what decides its content
OPTIONS = ("pages", "thumbnails", "effect_images", "neighbours")
_WORD_PROMPTS = ("{}", "a photo of {}")  # of words that come from a file


def run(cfg: DictConfig) -> None:
    """Write the page, collecting the reference images first where they are missing.

    Raises:
        ConfigError: an invalid option, an SAE that is not trained yet.
    """
    check(cfg)
    store = Store(cfg.paths.output_dir)
    clip, dataset, (found,) = pictures.prepare([cfg], store, check_text)
    cfg = found.cfg
    precision.apply(cfg, clip)
    name = f"{found.trained.path.name}-{cfg.dataset.name}"
    folder = Path(cfg.paths.output_dir) / "explore" / name
    test_set = build.build_dataset(cfg.dataset, cfg.evaluation.split, clip.image_size)
    evaluated = evaluation.stage(cfg, store, found.trained, test_set)
    key = {
        "pictures": found.pictures.path.name,
        "task": {name: cfg.task[name] for name in OPTIONS},
        "words": None if cfg.task.words is None else read_words(cfg.task.words),
        "ranked": evaluated is not None and evaluated.finished,
        "code": _digest(Path(page.__file__).parent),
    }
    if read_json(folder / KEY) == key:
        log.info("using the finished %s", folder)
    else:
        aside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        aside.mkdir(parents=True)
        try:
            ranking = evaluation.ranking(cfg, store, found.trained, test_set)
            write(found, store, clip, dataset, ranking, aside)
            write_json(aside / KEY, key)
            if folder.exists():
                shutil.rmtree(folder)
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    terminal().print(f"page        {folder / 'index.html'}", soft_wrap=True, highlight=False)
    if cfg.task.upload or cfg.logger.get("upload_sae"):
        aliases = [cfg.model.name, f"seed-{cfg.seed}"]
        with Run(cfg, found.pictures, "explore") as run:
            log_sae(run.logger(), found.trained.path, aliases)
            if cfg.task.upload:
                log_page(run.logger(), folder, [*aliases, cfg.dataset.name])
    if cfg.task.serve:
        serve(found, store, clip, dataset, folder)


def check(cfg: DictConfig) -> None:
    """Refuse options that cannot be met here.

    Raises:
        ConfigError: words that cannot be read, a port that is taken, an upload without W&B.
    """
    task = cfg.task
    if task.words is not None:
        read_words(task.words)
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
        ConfigError: `task.serve` or `task.words` without a text tower.
    """
    if cfg.task.serve:
        clip.require_text()
    if cfg.task.words is not None and (
        not clip.has_text or clip.direct(torch.zeros(1, clip.width)) is None
    ):
        raise ConfigError(
            f"task.words={cfg.task.words!r}: no latent of clip.name={clip.name!r} can be compared "
            "with texts; leave it out"
        )


def read_words(file: str) -> list[str]:
    """The lines of `task.words`, each once.

    Raises:
        ConfigError: no such file, or not a text file of at least two lines.
    """
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(
            f"task.words={file}: {reason}; expected a text file, one word a line"
        ) from error
    found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(found) < 2:
        raise ConfigError(f"task.words={file}: expected at least two lines that differ")
    return found


def write(
    found: Dictionary,
    store: Store,
    clip: FrozenCLIP,
    dataset: ImageDataset,
    ranking: dict[int, list[int]] | None,
    folder: Path,
) -> None:
    """Compute the page and write it into `folder`."""
    cfg, references = found.cfg, References.load(found.pictures.path)
    device = build.best_device()
    clip.to(device)
    classes = classifier.embeddings(cfg, store, clip, dataset) if clip.has_text else None
    build.user_error(
        page.make_page,
        folder,
        clip,
        SAE.load(found.trained.path).to(device),
        dataset,
        references,
        title=f"{cfg.model.name} on {cfg.dataset.name}",
        about=about(found, dataset, references),
        classifier=classes,
        words=([], None) if classes is None else words(cfg, clip, dataset, classes),
        ranking=ranking,
        names=pictures.names(dataset),
        **{name: cfg.task[name] for name in OPTIONS},
        batch_size=cfg.evaluation.batch_size,
        num_workers=cfg.features.num_workers,
    )


def words(
    cfg: DictConfig, clip: FrozenCLIP, dataset: ImageDataset, classes: Tensor
) -> tuple[list[str], Tensor]:
    """The words that latents are compared with, and their embeddings [W, e].

    Args:
        classes: embeddings of the dataset's classes [C, e].
    """
    if cfg.task.words is not None:
        names = read_words(cfg.task.words)
        return names, text_classifier(clip, names, _WORD_PROMPTS)
    if not has_truth(dataset):
        # Classes may share a name: one word each.
        first = {name: i for i, name in reversed(list(enumerate(dataset.classnames)))}
        chosen = sorted(first.values())
        return [dataset.classnames[i] for i in chosen], classes[chosen]
    names, parts = [], []
    for kind, scenes in KINDS.items():
        if kind != "shape_colour":  # its words are those of both
            names += scenes.classnames
            parts.append(text_classifier(clip, scenes.classnames, scenes.templates))
    return names, torch.cat(parts)


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
    found: Dictionary, store: Store, clip: FrozenCLIP, dataset: ImageDataset, folder: Path
) -> None:
    """Serve the page until it is interrupted.

    Raises:
        ConfigError: the port has been taken in the meantime.
    """
    cfg = found.cfg
    sae = SAE.load(found.trained.path).to(clip.device)
    classes = classifier.embeddings(cfg, store, clip, dataset).to(clip.device)
    interventions = Interventions(clip, sae, classes)

    def steer(index: int, strengths: dict[int, float]) -> list[tuple[int, float]]:
        if not 0 <= index < len(dataset):
            raise ValueError(f"image {index}: expected 0 to {len(dataset) - 1}")
        return likely(interventions.steered_logits(dataset[index][0], strengths))

    try:
        server = PageServer(folder, steer, cfg.task.port)
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
