"""Memory that is used again: never while anything can still see it."""

import gc
import threading

import pytest
import torch

from clipsae.sae import dense
from clipsae.sae.dense import empty

LIKE = torch.zeros(1, dtype=torch.float64)
SHAPE = (2200, 2000)


@pytest.fixture(autouse=True)
def nothing_kept():
    dense._free.clear()
    yield
    dense._free.clear()


def test_memory_is_used_again_for_the_same_size_only():
    one, other = empty(*SHAPE, like=LIKE), empty(*SHAPE, like=LIKE)
    one.fill_(1)
    other.fill_(2)
    assert one.dtype == torch.float64
    assert one.is_contiguous()
    assert not one._is_view()
    assert one.sum() == SHAPE[0] * SHAPE[1]
    place = one.data_ptr()
    del one
    larger = empty(SHAPE[0] + 1, SHAPE[1], like=LIKE)
    assert larger.data_ptr() != place
    assert empty(SHAPE[1], SHAPE[0], like=LIKE).data_ptr() == place
    empty(10, 10, like=LIKE)  # small ones are the allocator's
    assert [len(memory) for memory in dense._free] == [8 * SHAPE[0] * SHAPE[1]]


@pytest.mark.parametrize(
    "alias",
    [
        lambda t: t[5],
        lambda t: t.view(-1),
        lambda t: t.detach(),
        lambda t: t.untyped_storage(),
        lambda t: t.numpy(),
        lambda t: (t.requires_grad_() * t[:1]).grad_fn,  # saves it for the backward pass
    ],
)
def test_not_while_an_alias_lives(alias):
    first = empty(*SHAPE, like=LIKE)
    place = first.data_ptr()
    kept = alias(first)
    del first
    gc.collect()
    second = empty(*SHAPE, like=LIKE)
    assert second.data_ptr() != place
    del kept, second


def test_no_more_is_kept_than_the_limit(monkeypatch):
    size = 8 * SHAPE[0] * SHAPE[1]
    monkeypatch.setattr(dense, "_KEPT", 2 * size)
    many = [empty(*SHAPE, like=LIKE) for _ in range(4)]
    assert not dense._free
    del many
    assert sum(map(len, dense._free)) == 2 * size


def test_several_threads_never_share():
    wrong = []

    def work(number: int) -> None:
        for _ in range(8):
            mine = empty(*SHAPE, like=LIKE)[:2]
            mine.fill_(number)
            if not (mine == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_autograd_accumulates_in_it():
    places = []

    class Ones(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, gradient):
            out = empty(2**12, 2**12, like=gradient).fill_(1)
            places.append(out.data_ptr())
            return out

    x = torch.zeros(2**12, 2**12, requires_grad=True)
    later, earlier = x.sum(), Ones.apply(x)  # the latest goes back first
    (later + earlier).backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))
    assert x.grad.data_ptr() == places[0]
