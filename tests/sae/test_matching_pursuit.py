"""Matching pursuit against its loop, token by token in float64; with its refusals."""

import pytest
import torch

from clipsae.sae import SAE, matching_pursuit
from tests.sae.conftest import D, build, tokens


def plain(
    x: torch.Tensor,
    rows: torch.Tensor,
    bias: torch.Tensor,
    k: int,
    residual_threshold: float = 0.0,
    stop_on_repeat: bool = False,
):
    """Codes [N, M], the reconstruction, and how often a latent was chosen again."""
    codes, again = torch.zeros(len(x), len(rows), dtype=x.dtype), 0
    found = []
    for n, token in enumerate(x):
        left, code = token - bias, [torch.zeros((), dtype=x.dtype)] * len(rows)
        chosen = set()
        for _ in range(k):
            products = [left @ row for row in rows]
            best = max(range(len(rows)), key=lambda m: products[m].item())
            if products[best] <= 0:
                break
            repeats = best in chosen
            again += repeats
            chosen.add(best)
            code[best] = code[best] + products[best]
            left = left - products[best] * rows[best]
            if left.norm() < residual_threshold or (stop_on_repeat and repeats):
                break
        codes[n] = torch.stack(code).detach()
        found.append(torch.stack(code))
    z = torch.stack(found)
    assert torch.equal(z.detach(), codes)
    return z, z @ rows + bias, again


@pytest.mark.parametrize("gram", [True, False], ids=["gram", "residuals"])
@pytest.mark.parametrize(("d", "latents", "k"), [(12, 40, 4), (3, 5, 5), (2, 30, 9), (12, 1, 1)])
def test_codes_losses_and_gradients(d, latents, k, gram, monkeypatch):
    monkeypatch.setattr(matching_pursuit, "GRAM", 8192 if gram else 0)
    torch.manual_seed(0)
    sae = SAE(d, latents, "matching_pursuit", "relu", l1_coefficient=0.0, k=k).double()
    with torch.no_grad():
        sae.architecture.b_dec += 0.1 * torch.randn(d, dtype=torch.float64)
    x = tokens(7, d, dtype=torch.float64)
    x[0] = sae.architecture.b_dec.detach()  # nothing to explain
    rows, bias = (
        p.detach().clone().requires_grad_() for p in (sae.decoder_rows(), sae.decoder_bias)
    )
    z, x_hat, again = plain(x, rows, bias, k)
    assert (again > 0) == (k > 4)
    error = ((x_hat - x).square().sum(-1) / x.norm(dim=-1)).mean() / d
    error.backward()
    out = sae(x)
    out.loss.backward()
    torch.testing.assert_close(out.codes, z)
    torch.testing.assert_close(out.loss, error)
    torch.testing.assert_close(sae.architecture.W_dec.grad, rows.grad)
    torch.testing.assert_close(sae.architecture.b_dec.grad, bias.grad)
    assert ((out.codes != 0).sum(-1) <= k).all()
    assert not out.codes[0].any()
    sae.eval()
    torch.testing.assert_close(sae.encode(x), z)
    torch.testing.assert_close(sae.encode_sparse(x).dense(), z)


def test_more_steps_leave_less_over():
    left = []
    for k in (1, 4, 16):
        sae, x = build("matching_pursuit", k=k), tokens(20, D)
        left.append((sae(x).reconstruction - x).square().sum().item())
    assert left[0] > left[1] > left[2]


@pytest.mark.parametrize(
    "stops",
    [{"stop_on_repeat": True}, {"residual_threshold": 0.8}, {"residual_threshold": 0.5}],
)
def test_steps_end_early(stops):
    torch.manual_seed(0)
    options = {"l1_coefficient": 0.0, "k": 9, **stops}
    sae = SAE(3, 9, "matching_pursuit", "relu", **options).double()
    x = tokens(9, 3, dtype=torch.float64)
    rows, bias = (
        p.detach().clone().requires_grad_() for p in (sae.decoder_rows(), sae.decoder_bias)
    )
    z, x_hat, again = plain(x, rows, bias, 9, **stops)
    assert again < plain(x, rows, bias, 9)[-1]
    ((x_hat - x).square().sum(-1) / x.norm(dim=-1)).mean().div(3).backward()
    out = sae(x)
    out.loss.backward()
    torch.testing.assert_close(out.codes, z)
    torch.testing.assert_close(sae.architecture.W_dec.grad, rows.grad)
    torch.testing.assert_close(sae.architecture.b_dec.grad, bias.grad)
    torch.testing.assert_close(sae.eval().encode(x), z)
    if "stop_on_repeat" in stops:  # one token, which repeats at once: two steps in place of nine
        alone = sae.decoder_bias + sae.decoder_rows()[:1]
        assert sae.architecture.choose(alone - sae.decoder_bias).shape[1] < 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k=0: expected an integer from 1 to latents=20"),
        ({"k": 3, "residual_threshold": -1.0}, r"residual_threshold=-1\.0: expected"),
        ({"k": 3, "stop_on_repeat": 1}, "stop_on_repeat=1: expected"),
        ({"encoder_init": "tied"}, "has no such option"),
        ({"activation": "topk"}, "option 'k' is declared twice"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SAE(D, 20, architecture="matching_pursuit", **options)
