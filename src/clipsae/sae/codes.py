"""Sparse codes: the format that training, evaluation, metrics and pictures share.

N tokens in all, M latents, p pairs of a token and a latent. `clipsae.sae.sparse_ops` has the
products with matrices.
"""

import warnings
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor


class SparseCodes:
    """Codes [..., M] as (token, latent) pairs with a value each. All other codes are 0.

        codes = sae.encode_sparse(x)         # x [B, T, d] -> codes [B, T, M]
        sae.decode(codes, sae.input_scale(x))
        codes.values, codes.token, codes.latent        # [p] each
        codes.count(codes.values > 0.2)      # tokens per image and latent: LongTensor [B, M]
        codes.lookup(latents)                # LongTensor [B, n] -> their codes [B, T, n]
        codes[3].compact()                   # one image [T, M], a copy of 8 bytes a pair

    Args:
        values: [p]. Zeros are allowed; negative values, too.
        positions: [p], integers, token * M + latent, without duplicates. `lookup`, indexing and
            `csr` need them ascending, as `SAE.encode_sparse` and `from_dense` return them.
        shape: of the dense codes, (..., M). Tokens are counted through all but the last.
    """

    def __init__(self, values: Tensor, positions: Tensor, shape: tuple[int, ...]) -> None:
        self.values = values
        self.positions = positions
        self.shape = tuple(shape)
        self._derived: dict[str, Any] = {}

    @classmethod
    def from_dense(cls, codes: Tensor) -> "SparseCodes":
        """Of codes [..., M], without gradient."""
        flat = codes.detach().reshape(-1)
        positions = flat.nonzero()[:, 0]
        return cls(flat[positions], positions, codes.shape)

    @classmethod
    def stack(cls, parts: Sequence["SparseCodes"]) -> "SparseCodes":
        """All tokens of one or more parts [..., M], flattened: [N, M]."""
        latents, total, positions = parts[0].latents, 0, []
        for part in parts:
            positions.append(part.positions + total * latents)
            total += part.tokens
        values = torch.cat([part.values for part in parts])
        return cls(values, torch.cat(positions), (total, latents))

    def with_values(self, values: Tensor) -> "SparseCodes":
        """The same pairs with other values [p]; what was derived from the pairs is shared."""
        return self.paired(values)

    def paired(self, values: Tensor) -> "SparseCodes":
        """The same for the operations, which read no more values than there are codes."""
        new = SparseCodes(values, self.positions, self.shape)
        new._derived = self._derived
        return new

    def derived(self, name: str, make: Callable[[], Any]) -> Any:
        """make(), a function of the pairs alone (such as a sorted order), kept by name."""
        if name not in self._derived:
            self._derived[name] = make()
        return self._derived[name]

    @property
    def latents(self) -> int:
        """M."""
        return self.shape[-1]

    @property
    def tokens(self) -> int:
        """N."""
        return prod(self.shape[:-1])

    @property
    def token(self) -> Tensor:
        """Each pair's token among all N, [p]."""
        return self.derived(
            "token", lambda: torch.div(self.positions, self.latents, rounding_mode="floor")
        )

    @property
    def latent(self) -> Tensor:
        """Each pair's latent, [p]."""
        return self.derived("latent", lambda: self.positions % self.latents)

    @property
    def device(self) -> torch.device:
        return self.positions.device

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.positions.nbytes

    def __len__(self) -> int:
        return self.shape[0]

    def dense(self) -> Tensor:
        """[..., M], differentiable."""
        flat = self.values.new_zeros(prod(self.shape))
        return flat.scatter(0, self.positions.long(), self.values).view(self.shape)

    def sum(self, dtype: torch.dtype | None = None) -> Tensor:
        """The sum of all codes, a scalar."""
        return self.values.sum(dtype=dtype)

    def __mul__(self, factors: Tensor) -> "SparseCodes":
        """Times a factor for each latent [M], such as a mask."""
        return self.with_values(self.values * self.at_latent(factors))

    def at_latent(self, numbers: Tensor) -> Tensor:
        """[M] -> [p], each pair's by its latent; differentiable."""
        return numbers.index_select(0, self.latent)

    def at_token(self, numbers: Tensor) -> Tensor:
        """[N] -> [p], each pair's by its token; differentiable."""
        return numbers.index_select(0, self.token)

    def sum_tokens(self, values: Tensor) -> Tensor:
        """Sums of values [p] over each latent's tokens, [M]."""
        return values.new_zeros(self.latents).index_add_(0, self.latent, values)

    def sum_latents(self, values: Tensor) -> Tensor:
        """Sums of values [p] over each token's latents, [N]; differentiable."""
        return values.new_zeros(self.tokens).index_add(0, self.token, values)

    def sizes(self) -> Tensor:
        """Pairs of each token, [N]."""
        return torch.bincount(self.token, minlength=self.tokens)

    def ranks(self) -> Tensor:
        """Each pair's place among its token's by the size of its code, the largest 0: [p]."""
        by_size = self.values.detach().abs().argsort(descending=True, stable=True)
        order = by_size[self.token[by_size].argsort(stable=True)]
        first = self.sizes().cumsum(0) - self.sizes()
        place = torch.arange(len(order), device=order.device) - first[self.token[order]]
        return torch.empty_like(place).index_copy_(0, order, place)

    def in_parts(self, by: Tensor, edges: Sequence[int]) -> "SparseCodes":
        """Codes [N, M] divided by G - 1 edges into parts [N, G, M], 0 where a pair is in another.

        Args:
            by: whole numbers of the pairs, [p]; below the first edge is the first part.
            edges: ascending.
        """
        part, parts = self._part(by, edges), len(edges) + 1
        positions = (self.token * parts + part) * self.latents + self.latent
        return SparseCodes(self.values, positions, (self.tokens, parts, self.latents))

    @staticmethod
    def _part(by: Tensor, edges: Sequence[int]) -> Tensor:
        part = torch.zeros_like(by)
        for edge in edges:  # (a tensor of them would have to be copied to the device)
            part += by >= edge
        return part

    def overflows(self, world_size: int = 1) -> Callable[[], bool]:
        """Asks the device whether there are more codes than memory, on any rank; the answer is for
        later. Only codes whose number the host does not know can be."""
        return lambda: False

    def count(self, where: Tensor | None = None) -> Tensor:
        """Pairs of each latent, LongTensor [M] of codes [N, M], or [B, M] of codes [B, T, M];
        only those `where`, BoolTensor [p], or whose value is not 0."""
        where = self.values != 0 if where is None else where
        shape = (*self.shape[:-2], self.latents)
        return torch.bincount(self.cell[where], minlength=prod(shape)).view(shape)

    def totals(self) -> Tensor:
        """Each latent's codes summed over tokens, float64 [M], or [B, M] of codes [B, T, M].

        Sums of some hundred float32 values are then exact unless the values differ by 2^20: equal
        latents have equal totals in any order of summation.
        """
        shape = (*self.shape[:-2], self.latents)
        sums = torch.bincount(self.cell, self.values.double(), prod(shape))
        return sums.double().view(shape)  # (whole numbers, where there is nothing to add)

    @property
    def cell(self) -> Tensor:
        """Each pair's image and latent, image * M + latent; of codes [N, M] the latent, [p]."""
        if len(self.shape) == 2:
            return self.latent
        image = torch.div(self.token, self.shape[-2], rounding_mode="floor")
        return image * self.latents + self.latent

    def lookup(self, latents: Tensor) -> Tensor:
        """The codes of chosen latents: LongTensor [n] -> [..., n]; or [B, n] -> [B, T, n]."""
        token = torch.arange(self.tokens, device=latents.device).view(*self.shape[:-1], 1)
        chosen = latents if latents.ndim == 1 else latents[:, None]
        wanted = (token * self.latents + chosen).to(self.positions.dtype)
        if not len(self.positions):
            return self.values.new_zeros(wanted.shape)
        at = torch.searchsorted(self.positions, wanted).clamp_(max=len(self.positions) - 1)
        return torch.where(self.positions[at] == wanted, self.values[at], 0)

    def take(self, latents: Tensor) -> "SparseCodes":
        """Codes [N, M] of chosen latents alone, LongTensor [n], ascending: [N, n]."""
        place = latents.new_full((self.latents,), -1)
        place[latents] = torch.arange(len(latents), device=latents.device)
        column = place[self.latent]
        kept = column >= 0
        positions = self.token[kept] * len(latents) + column[kept]
        return SparseCodes(self.values[kept], positions, (self.tokens, len(latents)))

    def columns(self, latents: Tensor) -> Tensor:
        """Codes [N, M] of chosen latents, LongTensor [n] in any order: dense [N, n]. As `lookup`,
        faster where there are many tokens."""
        several, place = latents.unique(return_inverse=True)
        return self.take(several).dense()[:, place]

    def __getitem__(self, index: int | slice | Tensor) -> "SparseCodes":
        """An image, a slice of images, or those of a BoolTensor (of codes [N, M]: tokens)."""
        if isinstance(index, Tensor):
            new = index.cumsum(0) - 1
            size = prod(self.shape[1:])
            if len(self.shape) == 2:
                row = self.token
            else:
                row = torch.div(self.positions, size, rounding_mode="floor")
            kept = index[row]
            positions = self.positions[kept] + (new[row[kept]] - row[kept]) * size
            return SparseCodes(self.values[kept], positions, (int(index.sum()), *self.shape[1:]))
        if isinstance(index, int):
            start, stop, shape = index, index + 1, self.shape[1:]
        else:
            start, stop, _ = index.indices(len(self))
            shape = (max(0, stop - start), *self.shape[1:])
        size = prod(self.shape[1:])
        ends = torch.tensor([start * size, stop * size], device=self.positions.device)
        first, last = torch.searchsorted(self.positions, ends.to(self.positions.dtype)).tolist()
        return SparseCodes(
            self.values[first:last], self.positions[first:last] - start * size, shape
        )

    def view(self, *shape: int) -> "SparseCodes":
        """The same codes in another shape with the same M; (-1, M) is all tokens in one row."""
        new = self.with_values(self.values)
        new.shape = (self.tokens, *shape[1:]) if shape[0] == -1 else shape
        return new

    def compact(self) -> "SparseCodes":
        """A copy with int32 positions where they fit, that keeps no larger tensor alive."""
        small = prod(self.shape) <= torch.iinfo(torch.int32).max
        positions = self.positions.to(torch.int32 if small else torch.int64, copy=True)
        return SparseCodes(self.values.clone(), positions, self.shape)

    def nonzero(self) -> "SparseCodes":
        """Without the pairs whose value is 0."""
        kept = self.values.nonzero()[:, 0]
        if len(kept) == len(self.values):
            return self
        return SparseCodes(self.values[kept], self.positions[kept], self.shape)

    def csr(self) -> Tensor:
        """A float64 sparse CSR matrix [N, M]; for ascending positions."""
        edges = _edges(self.token, self.tokens)
        return csr(edges, self.latent, self.values.double(), self.latents)

    def by_latent(self) -> "SparseCodes":
        """The same pairs sorted by latent, and by value within one."""
        by_value = self.values.argsort(stable=True)
        order = by_value[self.latent[by_value].argsort(stable=True)]
        return SparseCodes(self.values[order], self.positions[order], self.shape)

    def latent_edges(self) -> Tensor:
        """Where each latent's pairs begin and end, LongTensor [M + 1]; of `by_latent`."""
        return self.derived("latent edges", lambda: _edges(self.latent, self.latents))


def _edges(index: Tensor, size: int) -> Tensor:
    counts = torch.bincount(index, minlength=size)
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def csr(edges: Tensor, columns: Tensor, values: Tensor, width: int) -> Tensor:
    """A sparse CSR matrix [R, width] whose row r holds the entries edges[r] .. edges[r + 1]."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        # Columns need not ascend within a row for products; checking them would cost a pass.
        return torch.sparse_csr_tensor(
            edges, columns, values, (len(edges) - 1, width), check_invariants=False
        )
