"""The images and CLIP: datasets that are whole, how fast they are read, and whether CLIP with these
weights sees what it should."""

import math

import torch
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch import Tensor

from clipsae.clip import FrozenCLIP
from clipsae.clip.text import text_classifier
from clipsae.data import ImageDataset
from clipsae.data.captions import texts_of
from clipsae.data.loader import image_batches
from clipsae.data.published import PublishedDataset
from clipsae.data.reader import read_batches, skips
from clipsae.evaluation.passes import evenly_spaced
from clipsae.store import Store
from clipsae.tasks.check.findings import FAILS, OK, WARNING, Findings
from clipsae.tasks.check.jobs import Job
from clipsae.tasks.check.steps import now
from clipsae.tasks.stages import classifier
from clipsae.tasks.stages.evaluation import LARGEST_DIFFERENCE

ZERO_SHOT_IMAGES = 128
PROMPTS = {"cpu": 500, "cuda": 80_000}  # embedded for the zero-shot accuracy, at most
SIGMAS = 3  # by which an accuracy may differ from what is expected of so few images


def dataset(
    name: str, split: str, images: ImageDataset, cfg: DictConfig, seconds: float, findings: Findings
) -> float:
    """Whether a split is as published and its images can be read, by a sample in random order.

    Returns:
        Images a second.
    """
    batch, workers = cfg.features.batch_size, cfg.features.num_workers
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = [part.tolist() for part in order.split(batch)]
    workers = min(workers, len(parts))
    read, errors = 0, []
    # Each worker's first batch is waited for with its start.
    first, begun, timed, last = now(), now(), 0, 0.0
    for i, (_, _, good, bad) in enumerate(read_batches(images, parts, num_workers=workers)):
        read += len(good) + len(bad)
        errors += bad
        last = now()
        if i < workers:
            begun = last
        else:
            timed += len(good) + len(bad)
        if last - first > seconds and timed:
            break
    rate = timed / (last - begun) if timed else read / (last - first)
    check = f"dataset {name}"
    differences = list(images.differences) if isinstance(images, PublishedDataset) else []
    if isinstance(images, PublishedDataset):
        size = images.about.sizes(images.split_source)[("train", "test").index(split)]
        if len(images) != size:
            differences.append(f"{len(images):,} images, not the published {size:,}")
    found = f"{split}: {len(images):,} images in {len(images.classnames)} classes"
    if errors and not skips(images):
        todo = "repair or remove them, or set on_bad_image=skip"
        said = f"{len(errors)} of {read:,} images cannot be read: {errors[0]}"
        findings.add(check, FAILS, f"{split}: {said}", todo)
    elif differences:
        found = f"{found}: {'; '.join(differences)}"
        findings.add(check, WARNING, found, "python run.py task=data says what is expected")
    else:
        found += f"; {read:,} read, {rate:,.0f} a second by {workers or 'no'} workers"
        findings.add(check, OK, found, images_a_second=rate)
    return rate


def encoded(
    clip: FrozenCLIP, images: ImageDataset, batch: int, seconds: float
) -> tuple[Tensor, float]:
    """Tokens [B, T, d] of a batch of images in random order (at clip.hook=towers with captions), on
    the CLIP's device, and how many images a second it makes them of."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    pixels, _, there = next(image_batches(images, batch, indices=order[:batch].tolist()))
    texts = texts_of(clip, images)
    rounds, begun = 0, 0.0
    with torch.no_grad():
        while rounds < 3 or now() - begun < seconds:  # the first one aside
            inputs = clip.normalize(pixels.to(clip.device))
            tokens = clip.prefix(inputs) if texts is None else clip.pairs(inputs, texts(there))
            begun = now() if rounds == 0 else begun
            rounds += 1
    return tokens, (rounds - 1) * len(pixels) / (now() - begun)


def zero_shot(job: Job, findings: Findings) -> tuple[Tensor | None, float]:
    """CLIP's zero-shot accuracy on a few images beside what is published.

    Returns:
        The classes' text embeddings [C, e], and prompts that were embedded a second.
    """
    cfg, clip, images = job.cfg, job.clip, job.test_set
    if not clip.has_text:
        findings.add("zero-shot", OK, f"{clip.name} has no texts: left out")
        return None, math.inf
    templates = classifier.templates(cfg, images)
    kept = max(1, PROMPTS[clip.device.type] // len(images.classnames))
    place = classifier.stage(cfg, Store(cfg.paths.output_dir), images, cfg.dataset.name)
    begun, rate = now(), math.inf
    if place.finished:
        classes = load_file(place.path / "classifier.safetensors")["classifier"].to(clip.device)
    else:
        templates = templates[:kept]
        classes = text_classifier(
            clip, images.classnames, templates, renormalize=cfg.evaluation.renormalize_text
        )
        rate = len(templates) * len(images.classnames) / (now() - begun)
    if clip.pretrained is None:  # or its own were not found, which is a line of its own
        if cfg.clip.pretrained is None:
            found = (
                "not measured: with random weights (clip.pretrained=null) no number means anything"
            )
            findings.add("zero-shot", WARNING, found, "set clip.pretrained, unless this is a trial")
        return classes, rate
    right = count = 0
    indices = evenly_spaced(images.labels, ZERO_SHOT_IMAGES)
    with torch.no_grad():
        for pixels, labels, _ in image_batches(images, cfg.evaluation.batch_size, 0, indices):
            tokens, context = clip.prefix(clip.normalize(pixels), with_context=True)
            logits = clip.logits(tokens, classes, context)
            right += int((logits.argmax(-1).cpu() == labels).sum())
            count += len(labels)
    accuracy, chance = right / count, 1 / len(images.classnames)
    published = getattr(getattr(images, "about", None), "zero_shot", None)
    known = (clip.name, clip.pretrained) == ("ViT-B-16-quickgelu", "openai")
    found = f"{100 * accuracy:.1f} % of {count} images of {cfg.dataset.name} with {len(templates)}"
    found += f" prompts a class; chance is {100 * chance:.1f} %"
    verdict, todo = OK, ""
    if known and published is not None:
        found += f", published {published:.1f} %"
        allowed = 100 * SIGMAS * _sigma(published / 100, count) + LARGEST_DIFFERENCE
        if abs(100 * accuracy - published) > allowed:
            verdict, todo = WARNING, "check the split, the class names, the prompts and QuickGELU"
    if accuracy <= chance + SIGMAS * _sigma(chance, count) and len(images.classnames) > 1:
        # What nobody has measured may be too hard for CLIP.
        verdict = FAILS if known and published is not None else WARNING
        todo = "no better than chance: check clip.pretrained, the labels and the class names"
    findings.add("zero-shot", verdict, found, todo, accuracy=100 * accuracy)
    return classes, rate


def _sigma(share: float, count: int) -> float:
    """Standard deviation of a share of so many images."""
    return math.sqrt(share * (1 - share) / count)


def few_prompts(job: Job) -> Tensor | None:
    """The classes' embeddings [C, e] by one prompt each: enough to time an evaluation."""
    if not job.cfg.evaluation.settings:
        return None
    templates = classifier.templates(job.cfg, job.test_set)[:1]
    return text_classifier(job.clip, job.test_set.classnames, templates)
