"""`task=explore`: a page to walk through a trained dictionary."""

import hashlib
import logging
import os
import shutil
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor

from clipsae.clip import FrozenCLIP
from clipsae.clip.text import text_classifier
from clipsae.data import ImageDataset
from clipsae.data.scenes import KINDS
from clipsae.errors import ConfigError
from clipsae.evaluation.passes import evenly_spaced
from clipsae.evaluation.ranking import top_latents
from clipsae.evaluation.truth import has_truth
from clipsae.progress import Bar
from clipsae.sae import SAE
from clipsae.store import Stage, Store, write_json
from clipsae.store.files import read_json
from clipsae.tasks import build
from clipsae.tasks.evaluate import bring_in
from clipsae.tasks.guidance import resolve_k
from clipsae.tasks.stages import classifier, evaluation, pictures
from clipsae.tasks.table import terminal
from clipsae.tasks.tracking import Run
from clipsae.training.logging import log_page, log_sae
from clipsae.visualization import page
from clipsae.visualization.collector import TOP
from clipsae.visualization.page import Words, write_page
from clipsae.visualization.page.dictionary import layout, nearest, word_scores
from clipsae.visualization.page.looks import collect_looks, likely
from clipsae.visualization.page.serve import ADDRESS, PageServer
from clipsae.visualization.page.steer import steered_logits
from clipsae.visualization.page.write import write_picture, write_thumbnail
from clipsae.visualization.references import References

log = logging.getLogger(__name__)

WORDS_SHOWN = 6
KEY = "key.json"  # beside the page: what it was made of
_WORD_PROMPTS = ("{}", "a photo of {}")  # of words that come from a file


def run(cfg: DictConfig) -> None:
    """Write the page, collecting the reference images first where they are missing.

    Raises:
        ConfigError: an invalid option, an SAE that has yet to be trained.
    """
    check(cfg)
    store = Store(cfg.paths.output_dir)
    if cfg.task.sae:
        cfg, clip, trained, make = bring_in(cfg, store)
    else:
        resolve_k(cfg, store)
        clip = build.build_clip(cfg)
    check_text(cfg, clip)
    dataset = build.build_dataset(cfg.dataset, cfg.task.split, clip.image_size)
    if cfg.task.sae:
        trained.make(make)
    else:
        trained = pictures.finished_sae(cfg, store, clip)
    stage = pictures.stage(cfg, store, trained, dataset, cfg.task.split)
    pictures.make_all([cfg], clip, [trained], [stage], dataset, cfg.task.split)
    folder = Path(cfg.paths.output_dir) / "explore" / f"{trained.path.name}-{cfg.dataset.name}"
    made_of = page_key(cfg, store, clip, trained, stage)
    if read_json(folder / KEY) == made_of:
        log.info("using the finished %s", folder)
    else:
        aside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        aside.mkdir(parents=True)
        try:
            write(cfg, store, clip, dataset, trained, References.load(stage.path), aside)
            write_json(aside / KEY, made_of)
            if folder.exists():
                shutil.rmtree(folder)
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    console = terminal()
    console.print(f"page        {folder / 'index.html'}", soft_wrap=True, highlight=False)
    if cfg.task.upload or cfg.logger.get("upload_sae"):
        aliases = [cfg.model.name, f"seed-{cfg.seed}"]
        with Run(cfg, stage, "explore") as run:
            log_sae(run.logger(), trained.path, aliases)
            if cfg.task.upload:
                log_page(run.logger(), folder, [*aliases, cfg.dataset.name])
    if cfg.task.serve:
        serve(cfg, store, clip, dataset, trained, folder, console)


def page_key(
    cfg: DictConfig, store: Store, clip: FrozenCLIP, trained: Stage, stage: Stage
) -> dict[str, Any]:
    """What decides a page's content: one with the same key need not be written again."""
    names = ("pages", "thumbnails", "effect_images", "neighbours")
    test_set = build.build_dataset(cfg.dataset, cfg.evaluation.split, clip.image_size)
    evaluated = evaluation.stage(cfg, store, trained, test_set)
    return {
        "pictures": stage.path.name,
        "task": {name: cfg.task[name] for name in names},
        "words": None if cfg.task.words is None else read_words(cfg.task.words),
        "ranked": evaluated is not None and evaluated.finished,
        "code": _digest(Path(page.__file__).parent),
    }


