"""Scores of names against loops over pairs of images."""

import numpy as np
import pytest
import torch

from clipsae.naming.detection import detection, interval, mid_ranks, names_of_others
from clipsae.sae import SparseCodes

N, M, V, X = 30, 6, 4, 3


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    codes = torch.rand(N, M, generator=generator) * (torch.rand(N, M, generator=generator) < 0.4)
    codes[:, 4], codes[:, 5] = 0, 1  # never and always active
    left_out = torch.full((M, X), -1)
    left_out[0] = codes[:, 0].topk(X).indices
    left_out[1, 0] = codes[:, 1].argmax()
    left_out[2] = torch.tensor([3, 7, 20])  # active or not
    scores = (10 * torch.randn(V, N, generator=generator)).round() / 10  # ties
    scores[1] = 0.5  # all the same
    return codes, left_out, scores, torch.tensor([0, 2, 3, -1, 0, 0])


def test_detection_is_the_share_of_pairs_in_the_right_order(case):
    codes, left_out, scores, name = case
    found, active, inactive = detection(
        SparseCodes.from_dense(codes), left_out, mid_ranks(scores), name
    )
    for m in range(M):
        kept = [i for i in range(N) if i not in left_out[m].tolist()]
        on = [i for i in kept if codes[i, m] > 0]
        off = [i for i in kept if codes[i, m] == 0]
        assert (active[m], inactive[m]) == (len(on), len(off))
        pairs = [
            (scores[name[m], i] > scores[name[m], j]).double()
            + (scores[name[m], i] == scores[name[m], j]).double() / 2
            for i in on
            for j in off
        ]
        expected = sum(pairs) / len(pairs) if pairs and name[m] >= 0 else torch.nan
        np.testing.assert_allclose(float(found[m]), float(expected), atol=1e-12)
    same = detection(SparseCodes.from_dense(codes), left_out, mid_ranks(scores), name * 0 + 1)[0]
    assert same[:4].tolist() == [0.5] * 4


def test_the_interval_solves_its_equation():
    area = torch.tensor([0.5, 0.8, 1.0, 0.0, 1.0, torch.nan], dtype=torch.float64)
    active, inactive = torch.tensor([20, 5, 1, 4, 400, 0]), torch.tensor([30, 995, 999, 50, 600, 9])
    low, high = interval(area, active, inactive)
    for t, bound in ((low, 0.0), (high, 1.0)):
        m = (active + inactive).double() / 2 - 1
        v = t * (1 - t) * (1 + m * ((1 - t) / (2 - t) + t / (1 + t))) / (active * inactive)
        at_bound = t == bound
        residual = (area - t).square() - 1.959964**2 * v
        assert residual[~at_bound & area.isfinite()].abs().max() < 1e-12
    assert (low[:5] <= area[:5]).all()
    assert (high[:5] >= area[:5]).all()
    assert (high[2], low[3]) == (1, 0)
    assert low[2] < 0.5 < 0.98 < low[4]  # one image says little
    assert torch.stack((low[5], high[5])).isnan().all()


def test_the_interval_covers():
    """Scores of 20 and 80 images, whose true AUROC is that of two normal distributions."""
    generator = torch.Generator().manual_seed(3)
    on = torch.randn(500, 20, generator=generator) + 1.0
    off = torch.randn(500, 80, generator=generator)
    area = (on[:, :, None] > off[:, None]).double().mean(dim=(1, 2))
    true = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(1 / 2**0.5))
    sizes = torch.full((500,), 20), torch.full((500,), 80)
    low, high = interval(area, *sizes)
    assert 0.93 < float(((low <= true) & (true <= high)).double().mean()) < 0.99


def test_the_control_has_other_latents_names():
    name = torch.tensor([0, 0, 0, 1, -1, 2])
    drawn = names_of_others(name, draws=300)
    assert (drawn[:, 4] == -1).all()
    for latent in (0, 3, 5):
        assert (drawn[:, latent] != name[latent]).all()
    # By latents that have them: of three "0" and one "1", and of three "0" and one "2".
    assert (drawn[:, 0] == 1).float().mean() == pytest.approx(0.5, abs=0.1)
    assert (drawn[:, 5] == 0).float().mean() == pytest.approx(0.75, abs=0.1)
    assert torch.equal(drawn, names_of_others(name, draws=300))
    assert (names_of_others(torch.tensor([3, 3, -1])) == -1).all()
