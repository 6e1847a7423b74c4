"""MonoSemanticity as a loss, against the sum over pairs of images and the metric of evaluation."""

import pytest
import torch
from torch import Tensor

from clipsae.evaluation.metrics.monosemanticity import monosemanticity
from clipsae.sae import SparseCodes
from clipsae.sae.engine.switch import DENSE_FROM
from clipsae.sae.objectives.monosemanticity import LEAST_PAIRS, batch_scores, image_codes
from tests.sae.conftest import D, M, build, tokens

B, T = 4, 5


def unit(*shape: int, seed: int = 0) -> Tensor:
    x = tokens(*shape, seed=seed, dtype=torch.float64)
    return x / x.norm(dim=-1, keepdim=True)


def plain(codes: Tensor, embeddings: Tensor, weight: float) -> Tensor:
    """Codes [B, T, M], pair by pair of images."""
    a = codes.mean(dim=1) - codes.mean(dim=1).min(dim=0).values
    alike = together = torch.zeros(codes.shape[-1], dtype=codes.dtype)
    for i in range(len(a)):
        for j in range(len(a)):
            if i != j:
                together = together + a[i] * a[j]
                alike = alike + a[i] * a[j] * (embeddings[i] @ embeddings[j]).to(codes.dtype)
    compared = together > LEAST_PAIRS * sum(a) ** 2
    return weight * (1 - (alike[compared] / together[compared]).mean())


@pytest.mark.parametrize("share", [2, -1], ids=["sparse", "dense"])
@pytest.mark.parametrize("size", [3, 8], ids=["B > e", "B < e"])
@pytest.mark.parametrize("model", ["relu", "jumprelu", "sparsemax"])
def test_value_and_gradients(model, size, share, monkeypatch):
    monkeypatch.setitem(DENSE_FROM, "cpu", {1: share, 2: share})
    sae, twin = build(model, monosemanticity=0.7).double(), build(model).double()
    x, embeddings = tokens(B, T, D, dtype=torch.float64), unit(B, size)
    assert sae.needs == {"embeddings"}
    out = sae(x, embeddings=embeddings)
    assert isinstance(out.encoded, SparseCodes) == (share == 2)
    out.losses["monosemanticity"].backward()
    expected = plain(twin(x).codes, embeddings, 0.7)
    expected.backward()
    torch.testing.assert_close(out.losses["monosemanticity"], expected)
    for name, parameter in twin.named_parameters():
        found, right = sae.get_parameter(name).grad, parameter.grad
        right = torch.zeros_like(parameter) if right is None else right
        found = torch.zeros_like(parameter) if found is None else found
        torch.testing.assert_close(found, right, msg=name)
    assert any(p.grad is not None and p.grad.any() for p in sae.parameters())


@pytest.mark.parametrize("size", [3, 30])
@pytest.mark.parametrize("low", [0.0, -1.0, 2.0])
def test_the_scores_are_the_metric_of_the_batch(size, low):
    codes = tokens(B + 5, M, dtype=torch.float64).abs() + low
    codes[:, 0] = low  # never active, or constant
    codes[:, 1] = low
    codes[2, 1] += 3  # on one image
    codes[:, 2] = low
    codes[3, 2] += 1e4  # nearly so
    codes[4, 2] += 1e-3
    embeddings = unit(B + 5, size)
    scores, defined = batch_scores(codes, embeddings)
    expected = monosemanticity(codes, embeddings)
    assert not defined[:3].any()
    assert defined[3:].all()
    assert not scores[:3].any()
    torch.testing.assert_close(scores[3:], expected[3:])


def test_planted_images():
    """A latent on one class scores 1, on two opposite ones -1/3; a code's size does not matter."""
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    codes = torch.tensor([[3.0, 0.2], [3.0, 0.2], [0.0, 0.2], [0.0, 0.0]])
    scores, defined = batch_scores(codes, embeddings)
    assert defined.all()
    torch.testing.assert_close(scores, torch.tensor([1.0, -1 / 3]))
    torch.testing.assert_close(batch_scores(100 * codes, embeddings)[0], scores)


@pytest.mark.parametrize("share", [2, -1], ids=["sparse", "dense"])
def test_nothing_to_compare_is_a_loss_of_0(share, monkeypatch):
    monkeypatch.setitem(DENSE_FROM, "cpu", {1: share, 2: share})
    sae = build("topk", monosemanticity=0.7)
    for x in (tokens(1, T, D), torch.zeros(3, T, D), tokens(0, T, D)):
        sae.zero_grad()
        out = sae(x, embeddings=unit(len(x), 3).float())
        assert out.losses["monosemanticity"] == 0
        out.loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in sae.parameters())


def test_a_gpu_s_codes_are_pooled_alike(as_on_cuda, interpreted):
    sae, twin = build("topk", monosemanticity=0.7), build("topk")
    x, embeddings = tokens(3, T, D), unit(3, 8).float()
    out = sae(x, embeddings=embeddings)
    out.losses["monosemanticity"].backward()
    expected = plain(twin(x).codes, embeddings, 0.7)
    expected.backward()
    torch.testing.assert_close(out.losses["monosemanticity"], expected)
    gradient = sae.architecture.W_enc.grad
    torch.testing.assert_close(gradient, twin.architecture.W_enc.grad, atol=1e-6, rtol=1e-4)


def test_half_precision_is_summed_in_float32():
    codes = tokens(2, T, M).relu()
    codes = codes * (codes > 0.7)
    flat = codes.flatten(0, 1).bfloat16()
    for given in (flat, SparseCodes.from_dense(flat)):
        pooled = image_codes(given, 2)
        assert pooled.dtype == torch.float32
        torch.testing.assert_close(pooled, codes.bfloat16().float().mean(1))
    sae = build("topk", monosemanticity=0.7).bfloat16()
    out = sae(tokens(2, T, D).bfloat16(), embeddings=unit(2, 3).bfloat16())
    assert out.losses["monosemanticity"].dtype == torch.float32


@pytest.mark.parametrize(
    ("weight", "embeddings", "message"),
    [
        (-1, None, "monosemanticity=-1: expected a number of at least 0"),
        (1.0, torch.ones(3, 2), r"embeddings of shape \(3, 2\): expected .* each of the 4 images"),
    ],
)
def test_what_cannot_be_is_refused(weight, embeddings, message):
    with pytest.raises(ValueError, match=message):
        build("topk", monosemanticity=weight)(tokens(B, T, D), embeddings=embeddings)
