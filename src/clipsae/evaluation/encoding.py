"""Encoding a batch of images once, keeping of the dense codes only what the settings need.

B images, T tokens of an image, d width, M latents, n latents kept.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from clipsae.sae import SAE

# Dense codes are [images, T, M], at the paper's size 39 MB an image: images are encoded in groups
# of this many bytes, a few times of which is in use at the peak.
_DENSE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class SparseCodes:
    """The codes of one image that are not zero.

    Attributes:
        keys: token * M + latent, ascending; int32 [active].
        values: the codes, [active].
        tokens, latents: T, M.
    """

    keys: Tensor
    values: Tensor
    tokens: int
    latents: int

    def of(self, chosen: Tensor) -> Tensor:
        """The codes of some latents: LongTensor [n] -> [T, n]."""
        if not len(self.keys):
            return self.values.new_zeros(self.tokens, len(chosen))
        first = torch.arange(self.tokens, device=chosen.device)[:, None] * self.latents
        wanted = (first + chosen).to(self.keys.dtype)
        at = torch.searchsorted(self.keys, wanted).clamp_(max=len(self.keys) - 1)
        return torch.where(self.keys[at] == wanted, self.values[at], 0)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


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
        shape = torch.Size((*tokens.shape[:2], sae.config["latents"]))
        held = sae.encode_held(tokens)
        keys, values = _not_zero(held)
        found: dict[str, Any] = {"active": torch.tensor([len(keys)], device=x.device)}
        if count_above is not None or own is not None:
            sums = _per_latent(keys, shape, weights=values.double())
        if count_above is not None:
            found["counts"] = _per_latent(keys[values > count_above], shape)
            found["sums"] = sums
        sparse = _by_image(keys, values, shape)
        if hold:
            found["sparse"] = sparse
        if decode:
            found["scale"] = sae.input_scale(tokens)
            found["reconstruction"] = sae.decode_held(held, found["scale"])
        if latents is not None:
            found["kept"] = _codes_of(sparse, latents[start : start + group])
        if own is not None:
            found["own"] = own(sums)
            found["own_codes"] = _codes_of(sparse, found["own"])
        if observe is not None:
            fired = torch.bincount(keys % shape[2], minlength=shape[2])
            observe(tokens, found["reconstruction"], fired)
        parts.append(found)
        del held
    return _concatenate(parts)


def _not_zero(held: Any) -> tuple[Tensor, Tensor]:
    """Keys (image * T + token) * M + latent, ascending, and values of codes that are not zero."""
    if isinstance(held, Tensor):
        keys = held.reshape(-1).nonzero().squeeze(1)
        return keys, held.reshape(-1)[keys]
    some = held.values.nonzero().squeeze(1)
    if len(some) == len(held.values):
        return held.support.positions, held.values
    return held.support.positions[some], held.values[some]


def _per_latent(keys: Tensor, shape: torch.Size, weights: Tensor | None = None) -> Tensor:
    """Number, or sum of float64 weights, of an image's keys for each latent: [images, M].

    float64 sums of some hundred float32 values are exact unless the values differ by 2^20: equal
    latents have equal sums in whatever order a device adds.
    """
    images, tokens, latents = shape
    cells = keys // (tokens * latents) * latents + keys % latents
    return torch.bincount(cells, weights, minlength=images * latents).view(images, latents)


def _by_image(keys: Tensor, values: Tensor, shape: torch.Size) -> list[SparseCodes]:
    images, tokens, latents = shape
    edges = torch.arange(1, images, device=keys.device) * (tokens * latents)
    sizes = torch.searchsorted(keys, edges).tolist()
    inside = (keys % (tokens * latents)).to(torch.int32)
    # Copies, so that an image that is no longer held frees its memory.
    return [
        SparseCodes(k.clone(), v.clone(), tokens, latents)
        for k, v in zip(inside.tensor_split(sizes), values.tensor_split(sizes), strict=True)
    ]


def _codes_of(sparse: list[SparseCodes], latents: Tensor) -> Tensor:
    """[B, T, n] of latents [B, n]."""
    return torch.stack([codes.of(chosen) for codes, chosen in zip(sparse, latents, strict=True)])


def _concatenate(parts: list[dict[str, Any]]) -> Encoded:
    whole: dict[str, Any] = {}
    for name in (field.name for field in fields(Encoded)):
        values = [part[name] for part in parts if name in part]
        if values:
            whole[name] = list(chain(*values)) if name == "sparse" else torch.cat(values)
    return Encoded(**whole)
