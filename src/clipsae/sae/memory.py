"""Memory for large results on a CPU: in huge pages, and used again.

The first touch of a page costs the system more than writing it, and a training step makes the
same few matrices each time: what one step gave back serves the next.
"""

import mmap
import weakref
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

_LARGE = 2**25  # bytes; smaller ones are the allocator's
_KEPT = 2**32  # bytes that are held for later, at most

_free: list[mmap.mmap] = []  # the latest last


def empty(*shape: int, like: Tensor) -> Tensor:
    """`like.new_empty(shape)`; on a CPU, where it is large, in memory that is used again."""
    size = prod(shape) * like.element_size()
    if like.device.type != "cpu" or size < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(shape)
    memory = _take(size)
    # A view of its own, held by the storage: it dies with the last tensor that uses the memory.
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
