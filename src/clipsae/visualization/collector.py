"""One pass over a dataset that keeps each latent's reference images and statistics.

Memory does not depend on the number of images: K + R patch maps a latent, 193 MB for M = 49,152,
K = R = 10 and 14 x 14 patches, and half as much again where MonoSemanticity is measured.

B images, T tokens of an image, P patches, M latents, K reference images, R sampled images, V
concepts of A attributes ("colour" is one, with "colour=red" among its concepts).
"""

import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clipsae.clip import FrozenCLIP
from clipsae.evaluation.encoders import image_encoder
from clipsae.evaluation.metrics import Options
from clipsae.evaluation.metrics.monosemanticity import MonoSemanticity
from clipsae.evaluation.passes import Batch, Images, Progress, Stream, evenly_spaced, place_of
from clipsae.evaluation.ranking import top_latents
from clipsae.evaluation.truth import (
    IMAGE_ATTRIBUTES,
    PATCH_ATTRIBUTES,
    bits_over_chance,
    concept_names,
    has_truth,
)
from clipsae.sae import SAE
from clipsae.sae.dense import without_tf32
from clipsae.visualization.references import (
    BIN_EDGES,
    BINS,
    References,
    Source,
    label_statistics,
)

TOP = 10
SAMPLE = 10
LEADING = 8  # latents that are kept of each concept
NAMED = 0.2  # bits from which a concept stands out: a latent is named after it
STATE = "references.safetensors"  # of an unfinished pass
_NO_BITS = 1e-6  # rounding, of a concept that no image shows
_ROWS = 16384  # latents whose maps are moved at a time


