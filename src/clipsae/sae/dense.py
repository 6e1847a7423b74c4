"""Dense tensors: their precision, memory that is used again, and passes in blocks.

On a CPU the first touch of a page costs the system more than writing it, and a training step makes
the same few large matrices each time: `empty` takes them from huge pages that the last step gave
back. A pass over all scores costs as much as it moves through memory: `elementwise` does it in
blocks that stay in the cache.
"""

import mmap
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import prod
from typing import Any

import torch
from torch import Tensor

from clipsae.sae.codes import SparseCodes

_LARGE = 2**25  # bytes; smaller ones are the allocator's
_KEPT = 2**32  # bytes that are held for later, at most
_BLOCK = 2**20  # scores

_free: list[mmap.mmap] = []  # the latest last


def at_least_float32(x: Tensor) -> Tensor:
    """x, half precision as float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def row_parts(rows: Tensor) -> tuple[Tensor, ...]:
    """Rows [M, d] in parts that stay in a CPU's cache while they are worked on."""
    return rows.split(1024 if rows.device.type == "cpu" else len(rows))


@contextmanager
def without_tf32() -> Iterator[None]:
    """Matrix products of float32 are float32 on CUDA whatever is allowed: for sums and cosines that
    are results themselves."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def empty(*shape: int, like: Tensor) -> Tensor:
    """`like.new_empty(shape)`; on a CPU, where it is large, in memory that is used again."""
    size = prod(shape) * like.element_size()
    if like.device.type != "cpu" or size < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(shape)
    memory = _take(size)
    # The storage holds this view: it dies with the last tensor that uses the memory.
    view = memoryview(memory)
    weakref.finalize(view, _give_back, memory).atexit = False
    # Its shape is set in place: of a view of it, or of one whose storage Python has seen, autograd
    # would not know that nobody else uses the memory, and not add gradients up there.
    return torch.frombuffer(view, dtype=like.dtype).resize_(shape)


def _take(size: int) -> mmap.mmap:
    # Any thread may come here, autograd's among them: each step is one operation on the list.
    for memory in reversed(_free.copy()):
        if len(memory) == size:
            with suppress(ValueError):  # another thread was faster
                _free.remove(memory)
                return memory
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _give_back(memory: mmap.mmap) -> None:
    memory.madvise(mmap.MADV_FREE)  # the system may take it, should it run short
    _free.append(memory)
    with suppress(IndexError):
        while sum(map(len, _free.copy())) > _KEPT:
            _free.pop(0)


def elementwise(
    function: Callable[..., Tensor], scores: Tensor | SparseCodes, *parameters: Tensor
) -> Tensor | SparseCodes:
    """function(scores, *parameters), with its gradients, of dense scores [..., M] or of the values
    of sparse ones.

    Args:
        function: element by element, of scores [n, M] and parameters that fit them; of the scores'
            shape and dtype. It is called again for the gradients.
        parameters: see `clipsae.sae.base.aligned`.
    """
    if isinstance(scores, SparseCodes):
        return scores.with_values(function(scores.values, *parameters))
    few = scores.numel() <= _BLOCK or scores.ndim < 2
    if few or scores.device.type != "cpu" or torch.compiler.is_compiling():
        return function(scores, *parameters)
    return _Blockwise.apply(function, scores.flatten(0, -2), *parameters).view(scores.shape)


def passing(scores: Tensor, floor: Tensor) -> Tensor:
    """1 where scores > floor, else 0, in the scores' dtype and without gradient.

    On a CPU, the product with it takes a tenth of the time of `torch.where`.
    """
    scores, floor = scores.detach(), floor.detach()
    return torch.gt(scores, floor, out=torch.empty_like(scores))


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable, scores: Tensor, *parameters: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(scores, *parameters)
        out = empty(*scores.shape, like=scores)
        for part, result in zip(_blocks(scores), _blocks(out), strict=True):
            result.copy_(function(part, *parameters))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scores, *parameters = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        copies = [p.detach().requires_grad_(n) for p, n in zip(parameters, needed, strict=True)]
        trained = [p for p in copies if p.requires_grad]
        out, sums = empty(*scores.shape, like=scores), [torch.zeros_like(p) for p in trained]
        for part, g, result in zip(_blocks(scores), _blocks(gradient), _blocks(out), strict=True):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                value = ctx.function(part, *copies)
            first, *rest = torch.autograd.grad(value, [part, *trained], g)
            result.copy_(first)
            for total, more in zip(sums, rest, strict=True):
                total += more
        found = iter(sums)
        return None, out, *(next(found) if n else None for n in needed)


def _blocks(scores: Tensor) -> tuple[Tensor, ...]:
    return scores.split(max(1, _BLOCK // scores.shape[1]))
