"""One streaming pass over a dataset that keeps each latent's reference images, for several SAEs."""

import time
from bisect import bisect_right
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from clipsae.clip import FrozenCLIP
from clipsae.evaluation.encoders import image_encoder
from clipsae.evaluation.passes import Images, Progress, Stream, evenly_spaced
from clipsae.evaluation.truth import IMAGE_ATTRIBUTES, PATCH_ATTRIBUTES, concept_names, has_truth
from clipsae.sae import SAE
from clipsae.visualization.collector import TOP, Collector
from clipsae.visualization.references import References, Shown

STATE = "references.safetensors"  # of an unfinished pass


@torch.no_grad()
def collect_references(
    clip: FrozenCLIP,
    saes: Mapping[str, SAE],
    dataset: Any,
    *,
    name: str,
    split: str,
    top: int = TOP,
    encoder: str | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    limit_images: int | None = None,
    scratch: Mapping[str, Path] | None = None,
    save_every_seconds: float = 300,
    progress: Progress | None = None,
) -> dict[str, References]:
    """Reference images and statistics of SAEs of one layer of one CLIP, in one pass.

    Args:
        saes: by name; each has its own M.
        dataset: `labels` LongTensor [N], `classnames`, items (uint8 [3, S, S], label); the best
            concept of each latent where it has ground truth.
        name, split: of the dataset, for the record.
        top: K.
        encoder: of MonoSemanticity (a name for `image_encoder`); None: not measured.
        device: moves the models there; None: where `clip` is.
        limit_images: that many images only, evenly spaced over the classes.
        scratch: by name a folder for the state of an unfinished pass: a later call with the same
            arguments goes on where it was saved last.
        save_every_seconds: how often it is saved.
        progress: called with (images done, images in all, "images").

    Raises:
        ValueError: no images, `top` below 1, an encoder that cannot be had.
    """
    if top < 1:
        raise ValueError(f"top={top}: expected 1 or more reference images of a latent")
    indices = evenly_spaced(dataset.labels, limit_images)
    device = clip.device if device is None else torch.device(device)
    clip.to(device)
    embed = None if encoder is None else image_encoder(encoder, dataset).to(device)
    stream = Stream(
        clip, dataset, indices, encoder=embed, batch_size=batch_size, num_workers=num_workers
    )
    of_patches: list[str] = []
    of_images: dict[int, str] = {}  # those that no single patch has
    if has_truth(dataset):
        of_patches = concept_names(PATCH_ATTRIBUTES)
        names = enumerate(concept_names(IMAGE_ATTRIBUTES))
        of_images = {i: c for i, c in names if c.split("=")[0] not in PATCH_ATTRIBUTES}
    embed_dim = stream.embed_dim
    collectors = {
        key: Collector(
            sae,
            clip.grid[0] * clip.grid[1],
            top=top,
            embed_dim=embed_dim,
            patch_concepts=of_patches,
            image_concepts=list(of_images.values()),
            image_columns=list(of_images),
        )
        for key, sae in saes.items()
    }
    start = _resume(collectors, scratch or {})
    for key, sae in saes.items():
        sae.to(device)
        collectors[key].to(device)
    saved = time.monotonic()

    def passed(images: Images) -> None:
        nonlocal saved
        position = bisect_right(indices, int(images.indices[-1]))
        for collector in collectors.values():
            collector.position.fill_(position)
        if progress is not None:
            progress(position, len(indices), "images")
        if scratch and time.monotonic() - saved >= save_every_seconds:
            _save(collectors, scratch)
            saved = time.monotonic()

    stream.run(
        saes, lambda key, batch: collectors[key].update(batch), indices[start:], each=passed
    )
    images = int(next(iter(collectors.values())).images)
    if not images:
        raise ValueError("none of the dataset's images could be read")
    shown = Shown(
        dataset=name,
        split=split,
        images=images,
        grid=clip.grid,
        classnames=list(dataset.classnames),
        concepts=[*of_patches, *of_images.values()],
        image_encoder=encoder,
    )
    return {key: collector.references(shown) for key, collector in collectors.items()}


def _save(collectors: dict[str, Collector], scratch: Mapping[str, Path]) -> None:
    for key, collector in collectors.items():
        aside = scratch[key] / f".{STATE}"
        state = {k: v.cpu().contiguous() for k, v in collector.state_dict().items()}
        save_file(state, aside)
        aside.replace(scratch[key] / STATE)


def _resume(collectors: dict[str, Collector], scratch: Mapping[str, Path]) -> int:
    """Load what was saved and return the position to go on from; 0 unless all were there."""
    files = [scratch[key] / STATE for key in collectors if key in scratch]
    if len(files) < len(collectors) or not all(file.is_file() for file in files):
        return 0
    states = [load_file(file) for file in files]
    if len({int(state["position"]) for state in states}) > 1:
        return 0
    for collector, state in zip(collectors.values(), states, strict=True):
        collector.load_state_dict(state)
    return int(states[0]["position"])
