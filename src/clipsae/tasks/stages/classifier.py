"""Kind "classifier": the text embeddings of a dataset's classes, which all SAEs share.
`classifier.safetensors`."""

import hashlib
from pathlib import Path

from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipsae.clip import FrozenCLIP
from clipsae.clip.text import OPENAI_IMAGENET_TEMPLATES, Template, text_classifier
from clipsae.data import ImageDataset
from clipsae.progress import Bar
from clipsae.store import Stage, Store
from clipsae.tasks import build, precision


def templates(cfg: DictConfig, dataset: ImageDataset) -> tuple[Template, ...]:
    """The prompts that are averaged over.

    With random CLIP weights one alone: 1,000 classes in 80 templates take an hour on a CPU, and
    mean nothing.
    """
    chosen = tuple(dataset.templates or OPENAI_IMAGENET_TEMPLATES)
    return chosen[:1] if cfg.clip.pretrained is None else chosen


def stage(cfg: DictConfig, store: Store, dataset: ImageDataset, name: str) -> Stage:
    """The place of the embeddings: the text tower and every prompt are in the key."""
    prompts = hashlib.sha256()
    for of_class in dataset.classnames:
        for template in templates(cfg, dataset):
            prompt = template.format(of_class) if isinstance(template, str) else template(of_class)
            prompts.update(f"{prompt}\0".encode())
    clip = {k: v for k, v in build.clip_key(cfg).items() if k not in ("layer", "hook")}
    key = {
        "clip": clip,
        "prompts": prompts.hexdigest(),
        "classes": len(dataset.classnames),
        "renormalize": cfg.evaluation.renormalize_text,
    }
    return store.stage("classifier", [cfg.clip.name, name], key)


def make(
    cfg: DictConfig, clip: FrozenCLIP, dataset: ImageDataset, stage: Stage, folder: Path
) -> None:
    """Embed the class names and write them into `folder`."""
    precision.apply(cfg, clip)
    with Bar("embedding the class names", stage.progress) as bar:
        rows = text_classifier(
            clip.to(build.best_device()),
            dataset.classnames,
            templates(cfg, dataset),
            renormalize=cfg.evaluation.renormalize_text,
            progress=bar,
        )
    save_file({"classifier": rows.cpu().contiguous()}, folder / "classifier.safetensors")


def embeddings(
    cfg: DictConfig,
    store: Store,
    clip: FrozenCLIP,
    dataset: ImageDataset,
    name: str | None = None,
) -> Tensor:
    """The classes' text embeddings [C, e] on the CPU, from the store, made first if missing.

    Args:
        name: of the dataset, for the folder; None: `cfg.dataset`'s.
    """
    place = stage(cfg, store, dataset, name or cfg.dataset.name)
    folder = place.make(lambda folder: make(cfg, clip, dataset, place, folder))
    return load_file(folder / "classifier.safetensors")["classifier"]
