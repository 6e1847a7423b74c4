"""The reference images of a dictionary, with statistics of each latent.

Statistics follow PatchSAE (Lim et al., ICLR 2025): frequency and mean activation of a latent, and
the label entropy of its top images.

M latents, K reference images, R sampled images, P patches of an image, V concepts, N images.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# Bins of the histogram of codes: two for each power of 2. Codes may be of any size, which is not
# known before the last image has passed.
BIN_EDGES = 2.0 ** (torch.arange(-23, 24) / 2)
BINS = len(BIN_EDGES) + 1


@dataclass(frozen=True)
class Source:
    """The images that references were collected from.

    Attributes:
        dataset, split: names.
        images: N.
        grid: (rows, columns) of patches, P in all.
        classnames: C names, by label.
        concepts: V names of the ground truth's concepts; empty where there is none.
        image_encoder: of MonoSemanticity; None: not measured.
    """

    dataset: str
    split: str
    images: int
    grid: tuple[int, int]
    classnames: list[str]
    concepts: list[str]
    image_encoder: str | None


@dataclass(frozen=True)
class References:
    """Per latent its top images and statistics, all on the CPU.

    "Active on an image" is a positive mean of the latent's codes over all tokens, class token
    included; "active on a token" a code that is not zero.

    Attributes:
        values: float32 [M, K], token means, descending; 0 where there are fewer than K.
        index: int64 [M, K], the images; -1 where there are fewer. Of equals the smaller first.
        label: int64 [M, K], their labels; -1 where there are fewer.
        maps: uint8 [M, K, P], codes on the patches: 0 not active, else ceil(255 code / scale).
        scale: float32 [M, K], the largest code on a patch of that image; 0: on none.
        class_token: float32 [M, K], the code of the first token that is no patch; 0: there is none.
        sample_values, ..., sample_class_token: the same of up to R images that are drawn uniformly
            from all that the latent is active on, by descending value.
        frequency: float32 [M], share of the images that the latent is active on.
        token_frequency: float32 [M], share of the tokens.
        strength: float32 [M], mean of the token means of the images it is active on; 0 for none.
        entropy: float32 [M], of the labels of the top images, weighted by value, in nats; NaN
            for a latent without any.
        top_label: int64 [M], the most frequent label of the top images (of equals the one with
            the larger sum of values, then the smaller); -1 for none.
        histogram: int64 [M, BINS], codes above zero of all tokens, by `BIN_EDGES`.
        monosemanticity: float32 [M], NaN for dead latents; None if not measured.
        concept: int64 [M], the concept that the latent's activity says most about, by
            `truth.bits_over_chance` among the values of the same attribute (over patches; for
            position and count over images); -1 where none stands out.
        concept_score: float32 [M], the bits of the best concept, named or not.
        concept_precision: float32 [M], of the latent's activation on what has the attribute at all,
            the share that lies on the concept; by chance it would be the concept's `base`.
        concept_covered: float32 [M], the share of all its activation that lies on what has the
            attribute.
        concept_recall: float32 [M], the share of the concept's patches (images) it is active on.
        base: float32 [V], of the patches (images) that have a concept's attribute, the share that
            shows the concept.
        leading: int64 [V, L], for each concept the latents whose activity says most about it, by
            the same bits, though another concept may be their best; -1 where there are fewer.
        leading_precision: float32 [V, L], their share as in `concept_precision`.
        source: the images.
    """

    values: Tensor
    index: Tensor
    label: Tensor
    maps: Tensor
    scale: Tensor
    class_token: Tensor
    sample_values: Tensor
    sample_index: Tensor
    sample_label: Tensor
    sample_maps: Tensor
    sample_scale: Tensor
    sample_class_token: Tensor
    frequency: Tensor
    token_frequency: Tensor
    strength: Tensor
    entropy: Tensor
    top_label: Tensor
    histogram: Tensor
    source: Source
    monosemanticity: Tensor | None = None
    concept: Tensor | None = None
    concept_score: Tensor | None = None
    concept_precision: Tensor | None = None
    concept_covered: Tensor | None = None
    concept_recall: Tensor | None = None
    base: Tensor | None = None
    leading: Tensor | None = None
    leading_precision: Tensor | None = None

    @property
    def latents(self) -> int:
        """M."""
        return len(self.frequency)

    @property
    def alive(self) -> Tensor:
        """BoolTensor [M]: active on a token at least once."""
        return self.token_frequency > 0

    def save(self, folder: Path) -> None:
        """Write `pictures.safetensors` and `pictures.json` into a folder."""
        tensors = {
            field.name: getattr(self, field.name).contiguous()
            for field in fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        save_file(tensors, folder / "pictures.safetensors")
        about = {"format": "clipsae.pictures", "version": 3, **asdict(self.source)}
        (folder / "pictures.json").write_text(json.dumps(about, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "References":
        """Read what `save` wrote."""
        about: dict[str, Any] = json.loads((folder / "pictures.json").read_text())
        known = {field.name: about[field.name] for field in fields(Source)}
        known["grid"] = tuple(known["grid"])
        return cls(**load_file(folder / "pictures.safetensors"), source=Source(**known))


def label_statistics(values: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy and most frequent label of each latent's top images.

    Args:
        values: [M, K], their weights; 0 where there is no image.
        label: LongTensor [M, K]; -1 where there is no image.

    Returns:
        float32 [M] in nats, NaN without images; LongTensor [M], -1 without images.
    """
    weights = values.double()
    same = (label[:, :, None] == label[:, None, :]) & (label >= 0)[:, None, :]  # [M, K, K]
    mass = (same * weights[:, None, :]).sum(dim=2)  # of each image's label
    total = weights.sum(dim=1, keepdim=True)
    # Summed over images, each with its own weight: - sum_images (w / W) log(mass of its label / W).
    share = mass / total
    entropy = -(weights / total * torch.where(share > 0, share, 1).log()).sum(dim=1)
    entropy = entropy.clamp(min=0)  # -0 of a single label
    # Most images first, then the larger mass, then the smaller label.
    order = label.argsort(dim=1, stable=True)
    for key in (mass, same.sum(dim=2)):
        order = order.gather(1, key.gather(1, order).argsort(dim=1, descending=True, stable=True))
    return entropy.float(), label.gather(1, order[:, :1]).squeeze(1)
