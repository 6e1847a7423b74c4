"""Samples of codes: what is drawn, in which order, and what is dropped beyond a bound."""

import logging
import random
import warnings

import pytest
import torch
from torch import distributed, multiprocessing

from clipsae.evaluation.metrics.cknna import CKNNA, cknna
from clipsae.evaluation.metrics.monosemanticity import MonoSemanticity, monosemanticity
from clipsae.evaluation.metrics.sample import CodeSample, Draw, _hash
from clipsae.sae import SparseCodes
from tests.evaluation.made_up import batch_of, options, sizes

N, M = 600, 30


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """What is beside the rows, and their codes, some rows without any."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(N, M, generator=generator).relu()
    codes[::7] = 0
    return torch.randn(N, 3, generator=generator), codes


def sample(*parts: slice, limit: int = 10**9) -> CodeSample:
    metric = CodeSample("a metric", "rows", M, torch.empty(0, 3), lambda rows, pairs: pairs > limit)
    beside, codes = rows()
    for part in parts:
        numbers = torch.arange(N)[part]
        metric.update(numbers, beside[part], SparseCodes.from_dense(codes[part]))
    return metric


def same(found, kept=slice(None)) -> None:
    beside, codes = rows()
    assert torch.equal(found[0], beside[kept])
    assert torch.equal(found[1].dense(), codes[kept])


def test_rows_are_in_the_order_of_their_numbers(caplog, merged):
    with caplog.at_level(logging.INFO, "clipsae"):
        metric = sample(slice(400, N), slice(0, 1), slice(1, 400))
        same(metric.compute())
        assert metric.compared is None
        metric.reset()
        assert [len(part) for part in metric.compute()] == [0, 0]
        same(merged(sample(slice(500, N)), sample(), sample(slice(0, 500))))
    assert not caplog.records


def test_beyond_the_bound_a_part_is_kept_that_the_numbers_decide(caplog, merged):
    limit = int((rows()[1] != 0).sum()) // 3
    parts = [slice(start, start + 70) for start in range(0, N, 70)]
    metric = sample(*parts, limit=limit)
    assert sum(map(len, metric.values)) <= limit
    kept = _hash(torch.arange(N)) < 2**29  # a quarter
    with caplog.at_level(logging.INFO, "clipsae"):
        same(metric.compute(), kept)
    assert metric.compared == kept.sum()
    assert f"a metric compares {int(kept.sum())} of {N} rows" in caplog.text
    # Of processes that dropped more or less.
    one, other = sample(slice(70, N), limit=limit), sample(slice(0, 70), limit=limit)
    assert int(one.halvings) == 2 > int(other.halvings) == 0
    same(merged(one, other), kept)


@pytest.mark.parametrize("halvings", [1, 5])
@pytest.mark.parametrize("period", [1, 2, 196])
def test_rows_are_dropped_evenly_wherever_they_lie(halvings, period):
    kept = (_hash(torch.arange(period * 20_000)) < 2**31 >> halvings).double()
    share = kept.view(-1, period).mean(dim=0)
    expected = 0.5**halvings
    error = (expected * (1 - expected) / 20_000) ** 0.5
    assert ((share - expected).abs() < 5 * error).all()


@pytest.mark.parametrize(("each", "size"), [(1, 12), (5, 12), (5, 1000)])
def test_what_is_drawn_depends_on_positions_alone(each, size):
    total = 20 * each
    drawn = sorted(random.Random(3).sample(range(total), min(size, total)))
    positions = torch.tensor([7, 3, 19, 0])
    found, numbers = Draw(20, each, size, 3).among(positions)
    expected = [(i, p * each + t) for i, p in enumerate(positions.tolist()) for t in range(each)]
    expected = [(i * each + at % each, drawn.index(at)) for i, at in expected if at in drawn]
    assert list(zip(found.tolist(), numbers.tolist(), strict=True)) == expected


def _work(rank, store):
    warnings.simplefilter("ignore")  # torchmetrics: compute before update
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=3)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator)
    codes = torch.relu(torch.randn(50, 14, generator=generator) - 0.5)
    aligned = CKNNA(sizes(14, 6), options(k=4))
    mono = MonoSemanticity(sizes(14), options(embed_dim=6))
    mine = (slice(20, 50), None, slice(0, 20))[rank]
    if mine is not None:
        batch = batch_of(codes[mine], mine.start, tokens=x[mine], embeddings=x[mine])
        aligned.update(batch)
        mono.update(batch)
    assert torch.allclose(aligned.compute()["cknna"], cknna(x, codes, 4))
    mono.compute()
    scores = monosemanticity(codes, x)
    assert torch.allclose(mono.per_latent["monosemanticity"], scores, equal_nan=True)
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods() or torch.cuda.is_initialized(),
    reason="processes are forked, which a used GPU does not survive",
)
def test_three_processes_one_of_which_has_seen_nothing(tmp_path):
    store = f"file://{tmp_path / 'store'}"
    multiprocessing.start_processes(_work, args=(store,), nprocs=3, start_method="fork")
