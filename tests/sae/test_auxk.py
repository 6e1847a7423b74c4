"""AuxK against its formula in a loop, and where it is undefined."""

import pytest
import torch
from omegaconf import OmegaConf
from torch._dynamo.testing import CompileCounter

from clipsae.sae import SAE
from clipsae.sae.losses import auxk_loss, dead_codes
from tests.sae.conftest import MODELS, D, M, build, tokens


def plain(x, x_hat, a, dead, k, rows, scale):
    """||e - z~ W||^2 / ||e - mean e||^2, e fixed, z~ the k largest a of a token among the dead."""
    e = (x - x_hat).detach()
    left = 0
    for t in range(len(x)):
        chosen = sorted(dead.nonzero().flatten().tolist(), key=lambda m: -a[t, m].item())[:k]
        z = sum((a[t, m] * rows[m] for m in chosen), torch.zeros_like(x[t]))
        left = left + ((e[t] - scale[t] * z) ** 2).sum()
    return left / ((e - e.mean(0)) ** 2).sum()


@pytest.mark.parametrize(
    "model", ["topk", "batch_topk", "sparsemax", "linear_sparsemax", "relu", "gated"]
)
@pytest.mark.parametrize(("dead", "k"), [(1, 3), (3, 3), (20, 3), (M - 1, M)])
def test_value_and_gradients(model, dead, k):
    changes = {"max_activation_frequency": None} if "sparsemax" in model else {}
    sae = build(model, auxk=0.3, auxk_k=k, dead_after=10**6, **changes).double()
    x = tokens(7, D, dtype=torch.float64)
    with torch.no_grad():
        sae(x)
        # Latents that this batch does not use, as many as there are, are called dead.
        if model in ("relu", "gated"):  # all act: the first ones' scores are taken below 0
            lowered = sae.architecture.b_enc if model == "relu" else sae.activation.b_gate
            lowered[:dead] = -100 if model == "gated" else -sae.scores(x)[:, :dead].amax(0) - 0.1
            sae(x)
        idle = (sae.tokens_since_fired > 0).nonzero().flatten()[:dead]
    if len(idle) == 0:
        pytest.skip("all latents act")
    sae.tokens_since_fired[idle] = 2 * 10**6
    state = {name: value.clone() for name, value in sae.state_dict().items()}
    out = sae(x)
    is_dead = sae.dead.clone()
    assert is_dead.any()
    torch.autograd.backward(out.losses["auxk"])
    found = {n: p.grad.clone() for n, p in sae.named_parameters() if p.grad is not None}

    sae.load_state_dict(state)
    sae.zero_grad()
    a = sae.scores(x) if model in ("relu", "gated") else torch.relu(sae.scores(x))
    expected = 0.3 * plain(
        x, out.reconstruction, a, is_dead, k, sae.decoder_rows(), sae.input_scale(x)
    )
    expected.backward()
    torch.testing.assert_close(out.losses["auxk"].detach(), expected.detach())
    for name, parameter in sae.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found.pop(name), parameter.grad, msg=name)
    assert not any(gradient.any() for gradient in found.values())


def dense_loss(x, x_hat, a, dead, sae):
    aux = sae.architecture.combine(dead_codes(a, dead, 3))
    return auxk_loss(x, x_hat, aux, dead.any())


def test_no_dead_latent_gives_exactly_0_and_no_residual_no_nan():
    sae = build("topk")
    x, dead = tokens(5, D), torch.zeros(M, dtype=torch.bool)
    a = torch.rand(5, M, requires_grad=True)
    for function in (dense_loss, torch.compile(dense_loss, backend="eager")):
        loss = function(x, 0 * x, a, dead, sae)
        assert loss.item() == 0
        loss.backward()
        assert not a.grad.any()
        for x_hat in (x, x - 1):  # no residual; one that is the same for all tokens
            loss = function(x, x_hat, a, ~dead, sae)
            loss.backward()
            assert loss.isfinite()
            assert not a.grad.any()
    assert dense_loss(x, x, a, ~dead, sae).item() == 0


def test_a_compiled_step_is_compiled_once():
    sae, counter = build("topk", auxk=0.1, dead_after=20), CompileCounter()
    compiled = torch.compile(sae, backend=counter)
    for seed in range(4):
        compiled(tokens(4, 3, D, seed=seed))
    assert sae.dead.any()
    assert counter.frame_count == 1


@pytest.mark.parametrize("model", ["topk", "batch_topk"])
def test_its_weight_is_converted_to_the_scale_of_the_loss(model):
    """Published: 1/32 beside ||x - x_hat||^2 of unit tokens. Here the reconstruction is r / d of
    that, 0.02 for ViT-B/16, and AuxK's share of b_dec's gradient must be what it was."""
    weight = OmegaConf.load(MODELS / f"{model}.yaml").auxk
    d, m, r = 256, 2048, 0.02 * 256
    torch.manual_seed(0)
    sae = SAE(d, m, "linear", model, k=32, encoder_init="tied", auxk=weight, dead_after=10).double()
    x = torch.randn(256, d, dtype=torch.float64) + 0.5 * torch.randn(d, dtype=torch.float64)
    x = r * x / x.norm(dim=1, keepdim=True)
    sae.initialize(x[:64, None])
    sae(x)
    sae.tokens_since_fired[sae.tokens_since_fired > 0] = 1000
    out = sae(x)
    assert sae.dead.any()
    b_dec, unit = sae.architecture.b_dec, r * r  # of ||x - x_hat||^2 where tokens have norm 1
    error = (out.reconstruction - x).square().sum(dim=1).mean() / unit
    plain = torch.autograd.grad(error, b_dec, retain_graph=True)[0].norm()
    ours, aux = (
        torch.autograd.grad(out.losses[name], b_dec, retain_graph=True)[0].norm()
        for name in ("reconstruction", "auxk")
    )
    published = aux / weight / 32 / plain
    torch.testing.assert_close(aux / ours, published, rtol=1e-6, atol=0)
