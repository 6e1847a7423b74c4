"""The real reduction over processes, one of which has seen nothing."""

import warnings

import pytest
import torch
from torch import distributed, multiprocessing

from clipsae.evaluation.metrics import (
    CKNNA,
    ConceptRecovery,
    MonoSemanticity,
    cknna,
    concept_recovery,
    monosemanticity,
)


def _work(rank, store):
    warnings.simplefilter("ignore")  # torchmetrics: compute before update
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=3)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator)
    codes = torch.relu(torch.randn(50, 14, generator=generator) - 0.5)
    truth = torch.rand(50, 3, generator=generator) < 0.4
    aligned, mono, found = (
        CKNNA(6, 14, k=4, batch_rows=50),
        MonoSemanticity(14, 6),
        ConceptRecovery(14, 3),
    )
    mine = (slice(0, 20), None, slice(20, 50))[rank]
    if mine is not None:
        aligned.update(x[mine], codes[mine])
        mono.update(codes[mine], x[mine])
        found.update(codes[mine], truth[mine])
    assert torch.allclose(aligned.compute(), cknna(x, codes, 4))
    scores = monosemanticity(codes, x)
    assert torch.allclose(mono.compute()["scores"], scores, equal_nan=True)
    expected = concept_recovery(codes, truth)
    for name, value in found.compute().items():
        assert torch.equal(value.nan_to_num(-9), expected[name].nan_to_num(-9)), name
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods() or torch.cuda.is_initialized(),
    reason="processes are forked, which a used GPU does not survive",
)
def test_three_processes_are_one(tmp_path):
    store = f"file://{tmp_path / 'store'}"
    multiprocessing.start_processes(_work, args=(store,), nprocs=3, start_method="fork")