def _digest(folder: Path) -> str:
    """SHA-256 of the files in a folder."""
    hashed = hashlib.sha256()
    for file in sorted(folder.rglob("*.*")):
        if file.suffix != ".pyc" and file.is_file():
            hashed.update(file.read_bytes())
    return hashed.hexdigest()


def check(cfg: DictConfig) -> None:
    """Refuse invalid options.

    Raises:
        ConfigError: see there.
    """
    task = cfg.task
    for name, low, high in (
        ("pages", 0, None),
        ("effect_images", 0, TOP),
        ("neighbours", 0, None),
        ("port", 0, 65535),
    ):
        value = task[name]
        if not isinstance(value, int) or value < low or (high is not None and value > high):
            upper = "or more" if high is None else f"to {high}"
            raise ConfigError(f"task.{name}={value!r}: expected a whole number, {low} {upper}")
    if task.words is not None:
        read_words(task.words)
    if task.serve:
        check_port(task.port)
    if task.upload and not cfg.logger._target_.endswith(".wandb_logger"):
        raise ConfigError("task.upload=true sends the page to W&B: choose logger=wandb with it")


def check_port(port: int) -> None:
    """Refuse a port that the page cannot be served on.

    Raises:
        ConfigError: it is taken, or not for this user.
    """
    try:
        # Closed again: it is opened when the page is there.
        HTTPServer((ADDRESS, port), BaseHTTPRequestHandler).server_close()
    except OSError as error:
        raise port_error(port, error) from error


def port_error(port: int, error: OSError) -> ConfigError:
    """What to say of a port that cannot be had."""
    return ConfigError(f"task.port={port}: {error.strerror}; choose another, or 0 for any free one")


def read_words(file: str) -> list[str]:
    """The lines of `task.words`, each once.

    Raises:
        ConfigError: no such file, or not a text file of at least two lines.
    """
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(
            f"task.words={file}: {said}; expected a text file, one word a line"
        ) from error
    found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(found) < 2:
        raise ConfigError(f"task.words={file}: expected at least two lines that differ")
    return found


def check_text(cfg: DictConfig, clip: FrozenCLIP) -> None:
    """Refuse what needs texts that the model does not have.

    Raises:
        ConfigError: see there.
    """
    if cfg.task.serve:
        clip.require_text()
    if cfg.task.words is not None and (
        not clip.has_text or clip.tower.direct(torch.zeros(1, clip.width)) is None
    ):
        raise ConfigError(
            f"task.words={cfg.task.words!r}: no latent of clip.name={clip.name!r} can be compared "
            "with texts; leave it out"
        )


def serve(
    cfg: DictConfig,
    store: Store,
    clip: FrozenCLIP,
    dataset: ImageDataset,
    trained: Stage,
    folder: Path,
    console: Console,
) -> None:
    """Serve the page until it is interrupted.

    Raises:
        ConfigError: the port has been taken in the meantime.
    """
    sae = SAE.load(trained.path).to(clip.device)
    classes = classifier.embeddings(cfg, store, clip, dataset).to(clip.device)

    def steer(index: int, strengths: dict[int, float]) -> list[tuple[int, float]]:
        if not 0 <= index < len(dataset):
            raise ValueError(f"image {index}: expected 0 to {len(dataset) - 1}")
        return likely(steered_logits(clip, sae, dataset[index][0], strengths, classes))

    try:
        server = PageServer(folder, steer, cfg.task.port)
    except OSError as error:
        raise port_error(cfg.task.port, error) from error
    with server:
        console.print(f"serving     {server.url} (Ctrl-C ends it)", soft_wrap=True, highlight=False)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


