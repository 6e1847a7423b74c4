"""The penalty on decoder rows that are alike, against a loop over the latents of random chunks."""

import pytest
import torch

from clipsae.sae.objectives.orthogonality import nearest_rows
from tests.sae.conftest import D, M, build, tokens


def plain(rows, order, size):
    """mean_m max_j cos(w_m, w_j)^2 over the others j of m's chunk."""
    parts = -(-len(order) // size)
    each, rest = divmod(len(order), parts)
    chunks, start = [], 0
    for i in range(parts):
        stop = start + each + (i < rest)
        chunks.append(order[start:stop].tolist())
        start = stop
    total = 0
    for chunk in chunks:
        assert 2 <= len(chunk) <= size
        for m in chunk:
            others = rows[[j for j in chunk if j != m]]
            cosines = others @ rows[m] / (others.norm(dim=1) * rows[m].norm())
            total = total + max(cosines) ** 2
    return total / len(order)


@pytest.mark.parametrize("chunk", [512, 40, 17, 3])
@pytest.mark.parametrize("model", ["topk", "relu", "sparsemax"])
def test_value_and_gradients(model, chunk, monkeypatch):
    monkeypatch.setattr(nearest_rows, "__defaults__", (chunk,))
    sae, twin = build(model, orthogonality=0.7).double(), build(model).double()
    torch.manual_seed(3)
    out = sae(tokens(2, 5, D, dtype=torch.float64))
    out.losses["orthogonality"].backward()
    torch.manual_seed(3)
    expected = 0.7 * plain(twin.decoder_rows(), torch.randperm(M), chunk)
    expected.backward()
    torch.testing.assert_close(out.losses["orthogonality"], expected)
    for name, parameter in twin.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(sae.get_parameter(name).grad, parameter.grad, msg=name)


def test_planted_rows():
    """Two equal rows among orthogonal ones cost two latents' share, and steps part them."""
    sae = build("topk", d=M, orthogonality=1.0)
    rows = sae.architecture.W_dec
    with torch.no_grad():
        rows.copy_(torch.eye(M))
        rows[1] = rows[0] + 1e-4 * tokens(M)
    optimizer = torch.optim.Adam([rows], lr=0.02)
    found = []
    for step in range(30):
        out = sae(tokens(2, 5, M, seed=step))
        found.append(out.losses["orthogonality"].item())
        optimizer.zero_grad()
        out.losses["orthogonality"].backward()
        sae.after_backward()
        optimizer.step()
        sae.after_step()
    assert found[0] == pytest.approx(2 / M, rel=1e-3)
    assert min(found) < 0.2 * found[0]


def test_every_pair_meets_over_the_steps_and_a_row_of_norm_0_is_like_none():
    torch.manual_seed(0)
    met = torch.zeros(6, 6)
    for _ in range(60):
        order = torch.randperm(6)
        nearest = nearest_rows(torch.eye(6), order, 2)
        met[torch.arange(6), nearest] = 1
    assert torch.equal(met, 1 - torch.eye(6))
    sae = build("topk", orthogonality=1.0, unit_decoder=False)
    with torch.no_grad():
        sae.architecture.W_dec[:3] = 0
    out = sae(tokens(2, 5, D))
    out.losses["orthogonality"].backward()
    assert sae.architecture.W_dec.grad.isfinite().all()
    assert not sae.architecture.W_dec.grad[:3].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"orthogonality": -1}, "orthogonality=-1: expected a number of at least 0"),
        ({"orthogonality": 1, "freeze": "decoder"}, "orthogonality=1 does nothing with freeze="),
        ({"orthogonality": 1, "latents": 1, "k": 1}, "orthogonality=1 needs two latents, got 1"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build("topk", **options)


def test_where_the_encoder_or_the_bias_alone_is_frozen_it_is_allowed():
    for freeze in ("encoder", "soft_decoder"):
        assert build("topk", orthogonality=1.0, freeze=freeze).objectives
