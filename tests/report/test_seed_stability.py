"""Seed stability of SAEs in the store against plain cosines."""

import numpy as np
import pytest
import torch

from clipsae.report import Wanted, collect, select
from clipsae.report.stability import seed_stability
from clipsae.report.tables import stability_table
from clipsae.report.variants import Line
from clipsae.sae import SAE


def test_seeds_are_compared_both_ways_and_what_is_missing_is_said(store):
    rows = []
    for seed in (0, 1, 2):
        torch.manual_seed(seed)
        sae = SAE(d=8, latents=128, architecture="linear", activation="topk", k=2)
        folder = store.root / "sae" / f"topk-{seed}"
        folder.mkdir(parents=True)
        sae.save(folder)
        unit = sae.decoder_rows().detach().double().numpy()
        rows.append(unit / np.linalg.norm(unit, axis=1, keepdims=True))
        store.evaluation("topk", "scenes", {"on_5": 1.0}, k=2, seed=seed, sae=folder.name)
        store.evaluation("relu", "scenes", {"on_5": 1.0}, seed=seed, sae=f"gone-{seed}")
    store.evaluation("topk", "scenes", {"on_5": 1.0}, k=4, seed=0, sae="another-k")
    found = collect(store.root)
    selection = select(found, Wanted("clipsae-tiny", "builtin", -2, "paper", 128))
    (stable,), problems = seed_stability(store.root, found, selection)
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
    values = [(rows[a] @ rows[b].T).max(axis=1).mean() for a, b in pairs]
    assert (stable.line, stable.pairs) == (Line("topk"), 6)
    assert stable.mean == pytest.approx(np.mean(values), abs=1e-6)
    assert stable.std == pytest.approx(np.std(values, ddof=1), abs=1e-6)
    assert [line.split(":")[0] for line in problems] == ["sae/gone-0", "sae/gone-1", "sae/gone-2"]
    (row,) = stability_table(selection, [stable]).rows
    assert row.labels == ("TopK (k = 2)", "scenes")