@torch.no_grad()
def write(
    cfg: DictConfig,
    store: Store,
    clip: FrozenCLIP,
    dataset: ImageDataset,
    trained: Stage,
    references: References,
    folder: Path,
) -> None:
    """Compute what the page shows and write it into `folder`."""
    device = build.best_device()
    clip.to(device)
    sae = SAE.load(trained.path).to(device)
    classes = classifier.embeddings(cfg, store, clip, dataset) if clip.has_text else None
    rows = sae.decoder_rows().float()
    alive = references.alive.to(device)
    pages = evenly_spaced(dataset.labels, cfg.task.pages) if cfg.task.pages else []

    def on_image(index: int, pixels: Tensor) -> None:
        write_thumbnail(folder, index, pixels)
        if index in shown:
            write_picture(folder, index, pixels)

    shown = set(pages)
    with Bar("images and effects of latents") as progress:
        looks = build.user_error(
            collect_looks,
            clip,
            sae,
            dataset,
            classes,
            references,
            pages=pages,
            effect_images=cfg.task.effect_images,
            on_image=on_image if cfg.task.thumbnails else None,
            batch_size=cfg.evaluation.batch_size,
            num_workers=cfg.features.num_workers,
            progress=progress,
        )
    with Bar("nearest latents") as progress:
        near = nearest(rows, alive, cfg.task.neighbours, progress=progress)
    files = pictures.names(dataset)
    indices = {*pages, *references.index[references.index >= 0].tolist()}
    with Bar("writing the page") as progress:
        write_page(
            folder,
            title=f"{cfg.model.name} on {cfg.dataset.name}",
            about=about(cfg, dataset, references, trained),
            references=references,
            neighbours=tuple(x.cpu() for x in near),
            places=layout(rows, alive).cpu(),
            words=best_words(cfg, clip, dataset, classes, rows),
            effects=looks.effects,
            ranking=ranking(cfg, store, trained, clip),
            looks=looks.images,
            thumbnails=cfg.task.thumbnails,
            names=None if files is None else {index: files[index] for index in sorted(indices)},
            progress=progress,
        )


def ranking(
    cfg: DictConfig, store: Store, trained: Stage, clip: FrozenCLIP
) -> dict[int, list[int]] | None:
    """Class -> its latents as the config's top-n evaluation ranks them; None if it has yet to be
    made."""
    test_set = build.build_dataset(cfg.dataset, cfg.evaluation.split, clip.image_size)
    return evaluation.ranking(cfg, store, trained, test_set)


def best_words(
    cfg: DictConfig, clip: FrozenCLIP, dataset: ImageDataset, classes: Tensor | None, rows: Tensor
) -> Words:
    """The words that each decoder row [M, d] aligns with most; none where there are no texts, or
    no direct path to them."""
    if classes is not None:
        names, embeddings = words(cfg, clip, dataset, classes)
        scores = word_scores(clip, rows, embeddings.to(rows.device))
        if scores is not None:
            best = top_latents(scores, min(WORDS_SHOWN, len(names)))
            return Words(names, best.cpu(), scores.gather(1, best).cpu())
    nothing = torch.zeros(len(rows), 0)
    return Words([], nothing.long(), nothing)


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
    for kind, of in KINDS.items():
        if kind != "shape_colour":  # its words are those of both
            names += of.classnames
            parts.append(text_classifier(clip, of.classnames, of.templates))
    return names, torch.cat(parts)


def about(
    cfg: DictConfig, dataset: ImageDataset, references: References, trained: Stage
) -> dict[str, str]:
    """What the page says of itself."""
    shown, few = references.shown, ""
    if shown.images < len(dataset) and build.limit_images(cfg) is not None:
        few = f" of {len(dataset):,} ({pictures.why_few(cfg)})"
    weights = Path(cfg.clip.pretrained or "random weights").name  # maybe a file of this machine
    imported = cfg.model.get("imported")
    of = f"imported ({imported['from']})" if imported else f"seed {cfg.seed}"
    return {
        "SAE": f"{cfg.model.name}, {references.latents:,} latents, {of}",
        "CLIP": f"{cfg.clip.name}, {weights}, layer {cfg.clip.layer}",
        "Trained on": cfg.train_dataset.name,
        "Shown on": f"{shown.dataset}, {pictures.split_name(dataset, shown.split)}, "
        f"{shown.images:,}{few} images",
        "Dead latents": f"{int((~references.alive).sum()):,}",
        "MonoSemanticity by": shown.image_encoder or "not measured",
        "In the store": trained.path.name,
    }
