"""Losses and gradients of every variant against its published formula, written plainly in float64.

Estimated derivatives are written as (parameter - its value) times the coefficient, and what is
held fixed as a constant: autograd of the plain formula is then the published gradient.
"""

import pytest
import torch
from torch import Tensor

from clipsae.sae.linear import geometric_median
from clipsae.sae.losses import relative_error
from tests.sae.conftest import D, M, build, tokens


def parameters(sae) -> dict[str, Tensor]:
    """Copies of all parameters by their last name, to differentiate the plain formula by."""
    return {
        name.rsplit(".")[-1]: p.detach().clone().requires_grad_()
        for name, p in sae.named_parameters()
    }


def error(x_hat: Tensor, x: Tensor) -> Tensor:
    """mean((x_hat - x)^2 / ||x||)."""
    total = sum(((a - b) ** 2).sum() / (b**2).sum().sqrt() for a, b in zip(x_hat, x, strict=True))
    return total / x.numel()


def preactivation(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.stack([p["W_enc"] @ (token - p["b_dec"]) for token in x]) + p.get("b_enc", 0)


def linear_decode(p: dict[str, Tensor], z: Tensor) -> Tensor:
    return z @ p["W_dec"] + p["b_dec"]


def relu(p, x):
    z = preactivation(p, x).clamp(min=0)
    return z, linear_decode(p, z), {"l1": 0.03 * z.sum(1).mean()}


def jumprelu(p, x, target=None):
    s, theta, eps = preactivation(p, x), p["theta"], 0.7
    held, passes = theta.detach(), s > theta
    rect = (((s - theta) / eps).abs() < 0.5).double().detach()
    z = s * passes - (held / eps) * rect * (theta - held)
    step = passes.double() - rect / eps * (theta - held)
    l0 = step.sum(1).mean()
    term = l0 if target is None else (l0 / target - 1) ** 2
    return z, linear_decode(p, z), {"l0": 0.02 * term}


def gated(p, x):
    h = preactivation(p, x)
    pi = h + p["b_gate"]
    z = (pi > 0) * (p["r_mag"].exp() * h + p["b_mag"]).clamp(min=0)
    by_gate = pi.clamp(min=0) @ p["W_dec"].detach() + p["b_dec"].detach()
    terms = {
        "l1": 0.03 * pi.clamp(min=0).sum(1).mean(),
        "gate_reconstruction": 1.0 * error(by_gate, x),
    }
    return z, linear_decode(p, z), terms


def topk(p, x):
    a = preactivation(p, x).clamp(min=0)
    keep = torch.zeros_like(a)
    for row, token in zip(keep, a.detach(), strict=True):
        row[sorted(range(M), key=lambda m: -token[m])[:4]] = 1
    return a * keep, linear_decode(p, a * keep), {}


def batch_topk(p, x):
    a = preactivation(p, x).clamp(min=0)
    border = sorted(a.detach().flatten().tolist())[-4 * len(x)]
    z = a * (a >= border)
    return z, linear_decode(p, z), {}


def abs_topk(p, x):
    s = preactivation(p, x)
    keep = torch.zeros_like(s)
    for row, token in zip(keep, s.detach(), strict=True):
        row[sorted(range(M), key=lambda m: -token[m].abs())[:4]] = 1
    z = s * keep
    assert (z < 0).any()
    return z, linear_decode(p, z), {}


def simplex_threshold(s: Tensor) -> Tensor:
    """Prop. 1: tau = (sum of the r largest - 1) / r, r the largest with s_r + (1 - S_r)/r > 0."""
    taus = []
    for token in s.detach():
        largest = sorted(token.tolist(), reverse=True)
        sums = [sum(largest[: i + 1]) for i in range(M)]
        r = max(i + 1 for i in range(M) if largest[i] + (1 - sums[i]) / (i + 1) > 0)
        taus.append((sums[r - 1] - 1) / r)
    return torch.tensor(taus, dtype=s.dtype)[:, None]


def attention_scores(p: dict[str, Tensor], x: Tensor, scale: float) -> Tensor:
    unit = x / x.norm(dim=1, keepdim=True)
    return (unit @ p.get("W_Q", torch.eye(D, dtype=x.dtype))) @ (p["C"] @ p["W_K"]).T / scale


def sparsemax(p, x, weights="scores", scale=1.0):
    s = attention_scores(p, x, scale)
    support = s > simplex_threshold(s)
    if weights == "scores":
        z = s * support
    else:
        size = support.sum(1, keepdim=True)
        z = support * (s - ((s * support).sum(1, keepdim=True) - 1) / size)
    return z, (z @ (p["C"] @ p["W_V"])) * x.norm(dim=1, keepdim=True), {}


def attention_relu(p, x):
    z = attention_scores(p, x, 1.0).clamp(min=0)
    rows = p["C"] @ p["W_V"]
    l1 = 0.03 * (z * rows.norm(dim=1)).sum(1).mean()
    return z, (z @ rows) * x.norm(dim=1, keepdim=True), {"l1": l1}


CASES = {
    "relu": (relu, "relu", {"l1_coefficient": 0.03}),
    "jumprelu": (
        jumprelu,
        "jumprelu",
        {"l0_coefficient": 0.02, "initial_threshold": 0.3, "bandwidth": 0.7, "target_l0": None},
    ),
    "jumprelu, some thresholds at 0 and negative scores in the kernel": (
        jumprelu,
        "jumprelu",
        {"l0_coefficient": 0.02, "initial_threshold": 0.01, "bandwidth": 0.7, "target_l0": None},
    ),
    "jumprelu with a target": (
        lambda p, x: jumprelu(p, x, 3.0),
        "jumprelu",
        {"l0_coefficient": 0.02, "initial_threshold": 0.3, "bandwidth": 0.7, "target_l0": 3.0},
    ),
    "gated": (gated, "gated", {"l1_coefficient": 0.03}),
    "topk": (topk, "topk", {}),
    "batch_topk": (batch_topk, "batch_topk", {}),
    "abs_topk": (abs_topk, "abs_topk", {}),
    "sparsemax": (sparsemax, "sparsemax", {}),
    "sparsemax, the paper's text": (
        lambda p, x: sparsemax(p, x, "probabilities", D**0.5),
        "sparsemax",
        {"weights": "probabilities", "query": "learned", "scale": "sqrt_d"},
    ),
    "attention_relu": (attention_relu, "attention_relu", {"l1_coefficient": 0.03}),
}


def test_thresholds_of_0_are_among_the_cases():
    sae = build(
        "jumprelu", **CASES["jumprelu, some thresholds at 0 and negative scores in the kernel"][2]
    )
    theta, scores = sae.activation.theta, sae.scores(tokens(8, D))
    assert 5 < (theta == 0).sum() < M
    assert ((scores < 0) & (scores > theta - 0.35)).any(dim=0).sum() > 5


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_the_published_ones(case):
    plain, recipe, options = CASES[case]
    sae = build(recipe, **options).double()
    if "C" in dict(sae.architecture.named_parameters()):
        with torch.no_grad():
            sae.architecture.C *= 3  # scores wide enough that the support is a part of M
    p, x = parameters(sae), tokens(8, D, dtype=torch.float64)
    z, x_hat, terms = plain(p, x)
    weight = sae.reconstruction_weight
    terms = {"reconstruction": weight * error(x_hat, x), **terms}
    sum(terms.values()).backward()

    out = sae(x)
    out.loss.backward()
    assert 0 < (out.codes != 0).float().mean() < 1
    torch.testing.assert_close(out.codes, z, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.reconstruction, x_hat, rtol=1e-10, atol=1e-12)
    assert set(out.losses) - {"auxk"} == set(terms)
    for name, term in terms.items():
        torch.testing.assert_close(out.losses[name], term, rtol=1e-10, atol=0)
    for name, parameter in sae.named_parameters():
        expected = p[name.rsplit(".")[-1]].grad
        assert expected.any(), name
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-13, msg=name)