@torch.no_grad()
def collect_references(
    clip: FrozenCLIP,
    saes: Mapping[str, SAE],
    dataset: Any,
    *,
    name: str,
    split: str,
    top: int = TOP,
    sample: int = SAMPLE,
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
        sample: R; 0: no sample.
        encoder: of MonoSemanticity (a name for `image_encoder`); None: not measured.
        device: moves the models there; None: where `clip` is.
        limit_images: that many images only, evenly spaced over the classes.
        scratch: by name a folder for the state of an unfinished pass: a later call with the same
            arguments continues from the last save.
        save_every_seconds: how often it is saved.
        progress: called with (images done, images in all, "images").

    Raises:
        ValueError: no images, `top` below 1, an encoder that cannot be loaded.
    """
    if top < 1:
        raise ValueError(f"top={top}: must be at least 1")
    indices = evenly_spaced(dataset.labels, limit_images)
    device = clip.device if device is None else torch.device(device)
    clip.to(device)
    embed = None if encoder is None else image_encoder(encoder, dataset).to(device)
    place = place_of(saes)
    if place.get("of") == "cls":
        raise ValueError("an SAE of the class token alone has no patches, and so no pictures of it")
    stream = Stream(
        clip,
        dataset,
        indices,
        encoder=embed,
        batch_size=batch_size,
        num_workers=num_workers,
        **place,
    )
    of_patches, of_images = [], []
    if has_truth(dataset):
        known = PATCH_ATTRIBUTES if clip.has_patches else ()
        of_patches = concept_names(known)
        of_images = concept_names([a for a in IMAGE_ATTRIBUTES if a not in known])
    embed_dim = stream.embed_dim
    collectors = {
        key: Collector(
            sae,
            clip.grid[0] * clip.grid[1],
            top=top,
            sample=sample,
            embed_dim=embed_dim,
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

    def each(images: Images) -> None:
        nonlocal saved
        position = bisect_right(indices, int(images.indices[-1]))
        for collector in collectors.values():
            collector.position.fill_(position)
        if progress is not None:
            progress(position, len(indices), "images")
        if scratch and time.monotonic() - saved >= save_every_seconds:
            _save(collectors, scratch)
            saved = time.monotonic()

    stream.run(saes, lambda key, batch: collectors[key].update(batch), indices[start:], each=each)
    images = int(next(iter(collectors.values())).images)
    if not images:
        raise ValueError("none of the dataset's images could be read")
    source = Source(
        dataset=name,
        split=split,
        images=images,
        grid=clip.grid,
        classnames=list(dataset.classnames),
        concepts=[*of_patches, *of_images],
        image_encoder=encoder,
    )
    return {key: collector.references(source) for key, collector in collectors.items()}


def _save(collectors: dict[str, "Collector"], scratch: Mapping[str, Path]) -> None:
    for key, collector in collectors.items():
        aside = scratch[key] / f".{STATE}"
        state = {k: v.cpu().contiguous() for k, v in collector.state_dict().items()}
        save_file(state, aside)
        aside.replace(scratch[key] / STATE)


def _resume(collectors: dict[str, "Collector"], scratch: Mapping[str, Path]) -> int:
    """Load what was saved and return the position to continue from; 0 unless all states are there,
    of one position and of this version."""
    files = [scratch[key] / STATE for key in collectors if key in scratch]
    if len(files) < len(collectors) or not all(file.is_file() for file in files):
        return 0
    states = [load_file(file) for file in files]
    pairs = list(zip(collectors.values(), states, strict=True))
    known = all(state.keys() == collector.state_dict().keys() for collector, state in pairs)
    if not known or len({int(state["position"]) for state in states}) > 1:
        return 0
    for collector, state in pairs:
        collector.load_state_dict(state)
    return int(states[0]["position"])


class Collector(nn.Module):
    """The references of one SAE from the images so far; its buffers are the state of the pass.

    Args:
        patches, top, sample: P, K and R.
        embed_dim: of the separate image encoder; 0: MonoSemanticity is not measured.
        patch_concepts: names of the columns of a batch's `patch_truth`, "attribute=value", those of
            an attribute side by side; none without ground truth or patches.
        image_concepts: of the last columns of its `image_truth`.
    """

    def __init__(
        self,
        sae: SAE,
        patches: int,
        *,
        top: int = TOP,
        sample: int = SAMPLE,
        embed_dim: int = 0,
        patch_concepts: Sequence[str] = (),
        image_concepts: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.latents = latents = sae.config["latents"]
        self.patches = patches
        for name in ("position", "images", "tokens"):  # position: in the list of images
            self.register_buffer(name, torch.zeros((), dtype=torch.long))
        self.strongest = Examples(latents, top, patches, torch.float)
        self.sample = Examples(latents, sample, patches, torch.long)
        for name in ("active_images", "active_tokens"):
            self.register_buffer(name, torch.zeros(latents, dtype=torch.long))
        self.register_buffer("strength", torch.zeros(latents, dtype=torch.float64))
        self.register_buffer("histogram", torch.zeros(latents, BINS, dtype=torch.long))
        self.on_patches = ConceptSums(latents, patch_concepts)
        self.on_images = ConceptSums(latents, image_concepts)
        self.monosemanticity = None
        if embed_dim:
            self.monosemanticity = MonoSemanticity(sae, Options(0, 0, embed_dim))
            self.monosemanticity.persistent(True)

    def update(self, batch: Batch) -> None:
        """Add images, in ascending order of their indices over all calls."""
        means, codes = batch.pooled, batch.codes
        active = means > 0
        self.images += len(codes)
        self.tokens += codes.shape[:2].numel()
        self.active_images += active.sum(dim=0)
        self.strength += (means * active).double().sum(dim=0)
        self.active_tokens += batch.fired
        values = batch.sparse.values
        positive = values > 0
        bins = torch.bucketize(values[positive].float(), BIN_EDGES.to(values.device), right=True)
        cells = batch.sparse.latent[positive] * BINS + bins
        self.histogram.view(-1).index_add_(0, cells, torch.ones_like(cells))
        if self.monosemanticity is not None:
            self.monosemanticity.update(batch)
        if self.on_patches.attribute:
            patches = codes[:, -self.patches :].flatten(0, 1)
            self.on_patches.update(patches, batch.patch_truth.flatten(0, 1))
        if self.on_images.attribute:
            self.on_images.update(means, batch.image_truth[:, -len(self.on_images.attribute) :])
        self.strongest.update(means.clamp(min=0), batch)
        self.sample.update(draw(batch.indices.to(means.device), active), batch)

    def references(self, source: Source) -> References:
        """The result, on the CPU. `source` says how many images there were."""
        images = self.images.double()
        top = self.strongest.found()
        entropy, top_label = label_statistics(top["values"], top["label"])
        strength = self.strength / self.active_images.clamp(min=1)
        found = {
            **top,
            **{f"sample_{name}": value for name, value in self.sample.found().items()},
            "histogram": self.histogram,
            "frequency": (self.active_images / images).float(),
            "token_frequency": (self.active_tokens / self.tokens).float(),
            "strength": strength.float(),
            "entropy": entropy,
            "top_label": top_label,
        }
        if self.monosemanticity is not None:
            found["monosemanticity"] = self.monosemanticity.scores().float()
        if self.on_images.attribute:
            found |= self._concepts()
        return References(**{name: value.cpu() for name, value in found.items()}, source=source)

    def _concepts(self) -> dict[str, Tensor]:
        """The concepts of `References`, from the sums of both levels."""
        known = [level for level in (self.on_patches, self.on_images) if level.attribute]
        levels = [level.scores() for level in known]
        bits, precision, recall, covered, base = (
            torch.cat(parts, dim=-1) for parts in zip(*levels, strict=True)
        )
        leading = top_latents(bits.T.contiguous(), min(LEADING, self.latents))
        led = bits.T.gather(1, leading)
        best = top_latents(bits, 1)
        score, share, found, lies = (
            x.gather(1, best).squeeze(1).float() for x in (bits, precision, recall, covered)
        )
        return {
            "leading": leading.masked_fill(led < _NO_BITS, -1),
            "leading_precision": precision.T.gather(1, leading).float(),
            "base": base.float(),
            "concept": best.squeeze(1).masked_fill(score < NAMED, -1),
            "concept_score": score,
            "concept_precision": share,
            "concept_recall": found,
            "concept_covered": lies,
        }


class Examples(nn.Module):
    """For each latent the n images with the largest keys above 0, with what is shown of them.

    Args:
        patches: P.
        dtype: of keys.
    """

    def __init__(self, latents: int, n: int, patches: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.patches = patches
        self.register_buffer("key", torch.zeros(latents, n, dtype=dtype))
        for name in ("index", "label"):
            self.register_buffer(name, torch.full((latents, n), -1))
        for name in ("values", "scale", "class_token"):
            self.register_buffer(name, torch.zeros(latents, n))
        self.register_buffer("maps", torch.zeros(latents, n, patches, dtype=torch.uint8))

    def update(self, key: Tensor, batch: Batch) -> None:
        """Add images with keys [B, M], at least 0. Of equals those stay that came first."""
        if not self.key.shape[1]:
            return
        entering = (key.amax(dim=0) > self.key[:, -1]).nonzero().squeeze(1)
        for rows in entering.split(_ROWS):
            self._enter(rows, key, batch)

    def _enter(self, rows: Tensor, key: Tensor, batch: Batch) -> None:
        """Merge the new images into those of the latents `rows`."""
        n = self.key.shape[1]
        keys = torch.cat((self.key[rows], key[:, rows].T), dim=1)
        order = keys.sort(dim=1, descending=True, stable=True).indices[:, :n]
        fresh = order >= n
        row, slot = fresh.nonzero(as_tuple=True)
        image = order[fresh] - n
        codes = batch.codes[image, :, rows[row]].float()  # [entries, T]
        quantised, scale = quantise(codes[:, -self.patches :])
        has_class_token = codes.shape[1] > self.patches
        for name, new in (
            ("index", batch.indices.to(rows.device)[image]),
            ("label", batch.labels.to(rows.device)[image]),
            ("values", batch.pooled[image, rows[row]].clamp(min=0)),
            ("scale", scale),
            ("class_token", codes[:, 0] * has_class_token),
            ("maps", quantised),
        ):
            state = getattr(self, name)
            moved = state[rows[:, None], order.clamp(max=n - 1)]
            moved[row, slot] = new
            state[rows] = moved
        self.key[rows] = keys.gather(1, order)

    def found(self) -> dict[str, Tensor]:
        """`values`, `index`, `label`, `maps`, `scale` and `class_token` as in `References`, by
        descending values; of equals the smaller index first."""
        order = self.index.argsort(dim=1, stable=True)
        values = self.values.gather(1, order)
        order = order.gather(1, values.argsort(dim=1, descending=True, stable=True))
        rows = torch.arange(len(order), device=order.device)[:, None]
        names = ("values", "index", "label", "maps", "scale", "class_token")
        return {name: getattr(self, name)[rows, order] for name in names}


class ConceptSums(nn.Module):
    """How the activation of each latent lies on the concepts of a level: of patches, or of images.

    Args:
        names: "attribute=value", those of an attribute side by side.
    """

    def __init__(self, latents: int, names: Sequence[str]) -> None:
        super().__init__()
        kinds = [name.split("=")[0] for name in names]
        order = list(dict.fromkeys(kinds))
        self.attribute = [order.index(kind) for kind in kinds]
        self.sizes = [kinds.count(kind) for kind in order]
        # Columns of each concept, and behind them of each attribute: rows with any of its values.
        size, double = len(names) + len(order), torch.float64
        self.register_buffer("truth", torch.zeros(size, dtype=torch.long))
        self.register_buffer("hits", torch.zeros(latents, size, dtype=torch.long))
        self.register_buffer("mass", torch.zeros(latents, size, dtype=double))
        self.register_buffer("squares", torch.zeros(latents, len(order), dtype=double))
        self.register_buffer("total", torch.zeros(latents, dtype=double))

    @without_tf32()
    def update(self, values: Tensor, truth: Tensor) -> None:
        """Codes [n, M] and truth [n, V]; float32 counts are exact below 2^24 rows."""
        values = values.float().clamp(min=0)
        parts = truth.split(self.sizes, dim=1)
        has = torch.stack([part.any(dim=1) for part in parts], dim=1)
        columns = torch.cat((truth, has), dim=1).float()
        self.hits += ((values > 0).float().T @ columns).long()
        self.mass += values.T @ columns
        self.squares += values.square().T @ has.float()
        self.total += values.sum(dim=0)
        self.truth += columns.long().sum(dim=0)

    def scores(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Bits, precision, recall and covered share [M, V] as in `References`, and base [V]."""
        v = len(self.attribute)
        with_attribute = self.mass[:, v:][:, self.attribute]
        base = self.truth[:v] / self.truth[v:][self.attribute].clamp(min=1)
        squares = self.squares[:, self.attribute]
        covered = with_attribute / self.total.clamp(min=1e-300)[:, None]
        precision, bits = bits_over_chance(self.mass[:, :v], with_attribute, squares, base)
        recall = self.hits[:, :v] / self.truth[:v].clamp(min=1)
        return covered * bits, precision, recall, covered, base


def draw(indices: Tensor, active: Tensor) -> Tensor:
    """Random numbers of images and latents, to draw a sample of the images of each latent.

    They are a hash (the finaliser of SplitMix64, Steele et al. 2014) of the two, the same in any
    batch, order and device: the images with the R largest of a latent are a uniform sample.

    Args:
        indices: of the images, LongTensor [B].
        active: BoolTensor [B, M].

    Returns:
        LongTensor [B, M], 1 to 2^62 where active, else 0.
    """
    image, latent = active.nonzero(as_tuple=True)
    x = indices[image] * active.shape[1] + latent + 1
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    drawn = torch.zeros_like(active, dtype=torch.long)
    drawn[image, latent] = (x & ((1 << 62) - 1)) + 1
    return drawn


def quantise(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Codes on patches [n, P] -> uint8 [n, P] and the scale [n], the largest code.

    0 is not active (or negative), else ceil(255 code / scale): what is active stays visible.
    """
    codes = codes.float().clamp(min=0)
    scale = codes.amax(dim=1)
    share = codes / torch.where(scale > 0, scale, 1)[:, None]
    return (share * 255).ceil().clamp(max=255).to(torch.uint8), scale
