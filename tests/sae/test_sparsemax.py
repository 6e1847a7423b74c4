"""Sparsemax's threshold and gradients against entmax in float64, on easy and hard scores."""

import entmax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipsae.sae.sparsemax import Sparsemax, sparsemax_threshold


def hard_scores() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "as at initialisation": 0.009 * randn(6, 4096),  # support in the hundreds: a second look
        "support of nearly all": 1e-5 * randn(4, 3000),
        "all equal": torch.full((2, 700), 0.3, dtype=torch.float64),
        "one winner": torch.cat([torch.full((3, 1), 5.0), torch.zeros(3, 999)], 1).double(),
        "ties at the threshold": torch.tensor([[1.0, 0.5, 0.5, 0.5, 0.0, -1.0]]).double(),
        "all negative": -5 + 0.01 * randn(3, 2000),
        "huge spread": 1e4 * randn(3, 2000),
        "M = 1": randn(4, 1),
        "M = 2": randn(4, 2),
        "with -inf": torch.cat([randn(3, 50), torch.full((3, 1000), -torch.inf).double()], 1),
        "trained": randn(5, 8192).mul_(0.01) + (torch.rand(5, 8192, generator=g) < 0.02) * 0.1,
        "some rows far, some near": torch.cat([1e-4 * randn(3, 2000), 3 * randn(3, 2000)]),
    }


@pytest.mark.parametrize("name", hard_scores())
def test_threshold_is_the_projections(name):
    scores = hard_scores()[name]
    p = entmax.sparsemax(scores, dim=-1)
    tau = sparsemax_threshold(scores)
    assert tau.shape == (*scores.shape[:-1], 1)
    assert tau.dtype == torch.float64
    torch.testing.assert_close(torch.relu(scores - tau), p, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", hard_scores())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_scores_have_the_threshold_of_their_values(name, dtype):
    scores = hard_scores()[name].to(dtype)
    tau = sparsemax_threshold(scores)
    assert tau.dtype == torch.float64
    torch.testing.assert_close(tau, sparsemax_threshold(scores.double()), rtol=1e-14, atol=1e-14)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-3, 3), min_size=1, max_size=40).map(torch.tensor),
    st.sampled_from([1.0, 0.01, 1.0 / 3]),
)
def test_any_scores(scores, grid):
    scores = (torch.round(scores / grid) * grid).double()  # many ties
    p = torch.relu(scores - sparsemax_threshold(scores))
    torch.testing.assert_close(p, entmax.sparsemax(scores, dim=-1), rtol=0, atol=1e-12)


def test_many_latents_in_float32_where_a_running_sum_would_fail():
    g = torch.Generator().manual_seed(1)
    scores = 20 + 1e-4 * torch.randn(2, 49152, generator=g)  # support: about half of M
    exact = sparsemax_threshold(scores.double())
    torch.testing.assert_close(sparsemax_threshold(scores), exact, rtol=1e-14, atol=0)
    p = torch.relu(scores.double() - exact)
    torch.testing.assert_close(p.sum(-1), torch.ones(2).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["as at initialisation", "ties at the threshold", "trained"])
def test_probabilities_have_entmaxs_gradient(name):
    ours = hard_scores()[name].clone().requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    weight = torch.randn(ours.shape, dtype=torch.float64)
    activation = Sparsemax(
        ours.shape[-1], weights="probabilities", max_activation_frequency=None
    ).train()
    codes = activation(ours)
    p = entmax.sparsemax(theirs, dim=-1)
    torch.testing.assert_close(codes, p, rtol=1e-12, atol=1e-12)
    (codes * weight).sum().backward()
    (p * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_negative_scores_survive_unless_clamped():
    scores = torch.tensor([[-0.1, -0.2, 0.3]], dtype=torch.float64)
    free = {"max_activation_frequency": None}
    assert torch.equal(Sparsemax(3, **free)(scores), scores)
    assert torch.equal(Sparsemax(3, clamp=True, **free)(scores), torch.relu(scores))
    with pytest.raises(ValueError, match="clamp=True does nothing"):
        Sparsemax(3, weights="probabilities", clamp=True)