def test_topk_keeps_exactly_k_in_training_and_all_equal_ones_in_evaluation():
    sae = build("topk")
    with torch.no_grad():
        sae.architecture.W_enc[1:20] = sae.architecture.W_enc[0]
        sae.architecture.b_enc[:20] = 5.0
    x = 0.1 * tokens(6, D)
    assert ((sae(x).codes != 0).sum(1) == 4).all()
    assert ((sae.eval()(x).codes != 0).sum(1) >= 20).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_topk_s_threshold_separates_the_kth_from_the_next(dtype):
    activation = build("topk").activation
    scores = torch.randn(200, M, dtype=torch.float64).to(dtype)
    scores[0, :4], scores[0, 4:] = 1.0, 1.0 - torch.finfo(dtype).eps / 2  # neighbours
    scores[1] = -1.0
    scores[2, 2:] = -torch.inf
    scores[3, :3], scores[3, 3:] = 2.0, -1.0
    tau = activation.threshold(scores)
    assert (tau >= 0).all()
    codes = activation.apply_threshold(scores, tau)
    values, indices = scores.topk(4)
    expected = torch.zeros_like(scores).scatter(1, indices, values.clamp(min=0))
    if dtype == torch.bfloat16:  # equal scores are common here: all that equal the k-th
        expected = torch.where(scores >= values[:, -1:], scores, 0).clamp(min=0)
    assert torch.equal(codes, expected)
    if dtype != torch.bfloat16:
        middle = (values[4:, 3] + scores[4:].topk(5).values[:, 4]) / 2
        torch.testing.assert_close(tau[4:, 0], middle.clamp(min=0))


