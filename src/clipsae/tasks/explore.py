"""`task=explore`: a page to walk through a trained dictionary."""

import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor

from clipsae.clip import FrozenCLIP
from clipsae.clip.text import text_classifier
from clipsae.data import ImageDataset
from clipsae.data.scenes import KINDS
from clipsae.errors import ConfigError
from clipsae.evaluation.metrics.truth import has_truth
from clipsae.evaluation.passes import evenly_spaced
from clipsae.evaluation.ranking import top_latents
from clipsae.sae import SAE
from clipsae.store import Stage, Store
from clipsae.tasks import build
from clipsae.tasks.experiment import tracked
from clipsae.tasks.guidance import resolve_k
from clipsae.tasks.stages import classifier, evaluation, pictures
from clipsae.tasks.table import terminal
from clipsae.training.logging import log_page
from clipsae.visualization.collector import TOP
from clipsae.visualization.page import Words, write_page
from clipsae.visualization.page.dictionary import layout, nearest, word_scores
from clipsae.visualization.page.looks import collect_looks, likely
from clipsae.visualization.page.serve import PageServer
from clipsae.visualization.page.steer import steered_logits
from clipsae.visualization.page.write import write_picture, write_thumbnail
from clipsae.visualization.references import References

log = logging.getLogger(__name__)

WORDS_SHOWN = 6
_WORD_PROMPTS = ("{}", "a photo of {}")  # of words that come from a file


def run(cfg: DictConfig) -> None:
    """Write the page, collecting the reference images first where they are missing.

    Raises:
        ConfigError: an option that cannot be, an SAE that has yet to be trained.
    """
    check(cfg)
    store = Store(cfg.paths.output_dir)
    resolve_k(cfg, store)
    clip = build.build_clip(cfg)
    check_text(cfg, clip)
    dataset = build.build_dataset(cfg.dataset, cfg.task.split, clip.image_size)
    trained = pictures.finished_sae(cfg, store, clip)
    stage = pictures.stage(cfg, store, trained, dataset, cfg.task.split)
    pictures.make_all([cfg], clip, [trained], [stage], dataset, cfg.task.split)
    folder = Path(cfg.paths.output_dir) / "explore" / f"{trained.path.name}-{cfg.dataset.name}"
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    aside.mkdir(parents=True)
    try:
        write(cfg, store, clip, dataset, trained, References.load(stage.path), aside)
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    console = terminal()
    console.print(f"page        {folder / 'index.html'}", soft_wrap=True, highlight=False)
    if cfg.task.upload:
        with tracked(cfg, stage, job_type="explore") as logger:
            log_page(logger(), folder, [cfg.model.name, cfg.dataset.name, f"seed-{cfg.seed}"])
    if cfg.task.serve:
        serve(cfg, store, clip, dataset, trained, folder, console)


def check(cfg: DictConfig) -> None:
    """Refuse options that cannot be.

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
    if task.words is not None and not Path(task.words).expanduser().is_file():
        raise ConfigError(
            f"task.words={task.words!r}: no such file; expected a text file, one word a line"
        )
    if task.upload and not cfg.logger._target_.endswith(".wandb_logger"):
        raise ConfigError("task.upload=true sends the page to W&B: choose logger=wandb with it")


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
        ConfigError: the port is taken.
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
        raise ConfigError(
            f"task.port={cfg.task.port}: {error.strerror}; choose another, or 0 for any free one"
        ) from error
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
    log.info("looking at images")

    def on_image(index: int, pixels: Tensor) -> None:
        write_thumbnail(folder, index, pixels)
        if index in shown:
            write_picture(folder, index, pixels)

    shown = set(pages)
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
    )
    write_page(
        folder,
        title=f"{cfg.model.name} on {cfg.dataset.name}",
        about=about(cfg, references, trained),
        references=references,
        neighbours=tuple(x.cpu() for x in nearest(rows, alive, cfg.task.neighbours)),
        places=layout(rows, alive).cpu(),
        words=best_words(cfg, clip, dataset, classes, rows),
        effects=looks.effects,
        ranking=ranking(cfg, store, trained, clip),
        looks=looks.images,
        thumbnails=cfg.task.thumbnails,
    )


def ranking(
    cfg: DictConfig, store: Store, trained: Stage, clip: FrozenCLIP
) -> dict[int, list[int]] | None:
    """Class -> its latents as the config's top-n evaluation ranks them; None if it has yet to be
    made."""
    test_set = build.build_dataset(cfg.dataset, cfg.evaluation.split, clip.image_size)
    evaluated = evaluation.stage(cfg, store, trained, test_set)
    return evaluation.read_ranking(evaluated.path) if evaluated.finished else None


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
        lines = Path(cfg.task.words).expanduser().read_text().splitlines()
        names = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
        if len(names) < 2:
            raise ConfigError(f"task.words={cfg.task.words!r}: expected at least two lines")
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


def about(cfg: DictConfig, references: References, trained: Stage) -> dict[str, str]:
    """What the page says of itself."""
    shown = references.shown
    return {
        "SAE": f"{cfg.model.name}, {references.latents:,} latents, seed {cfg.seed}",
        "CLIP": f"{cfg.clip.name}, {cfg.clip.pretrained}, layer {cfg.clip.layer}",
        "Trained on": build.train_dataset_node(cfg).name,
        "Shown on": f"{shown.dataset}, {shown.split} split, {shown.images:,} images",
        "Dead latents": f"{int((~references.alive).sum()):,}",
        "MonoSemanticity by": shown.image_encoder or "not measured",
        "In the store": trained.path.name,
    }
