"""p-annealing of the penalty on codes, against its formula in float64."""

import pytest
import torch

from clipsae.sae import SAE
from clipsae.sae.engine.switch import DENSE_FROM
from clipsae.sae.relu import annealed_power
from tests.sae.conftest import D, build, tokens
from tests.sae.test_formulas import parameters, preactivation

STEPS = 5
POWERS = [1.0, 1.0, 0.8, 0.6, 0.4]  # from step 1 to the last


def penalised(model: str, p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The codes that are penalised, times their rows' norms where these vary."""
    if model == "relu":
        return preactivation(p, x).clamp(min=0) * p["W_dec"].norm(dim=1)
    return (preactivation(p, x) + p["b_gate"]).clamp(min=0) * p["W_dec"].norm(dim=1)


def powered(codes: torch.Tensor, power: float) -> torch.Tensor:
    e = 0.01 * codes.detach().sum() / (codes > 0).sum()
    return ((codes + e) ** power - e**power).sum()


def test_p_falls_linearly_from_its_start_to_the_last_step():
    found = [annealed_power(0.4, 1, STEPS, step) for step in range(STEPS)]
    assert found == pytest.approx(POWERS)
    assert [annealed_power(0.4, 9, STEPS, step) for step in range(STEPS)] == [1.0] * STEPS
    assert annealed_power(0.4, 1, STEPS, 99) == pytest.approx(0.4)


@pytest.mark.parametrize("share", [2, -1], ids=["sparse", "dense"])
@pytest.mark.parametrize("model", ["relu", "gated"])
@pytest.mark.parametrize("unit", [True, False])
def test_value_and_gradients(model, unit, share, monkeypatch):
    """Two batches a step, as where gradients accumulate: the weight grows once for a change."""
    monkeypatch.setitem(DENSE_FROM, "cpu", {1: share, 2: share})
    options = {"p_end": 0.4, "p_start_step": 1, "l1_coefficient": 0.03, "unit_decoder": unit}
    sae = build(model, **options).double()
    weight, before = 0.03, 1.0
    for step, power in enumerate(POWERS):
        for half in range(2):
            x = tokens(6, D, seed=2 * step + half, dtype=torch.float64)
            p = parameters(sae)
            codes = penalised(model, p, x)
            weight = weight * (powered(codes, before) / powered(codes, power)).item()
            before = power
            expected = weight * powered(codes, power) / len(x)
            expected.backward()
            sae.before_step(step, STEPS)
            sae.zero_grad()
            term = sae(x).losses["l1"]
            term.backward()
            torch.testing.assert_close(term, expected, rtol=1e-6, atol=0)
            for name, parameter in sae.named_parameters():
                right = p[name.rsplit(".")[-1]].grad
                if right is not None and not (unit and name.endswith("W_dec")):
                    torch.testing.assert_close(
                        parameter.grad, right, msg=name, rtol=1e-5, atol=1e-9
                    )


def test_it_keeps_the_penalty_s_size():
    sae, twin = build("relu", p_end=0.2), build("relu")
    x = tokens(200, D)
    for step in range(STEPS):
        sae.before_step(step, STEPS)
        term = sae(x).losses["l1"]
        torch.testing.assert_close(term, twin(x).losses["l1"], rtol=1e-4, atol=0)


def test_no_code_no_penalty_and_its_state_is_saved(tmp_path):
    sae = build("relu", p_end=0.4)
    with torch.no_grad():
        sae.architecture.b_enc -= 100
    sae.before_step(3, STEPS)
    out = sae(tokens(4, D))
    out.loss.backward()
    assert out.losses["l1"] == 0
    assert sae.activation.growth == 1
    assert all(p.grad is None or p.grad.isfinite().all() for p in sae.parameters())
    sae.save(tmp_path)
    assert torch.equal(SAE.load(tmp_path).activation.power, sae.activation.power)
    assert sae.bfloat16().activation.power.dtype == torch.float32
    assert not list(build("relu").activation.buffers())


@pytest.mark.parametrize("model", ["relu", "gated"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p_end": 0}, "p_end=0: expected a number above 0, up to 1"),
        ({"p_end": 1.5}, "p_end=1.5: expected a number above 0, up to 1"),
        ({"p_end": 0.5, "p_start_step": -1}, "p_start_step=-1: expected an integer of at least 0"),
        ({"p_start_step": 3}, "p_start_step=3 does nothing with p_end=1"),
        ({"p_end": 0.5, "l1_coefficient": 0}, "p_end=0.5 does nothing with l1_coefficient=0"),
    ],
)
def test_what_cannot_be_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        build(model, **options)
