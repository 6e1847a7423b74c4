"""What a stream of images leaves behind of each latent: its top images, and sums.

Memory does not depend on the number of images: K patch maps a latent, 96 MB for M = 49,152, K = 10
and 14 x 14 patches, and as much again where MonoSemanticity is measured.

B images, T tokens of an image, P = T - 1 patches, M latents, K reference images, V concepts of A
attributes ("colour" is one, with "colour=red" among its concepts).
"""

from collections.abc import Sequence
from math import log

import torch
from torch import Tensor, nn

from clipsae.evaluation.metrics import Options
from clipsae.evaluation.metrics.monosemanticity import MonoSemanticity
from clipsae.evaluation.passes import Batch
from clipsae.evaluation.ranking import top_latents
from clipsae.sae import SAE
from clipsae.visualization.references import (
    BIN_EDGES,
    BINS,
    References,
    Shown,
    label_statistics,
)

TOP = 10
LEADING = 8  # latents that are kept of each concept
NAMED = 0.2  # bits from which a concept stands out: a latent is named after it
_NO_BITS = 1e-6  # rounding, of a concept that no image shows
_ROWS = 16384  # latents whose maps are moved at a time


def quantise(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Codes on patches [n, P] -> uint8 [n, P] and the scale [n], the largest code.

    0 is not active (or negative), else ceil(255 code / scale): what is active stays visible.
    """
    codes = codes.float().clamp(min=0)
    scale = codes.amax(dim=1)
    share = codes / torch.where(scale > 0, scale, 1)[:, None]
    return (share * 255).ceil().clamp(max=255).to(torch.uint8), scale


class Collector(nn.Module):
    """What is kept of the images that have passed, for one SAE.

    A module, so that its buffers are its state: saved and loaded, it goes on where it was.

    Args:
        sae: whose M latents these are.
        patches: P.
        top: K.
        embed_dim: of the separate image encoder; 0: MonoSemanticity is not measured.
        patch_concepts, image_concepts: the concepts that are known of patches and of images, named
            "attribute=value", those of an attribute side by side.
        image_columns: where `image_concepts` are among the columns of a batch's `image_truth`;
            None: they are all.
    """

    def __init__(
        self,
        sae: SAE,
        patches: int,
        *,
        top: int = TOP,
        embed_dim: int = 0,
        patch_concepts: Sequence[str] = (),
        image_concepts: Sequence[str] = (),
        image_columns: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.latents = latents = sae.config["latents"]
        self.patches, self.top = patches, top
        self.image_columns = slice(None) if image_columns is None else list(image_columns)
        long = {"dtype": torch.long}
        self.register_buffer("position", torch.zeros((), **long))  # in the list of images
        self.register_buffer("images", torch.zeros((), **long))
        self.register_buffer("tokens", torch.zeros((), **long))
        self.register_buffer("values", torch.zeros(latents, top))
        self.register_buffer("index", torch.full((latents, top), -1))
        self.register_buffer("label", torch.full((latents, top), -1))
        self.register_buffer("scale", torch.zeros(latents, top))
        self.register_buffer("class_token", torch.zeros(latents, top))
        self.register_buffer("maps", torch.zeros(latents, top, patches, dtype=torch.uint8))
        self.register_buffer("active_images", torch.zeros(latents, **long))
        self.register_buffer("active_tokens", torch.zeros(latents, **long))
        self.register_buffer("strength", torch.zeros(latents, dtype=torch.float64))
        self.register_buffer("histogram", torch.zeros(latents, BINS, **long))
        self.attributes: dict[str, list[int]] = {}  # at each level, the attribute of each concept
        for level, names in (("patch", patch_concepts), ("image", image_concepts)):
            kinds = [name.split("=")[0] for name in names]
            order = list(dict.fromkeys(kinds))
            self.attributes[level] = [order.index(kind) for kind in kinds]
            # Of each concept, and behind those of each attribute: the rows that have any of its
            # values.
            size, double = len(names) + len(order), {"dtype": torch.float64}
            self.register_buffer(f"{level}_truth", torch.zeros(size, **long))
            self.register_buffer(f"{level}_hits", torch.zeros(latents, size, **long))
            self.register_buffer(f"{level}_mass", torch.zeros(latents, size, **double))
            self.register_buffer(f"{level}_squares", torch.zeros(latents, len(order), **double))
            self.register_buffer(f"{level}_total", torch.zeros(latents, **double))
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
        if self.attributes["patch"]:
            patches = codes[:, -self.patches :]
            self._count_hits("patch", patches.flatten(0, 1), batch.patch_truth.flatten(0, 1))
            self._count_hits("image", means, batch.image_truth[:, self.image_columns])
        # Against an equal value the earlier image stays, which has the smaller index.
        entering = (means.amax(dim=0) > self.values[:, -1]).nonzero().squeeze(1)
        labels, indices = batch.labels.to(means.device), batch.indices.to(means.device)
        for rows in entering.split(_ROWS):
            self._enter(rows, means, codes, labels, indices)

    def _count_hits(self, level: str, values: Tensor, truth: Tensor) -> None:
        """Values [n, M] and truth [n, V]; float32 counts are exact below 2^24 rows."""
        values, has = values.float().clamp(min=0), _any_value(truth, self.attributes[level])
        of = torch.cat((truth, has), dim=1).float()
        getattr(self, f"{level}_hits").add_(((values > 0).float().T @ of).long())
        getattr(self, f"{level}_mass").add_(values.T @ of)
        getattr(self, f"{level}_squares").add_(values.square().T @ has.float())
        getattr(self, f"{level}_total").add_(values.sum(dim=0))
        getattr(self, f"{level}_truth").add_(of.long().sum(dim=0))

    def _enter(
        self, rows: Tensor, means: Tensor, codes: Tensor, labels: Tensor, indices: Tensor
    ) -> None:
        """Merge the new images into the top of the latents `rows`."""
        top, n = self.top, len(rows)
        values = torch.cat((self.values[rows], means[:, rows].T.clamp(min=0)), dim=1)
        order = values.sort(dim=1, descending=True, stable=True).indices[:, :top]
        fresh = order >= top
        row, slot = fresh.nonzero(as_tuple=True)
        image = order[fresh] - top
        found = codes[image, :, rows[row]]  # [entries, T]
        quantised, scale = quantise(found[:, -self.patches :])
        first = found[:, 0].float()
        class_token = first if found.shape[1] > self.patches else torch.zeros_like(first)
        for name, new in (
            ("index", indices[image]),
            ("label", labels[image]),
            ("scale", scale),
            ("class_token", class_token),
            ("maps", quantised),
        ):
            state = getattr(self, name)
            at = order.clamp(max=top - 1)
            if name == "maps":
                at = at[:, :, None].expand(n, top, self.patches)
            moved = state[rows].gather(1, at)
            moved[row, slot] = new
            state[rows] = moved
        self.values[rows] = values.gather(1, order)

    def references(self, shown: Shown) -> References:
        """The result, on the CPU. `shown` says how many images there were."""
        images = self.images.double()
        entropy, top_label = label_statistics(self.values, self.label)
        strength = self.strength / self.active_images.clamp(min=1)
        found = {
            **{name: getattr(self, name) for name in ("values", "index", "label", "maps")},
            **{name: getattr(self, name) for name in ("scale", "class_token", "histogram")},
            "frequency": (self.active_images / images).float(),
            "token_frequency": (self.active_tokens / self.tokens).float(),
            "strength": strength.float(),
            "entropy": entropy,
            "top_label": top_label,
        }
        if self.monosemanticity is not None:
            found["monosemanticity"] = self.monosemanticity.scores().float()
        if self.attributes["patch"]:
            found |= self._best_concept()
        return References(**{name: value.cpu() for name, value in found.items()}, shown=shown)

    def _best_concept(self) -> dict[str, Tensor]:
        """What `References` says of concepts, from the sums of both levels."""
        precision, base, bits, recall, covered = [], [], [], [], []
        for level, attribute in self.attributes.items():
            truth, mass = getattr(self, f"{level}_truth"), getattr(self, f"{level}_mass")
            v = len(attribute)
            own, rows = mass[:, v:][:, attribute], truth[v:][attribute]
            squares = getattr(self, f"{level}_squares")[:, attribute]
            share = own / getattr(self, f"{level}_total").clamp(min=1e-300)[:, None]
            chance = truth[:v] / rows.clamp(min=1)
            p, gain = bits_over_chance(mass[:, :v], own, squares, chance)
            precision.append(p)
            base.append(chance)
            bits.append(share * gain)
            covered.append(share)
            recall.append(getattr(self, f"{level}_hits")[:, :v] / truth[:v].clamp(min=1))
        score, share = torch.cat(bits, dim=1), torch.cat(precision, dim=1)
        leading = top_latents(score.T.contiguous(), min(LEADING, self.latents))
        led = score.T.gather(1, leading)
        best = top_latents(score, 1)

        def of_best(parts: list[Tensor]) -> Tensor:
            return torch.cat(parts, dim=1).gather(1, best).squeeze(1).float()

        named = of_best(bits) >= NAMED
        return {
            "leading": leading.masked_fill(led < _NO_BITS, -1),
            "leading_precision": share.T.gather(1, leading).float(),
            "base": torch.cat(base).float(),
            "concept": best.squeeze(1).masked_fill(~named, -1),
            "concept_score": of_best(bits),
            "concept_precision": of_best(precision),
            "concept_recall": of_best(recall),
            "concept_covered": of_best(covered),
        }


def _any_value(truth: Tensor, attribute: list[int]) -> Tensor:
    """Which rows have any value of each attribute: bool [n, V] -> [n, A]."""
    sizes = [attribute.count(a) for a in dict.fromkeys(attribute)]
    return torch.stack([part.any(dim=1) for part in truth.split(sizes, dim=1)], dim=1)


def bits_over_chance(
    mass: Tensor, total: Tensor, squares: Tensor, base: Tensor
) -> tuple[Tensor, Tensor]:
    """How much of a latent's activation lies where a concept is, and what that says.

    A concept is compared with its siblings: of "size=large" the question is not whether a latent
    lies on large objects rather than on the background, which every latent of objects does, but
    whether it does so rather than on small ones. With p the share of the latent's activation on the
    rows (patches, images) with any size that lies on large ones, and b the share of those rows
    that are large, the score is the divergence

        D(p || b) = p log2(p / b) + (1 - p) log2((1 - p) / (1 - b))   where p > b,

    the bits that one learns of the concept from where the latent is active. The lift p / b alone
    would prefer what is rare (20 % where chance gives 2 %) to what the latent is nearly always on
    (95 % where chance gives 15 %), and p - b what is common. Unlike AUROC it does not depend on how
    often the latent is active: those of a large dictionary are rarer than their concepts.

    Few observations count for less: of p the lower end of Wilson's interval (z = 2) is taken, with
    Kish's effective number of observations, total^2 / squares.

    Args:
        mass: [M, V], activation summed over the rows that show the concept.
        total, squares: [M, V], activation and its square summed over the rows that have the
            concept's attribute.
        base: [V], share of those rows that show the concept.

    Returns:
        p and the bits, float64 [M, V]; both 0 for latents that are never active there, the bits
        for concepts that all or none of those rows have.
    """
    z2 = 4.0
    p = mass / torch.where(total > 0, total, 1)
    n = (total.square() / torch.where(squares > 0, squares, 1)).clamp(min=1e-9)
    spread = (z2 * (p * (1 - p)).clamp(min=0) / n + z2**2 / (4 * n**2)).sqrt()
    low = ((p + z2 / (2 * n) - spread) / (1 + z2 / n)).clamp(0, 1)
    bits = (torch.xlogy(low, low / base) + torch.xlogy(1 - low, (1 - low) / (1 - base))) / log(2)
    said = (total > 0) & (low > base) & (base > 0) & (base < 1)
    return p, torch.where(said, bits, 0)
