"""The real reduction over processes, one of which has seen nothing."""

import warnings

import pytest
import torch
from torch import distributed, multiprocessing

from clipsae.evaluation.metrics import CKNNA, MonoSemanticity, cknna, monosemanticity
from tests.evaluation.batches import batch_of, options, sae_of


def _work(rank, store):
    warnings.simplefilter("ignore")  # torchmetrics: compute before update
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=3)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator)
    codes = torch.relu(torch.randn(50, 14, generator=generator) - 0.5)
    aligned = CKNNA(sae_of(14, 6), options(k=4))
    mono = MonoSemanticity(sae_of(14), options(embed_dim=6))
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
def test_three_processes_are_one(tmp_path):
    store = f"file://{tmp_path / 'store'}"
    multiprocessing.start_processes(_work, args=(store,), nprocs=3, start_method="fork")
