"""One streaming pass over a dataset that keeps each latent's reference images, for several SAEs."""

import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clipsae.clip import FrozenCLIP
from clipsae.data.loader import image_batches
from clipsae.evaluation.metrics import image_encoder
from clipsae.evaluation.metrics.truth import (
    IMAGE_ATTRIBUTES,
    PATCH_ATTRIBUTES,
    concept_names,
    has_truth,
    image_concepts,
    patch_concepts,
)
from clipsae.evaluation.passes import evenly_spaced, in_eval_mode
from clipsae.visualization.collector import TOP, Collector
from clipsae.visualization.references import References, Shown

STATE = "references.safetensors"  # of an unfinished pass
_OF_IMAGES = ("position", "count")  # attributes that no single patch has
_DENSE_BYTES = 256 * 2**20  # codes of a group of images


@torch.no_grad()
def collect_references(
    clip: FrozenCLIP,
    saes: Mapping[str, nn.Module],
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
    progress: Callable[[int, int], None] | None = None,
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
        progress: called with (images done, images in all).

    Raises:
        ValueError: no images, `top` below 1, an encoder that cannot be had.
    """
    if top < 1:
        raise ValueError(f"top={top}: expected 1 or more reference images of a latent")
    indices = evenly_spaced(dataset.labels, limit_images)
    if not indices:
        raise ValueError("the dataset has no images: expected at least one")
    device = clip.device if device is None else torch.device(device)
    clip.to(device)
    embed = None if encoder is None else image_encoder(encoder, dataset).to(device)
    truth = has_truth(dataset)
    columns = _image_columns()
    of_patches = concept_names(PATCH_ATTRIBUTES) if truth else []
    of_images = [concept_names(IMAGE_ATTRIBUTES)[i] for i in columns] if truth else []
    collectors = {
        key: Collector(
            sae.config["latents"],
            clip.grid[0] * clip.grid[1],
            top=top,
            embed_dim=0 if embed is None else _embed_dim(embed, dataset, indices, device),
            patch_concepts=of_patches,
            image_concepts=of_images,
        )
        for key, sae in saes.items()
    }
    start = _resume(collectors, scratch or {})
    for key, sae in saes.items():
        sae.to(device)
        collectors[key].to(device)
    saved = time.monotonic()
    with in_eval_mode(saes.values()):
        for pixels, labels, found in image_batches(
            dataset, batch_size, num_workers, indices[start:]
        ):
            pixels = pixels.to(device)
            tokens = clip.prefix(clip.normalize(pixels))
            known: list[Tensor | None] = [None, None, None]
            if embed is not None:
                known[0] = embed(pixels, found)
            if truth:
                known[1] = patch_concepts(dataset, found, clip.grid[0]).to(device)
                known[2] = image_concepts(dataset, found)[:, columns].to(device)
            labels, at = labels.to(device), found.to(device)
            for key, sae in saes.items():
                group = _images_at_once(sae, tokens)
                for i in range(0, len(tokens), group):
                    part = slice(i, i + group)
                    rest = (None if x is None else x[part] for x in known)
                    collectors[key].update(sae.encode(tokens[part]), labels[part], at[part], *rest)
                collectors[key].position.fill_(bisect_right(indices, int(found[-1])))
            if progress is not None:
                progress(bisect_right(indices, int(found[-1])), len(indices))
            if scratch and time.monotonic() - saved >= save_every_seconds:
                _save(collectors, scratch)
                saved = time.monotonic()
    images = int(next(iter(collectors.values())).images)
    if not images:
        raise ValueError("none of the dataset's images could be read")
    shown = Shown(
        dataset=name,
        split=split,
        images=images,
        grid=clip.grid,
        classnames=list(dataset.classnames),
        concepts=[*of_patches, *of_images],
        image_encoder=encoder,
    )
    return {key: collector.references(shown) for key, collector in collectors.items()}


def _image_columns() -> list[int]:
    names = concept_names(IMAGE_ATTRIBUTES)
    return [i for i, name in enumerate(names) if name.split("=")[0] in _OF_IMAGES]


def _embed_dim(embed: nn.Module, dataset: Any, indices: list[int], device: torch.device) -> int:
    one = torch.zeros(1, 3, dataset.image_size, dataset.image_size, dtype=torch.uint8)
    return embed(one.to(device), torch.tensor(indices[:1])).shape[1]


def _images_at_once(sae: nn.Module, tokens: Tensor) -> int:
    return max(1, _DENSE_BYTES // (tokens.shape[1] * sae.config["latents"] * tokens.element_size()))


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