@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0])
def test_batch_topk_keeps_the_largest_of_the_batch_however_they_lie(spread):
    sae = build("batch_topk")
    scores = torch.randn(30, M) * torch.exp(spread * torch.randn(30, 1))
    scores[3] = scores[4]
    codes = sae.activation(scores)
    border = scores.flatten().sort(descending=True).values[4 * 30 - 1]
    assert (codes != 0).sum() == 4 * 30
    assert torch.equal(codes[scores > border], scores[scores > border])
    if spread == 5:
        assert (codes != 0).sum(1).max() > 8  # more than twice k in one token
    everywhere = sae.activation(torch.ones(6, M))
    assert (everywhere != 0).sum() == 4 * 6


def test_batch_topk_leaves_its_threshold_where_no_score_is_positive():
    sae = build("batch_topk")
    sae(tokens(8, D))
    before = sae.activation.inference_threshold.clone()
    with torch.no_grad():
        sae.architecture.b_enc.fill_(-100)
    out = sae(tokens(8, D))
    assert not out.codes.any()
    assert before > 0
    assert torch.equal(sae.activation.inference_threshold, before)


def test_sparsemax_s_frequent_latents_get_score_0_in_training_only():
    limit = 0.15
    sae = build("sparsemax", max_activation_frequency=limit).double()
    with torch.no_grad():
        sae.architecture.C *= 3
    p, frequency = parameters(sae), torch.zeros(M, dtype=torch.float64)
    for t in range(1, 7):
        x = tokens(8, D, seed=t % 2, dtype=torch.float64)
        s = attention_scores(p, x, 1.0) * (frequency <= limit)
        z = s * (s > simplex_threshold(s))
        assert torch.equal(sae(x).codes != 0, z != 0)
        frequency = ((t - 1) * frequency + (z > 0).double().mean(0)) / t
        torch.testing.assert_close(sae.activation.frequency, frequency)
    assert (frequency > limit).any()
    s = attention_scores(p, x, 1.0)
    expected = s * (s > simplex_threshold(s))
    torch.testing.assert_close(sae.eval()(x).codes, expected)
    torch.testing.assert_close(sae.activation.frequency, frequency)


def test_sparsemax_s_threshold_is_rounded_so_that_the_support_is_exact():
    # tau = 3 - 2^-23 lies half-way between two float32 numbers, and 3 is in the support.
    activation = build("sparsemax").activation
    scores = torch.tensor([[4 - 2**-22, 3.0, 0.0]])
    assert torch.equal(activation.apply_threshold(scores, activation.threshold(scores)), scores)


def test_relative_error_of_a_zero_token_is_0():
    x = tokens(4, D, dtype=torch.float64)
    x[1] = 0
    x_hat = tokens(4, D, seed=1, dtype=torch.float64)
    others = [0, 2, 3]
    expected = error(x_hat[others], x[others]) * 3 / 4
    torch.testing.assert_close(relative_error(x_hat, x), expected)


def test_the_bias_starts_as_a_geometric_median():
    images = tokens(7, 5, D)
    by_tokens = build("relu", bias_init="tokens")
    by_tokens.initialize(images)
    flat = images.flatten(0, 1)

    def distances(point: Tensor) -> Tensor:
        return (flat - point).norm(dim=1).sum()

    median = by_tokens.decoder_bias.detach()
    assert all(distances(median) <= distances(median + 0.01 * torch.randn(D)) for _ in range(50))
    by_images = build("relu", bias_init="images")
    by_images.initialize(images)
    expected = geometric_median(images.flatten(1)).view(5, D).mean(0)
    torch.testing.assert_close(by_images.decoder_bias.detach(), expected)
    zero = build("relu", bias_init="zero")
    before = zero.decoder_bias.detach().clone()
    zero.initialize(images)
    assert torch.equal(zero.decoder_bias, before)
    normalised = build("relu", bias_init="tokens", normalize="unit")
    normalised.initialize(images)
    unit = flat / flat.norm(dim=1, keepdim=True)
    torch.testing.assert_close(normalised.decoder_bias.detach(), geometric_median(unit))


def test_the_median_of_points_on_a_line_is_the_middle_one():
    points = torch.tensor([[0.0], [1.0], [2.0], [10.0], [100.0]])
    torch.testing.assert_close(geometric_median(points), torch.tensor([2.0]), atol=1e-3, rtol=0)
    assert torch.equal(geometric_median(torch.ones(3, 2)), torch.ones(2))


def test_starting_values():
    attention = build("sparsemax", d=64, latents=4096).architecture
    assert attention.C.detach().abs().max() == pytest.approx((6 / 4096) ** 0.5, rel=1e-3)
    assert attention.W_K.detach().abs().max() == pytest.approx((6 / 64) ** 0.5, rel=1e-2)
    linear = build("relu", d=64, latents=4096, encoder_init="independent").architecture
    assert linear.W_enc.detach().abs().max() == pytest.approx((6 / 4096) ** 0.5, rel=1e-3)
    tied = build("topk", encoder_init="tied").architecture
    assert torch.equal(tied.W_enc, tied.W_dec)
    assert tied.W_enc.data_ptr() != tied.W_dec.data_ptr()
