"""The loss that pulls scores of dead latents up, against its formula in a loop."""

import pytest
import torch

from clipsae.sae import SAE
from clipsae.sae.engine.switch import DENSE_FROM
from tests.sae.conftest import D, build, tokens

DEAD = [3, 7, 20]


def with_dead(model: str, **options) -> SAE:
    """One whose latents `DEAD` are dead, some of their scores above the threshold."""
    sae = build(model, pre_activation=0.7, dead_after=1000, **options).double()
    sae.tokens_since_fired[DEAD] = 2000
    return sae


def plain(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    a = sae.activation
    tau = {"gated": lambda m: -a.b_gate[m], "jumprelu": lambda m: a.theta[m]}
    rows, scores, total = sae.architecture.decoder_rows(), sae.scores(x), 0.0
    for token in scores.flatten(0, -2):
        for m in DEAD:
            level = tau.get(sae.config["activation"], lambda m: 0.0)(m)
            below = level - token[m]
            if below > 0:
                norm = 1 if sae.architecture.unit_rows else rows[m].square().sum().sqrt()
                total = total + below * norm
    return 0.7 * total / scores[..., 0].numel()


@pytest.mark.parametrize("share", [2, -1], ids=["sparse", "dense"])
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("relu", {"normalize": "unit"}),
        ("gated", {}),
        ("jumprelu", {"unit_decoder": False}),
        ("attention_relu", {}),
    ],
)
def test_value_and_gradients(model, options, share, monkeypatch):
    monkeypatch.setitem(DENSE_FROM, "cpu", {1: share, 2: share})
    sae, x = with_dead(model, **options), tokens(3, 5, D, dtype=torch.float64)
    expected = plain(sae, x)
    expected.backward()
    gradients = {n: p.grad for n, p in sae.named_parameters() if p.grad is not None}
    sae.zero_grad()
    out = sae(x)
    torch.testing.assert_close(out.losses["pre_activation"], expected)
    out.losses["pre_activation"].backward()
    for name, parameter in sae.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], msg=name)
        else:
            assert parameter.grad is None or not parameter.grad.any(), name
    assert not sae.dead[DEAD].all()  # those that were active here are alive again


def test_without_dead_latents_it_is_exactly_0():
    sae = build("jumprelu", pre_activation=0.7)
    loss = sae(tokens(3, 5, D)).losses["pre_activation"]
    loss.backward()
    assert loss == 0
    assert not any(p.grad.any() for p in sae.parameters() if p.grad is not None)


def test_a_dead_latent_lives_again():
    """Each step of Adam moves its bias and its threshold by the rate: 1.0 in 20 of 0.05."""
    sae, x = build("jumprelu", pre_activation=1e-5, dead_after=1), tokens(6, 5, D)
    with torch.no_grad():
        sae.architecture.b_enc[3] -= sae.scores(x)[..., 3].max() - sae.activation.theta[3] + 1
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        sae(x).loss.backward()
        optimizer.step()
    assert (sae.eval().encode(x)[..., 3] > 0).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "topk", "k": 2}, "pre_activation=1: this activation has no threshold"),
        (
            {"architecture": "matching_pursuit", "k": 2},
            "pre_activation=1 does nothing with an arch",
        ),
        ({"pre_activation": -1}, "pre_activation=-1: expected a number of at least 0"),
    ],
)
def test_what_it_does_not_go_with_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SAE(D, 40, **{"pre_activation": 1, **options})
