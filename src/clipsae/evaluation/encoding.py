"""Encoding a batch of images once, keeping of the dense codes only what the settings need.

B images, T tokens of an image, d width, M latents, n latents kept.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from clipsae.sae import SAE, SparseCodes

# Dense codes are [images, T, M], at the paper's size 39 MB an image: images are encoded in groups
# of this many bytes, a few times of which is in use at the peak.
_DENSE_BYTES = 256 * 2**20


_NOT_ASKED: Any = None  # a field that was not asked for


@dataclass(frozen=True)
class Encoded:
    """A batch of images without its dense codes. What was not asked for is None.

    Attributes:
        active: how many pairs (token, latent) have a code that is not zero, [groups].
        counts: LongTensor [B, M], tokens on which a latent exceeds the count threshold.
        sums: float64 [B, M], activation summed over an image's tokens.
        reconstruction: [B, T, d], by all latents.
        scale: [B, T, 1], what the reconstruction is multiplied with.
        kept: [B, T, n], codes of the latents that were given.
        own: LongTensor [B, n], the image's own largest latents.
        own_codes: [B, T, n], their codes.
        sparse: the codes that are not zero, per image.
    """

    active: Tensor
    counts: Tensor = _NOT_ASKED
    sums: Tensor = _NOT_ASKED
    reconstruction: Tensor = _NOT_ASKED
    scale: Tensor = _NOT_ASKED
    kept: Tensor = _NOT_ASKED
    own: Tensor = _NOT_ASKED
    own_codes: Tensor = _NOT_ASKED
    sparse: list[SparseCodes] = _NOT_ASKED


def encode_images(
    sae: SAE,
    x: Tensor,
    *,
    count_above: float | None = None,
    decode: bool = True,
    latents: Tensor | None = None,
    own: Callable[[Tensor], Tensor] | None = None,
    hold: bool = False,
    observe: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> Encoded:
    """Encode tokens x [B, T, d], in groups of images whose dense codes fit in memory.

    Args:
        count_above: count the tokens on which a latent's code is larger, at least 0.
        decode: also reconstruct.
        latents: LongTensor [B, n] whose codes are to be kept.
        own: picks an image's own latents from its sums, [B, M] -> [B, n].
        hold: keep the codes that are not zero.
        observe: called with tokens, reconstruction and, LongTensor [M], how many tokens each
            latent is active on, of each group.
    """
    group = max(1, _DENSE_BYTES // (x.shape[1] * sae.config["latents"] * x.element_size()))
    parts = []
    for start in range(0, len(x), group):
        tokens = x[start : start + group]
        codes = sae.encode_sparse(tokens)
        found: dict[str, Any] = {"active": torch.tensor([len(codes.values)], device=x.device)}
        if count_above is not None or own is not None:
            sums = codes.totals()
        if count_above is not None:
            found["counts"] = codes.count(codes.values > count_above)
            found["sums"] = sums
        if hold:
            found["sparse"] = [codes[i].compact() for i in range(len(tokens))]
        if decode:
            found["scale"] = sae.input_scale(tokens)
            found["reconstruction"] = sae.decode(codes, found["scale"])
        if latents is not None:
            found["kept"] = codes.lookup(latents[start : start + group])
        if own is not None:
            found["own"] = own(sums)
            found["own_codes"] = codes.lookup(found["own"])
        if observe is not None:
            fired = codes.view(-1, codes.latents).count()
            observe(tokens, found["reconstruction"], fired)
        parts.append(found)
        del codes
    return _concatenate(parts)


def _concatenate(parts: list[dict[str, Any]]) -> Encoded:
    whole: dict[str, Any] = {}
    for name in (field.name for field in fields(Encoded)):
        values = [part[name] for part in parts if name in part]
        if values:
            whole[name] = list(chain(*values)) if name == "sparse" else torch.cat(values)
    return Encoded(**whole)
