"""Logged numbers are sums over all tokens and one division, not means of batch means."""

import pytest
import torch

from clipsae.sae import SAEOutput
from clipsae.training.window import TokenSums


def batch(n, d=6, m=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, d, generator=g) * (seed + 1) + 5
    codes = torch.relu(torch.randn(n, 3, m, generator=g)) * -1  # negative codes are active, too
    losses = {"reconstruction": torch.tensor(float(seed)), "l1": torch.tensor(0.5)}
    return x, SAEOutput(x + 0.1 * torch.randn(n, 3, d, generator=g), codes, losses)


@pytest.mark.parametrize("latents", [None, 10])
def test_sums_over_unequal_batches(latents):
    window = TokenSums(6, latents)
    batches = [batch(n, seed=i) for i, n in enumerate((1, 4, 2))]
    for x, out in batches:
        window.update(x, out)
    x = torch.cat([x for x, _ in batches]).flatten(0, 1).double()
    x_hat = torch.cat([o.reconstruction for _, o in batches]).flatten(0, 1).double()
    codes = torch.cat([o.codes for _, o in batches]).flatten(0, 1)
    found = window.compute()
    fvu = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    assert found["fvu"] == pytest.approx(fvu.item(), rel=1e-6)
    assert found["explained_variance"] == pytest.approx(1 - fvu.item(), rel=1e-6)
    assert found["l0"] == pytest.approx((codes != 0).sum().item() / len(codes))
    assert found["loss/reconstruction"] == pytest.approx((1 * 0 + 4 * 1 + 2 * 2) / 7)
    assert found["loss"] == pytest.approx(8 / 7 + 0.5)
    if latents:
        assert torch.equal(window.fired, (codes != 0).sum(0))


def test_a_reset_begins_anew():
    window = TokenSums(6, 10)
    window.update(*batch(4, seed=3))
    window.reset()
    window.update(*batch(2, seed=1))
    alone = TokenSums(6, 10)
    alone.update(*batch(2, seed=1))
    for name, value in alone.compute().items():
        assert torch.equal(window.compute()[name], value)
    assert torch.equal(window.fired, alone.fired)


def test_sums_that_were_kept_are_gone_on_from():
    whole, first = TokenSums(6, 10), TokenSums(6, 10)
    for window in (whole, first):
        window.update(*batch(4, seed=3))
    second = TokenSums(6, 10)
    second.restore(first.sums())
    for window in (whole, second):
        window.update(*batch(2, seed=1))
    found = second.compute()
    assert {*found} >= {"loss/reconstruction", "loss/l1"}
    for name, value in whole.compute().items():
        assert torch.equal(found[name], value)
    assert torch.equal(second.fired, whole.fired)
    first.update(*batch(1))  # what was kept is no view
    assert second.tokens == whole.tokens


def test_half_precision_is_summed_in_full():
    x, out = batch(500, seed=2)
    low = SAEOutput(out.reconstruction.bfloat16(), out.codes.bfloat16(), out.losses)
    window = TokenSums(6)
    window.update(x.bfloat16(), low)
    flat, flat_hat = x.bfloat16().double().flatten(0, 1), low.reconstruction.double().flatten(0, 1)
    fvu = (flat - flat_hat).square().sum() / (flat - flat.mean(0)).square().sum()
    assert window.compute()["fvu"] == pytest.approx(fvu.item(), rel=1e-6)


def test_all_states_are_summed_over_processes():
    window = TokenSums(6, 10)
    window.update(*batch(2))
    assert set(window._reductions) == set(window._defaults)
    parts = [TokenSums(6, 10), TokenSums(6, 10)]
    for i, part in enumerate(parts):
        part.update(*batch(i + 1, seed=i))
    whole = TokenSums(6, 10)
    for i in range(2):
        whole.update(*batch(i + 1, seed=i))
    for name, reduce in whole._reductions.items():
        merged = reduce(torch.stack([getattr(part, name) for part in parts]))
        torch.testing.assert_close(merged, getattr(whole, name), rtol=1e-12, atol=0)
