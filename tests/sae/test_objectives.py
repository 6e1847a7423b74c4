"""What an objective is: a loss term of its own, off by default, that any SAE can have."""

import copy

import pytest
import torch

from clipsae.sae import OBJECTIVES, SAE, LossInputs, Objective
from clipsae.sae.engine.switch import DENSE_FROM
from tests.sae.conftest import D, build, tokens


@pytest.fixture(autouse=True)
def drift(monkeypatch):
    """The mean squared code of an image's mean token, times a weight; with a counter."""

    class Drift(Objective):
        needs = ("embeddings",)

        def __init__(self, latents: int, *, drift: float = 0.0, drift_power: float = 1.0) -> None:
            super().__init__()
            if drift < 0:
                raise ValueError(f"drift={drift}: expected a number of at least 0")
            self.drift = drift
            self.drift_power = drift_power
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

        def check(self, architecture, activation) -> None:
            if activation.penalties:
                raise ValueError(f"drift={self.drift}: not with a penalty")

        def losses(self, inputs: LossInputs) -> dict[str, torch.Tensor]:
            codes = inputs.codes if isinstance(inputs.codes, torch.Tensor) else inputs.codes.dense()
            images = codes.view(*inputs.shape, -1).mean(1)
            size = inputs.embeddings.norm(dim=-1)[:, None]
            return {"drift": self.drift * (images * size**self.drift_power).square().mean()}

        def after_step(self) -> None:
            self.steps += 1

    monkeypatch.setitem(OBJECTIVES, "drift", Drift)


@pytest.mark.parametrize("model", ["topk", "batch_topk", "sparsemax"])
@pytest.mark.parametrize("share", [2, -1], ids=["sparse", "dense"])
def test_its_term_is_added_with_its_gradient(model, share, monkeypatch):
    monkeypatch.setitem(DENSE_FROM, "cpu", {1: share, 2: share})
    sae = build(model, drift=0.7, drift_power=2.0).double()
    plain = build(model).double()
    x = tokens(3, 5, D, dtype=torch.float64)
    embeddings = torch.tensor([[1.0, 2.0], [0.0, 1.0], [2.0, 2.0]], dtype=torch.float64)
    assert sae.needs == {"embeddings"}
    out, before = sae(x, embeddings=embeddings), plain(x)
    scale = embeddings.square().sum(-1)[:, None]
    expected = 0.7 * (before.codes.mean(1) * scale).square().mean()
    assert set(out.losses) - set(before.losses) == {"drift"}
    torch.testing.assert_close(out.losses["drift"], expected)
    torch.testing.assert_close(out.loss, before.loss + expected)
    (before.loss + expected).backward()
    out.loss.backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(sae.get_parameter(name).grad, parameter.grad, msg=name)
    assert list(sae.eval()(x).losses) == ["reconstruction"]


def test_without_its_first_option_it_is_not_there(tmp_path):
    sae = build("topk")
    assert not sae.objectives
    assert sae.config["drift"] == 0.0
    assert sae.needs == set()
    assert "drift" not in sae(tokens(3, 5, D)).losses
    with pytest.raises(ValueError, match=r"drift_power=2\.0 does nothing while drift is 0\.0"):
        build("topk", drift_power=2.0)


def test_its_state_and_options_are_saved(tmp_path):
    sae = build("topk", drift=0.5, drift_power=2.0)
    twin = copy.deepcopy(sae)
    sae.after_step()
    sae.save(tmp_path)
    loaded = SAE.load(tmp_path)
    assert loaded.config == sae.config
    assert loaded.config["drift_power"] == 2.0
    assert loaded.objectives[0].steps == 1
    assert twin.objectives[0].steps == 0
    assert torch.equal(loaded.encode(tokens(3, D)), sae.eval().encode(tokens(3, D)))


def test_statistics_need_no_objective():
    sae = build("batch_topk", drift=0.5)
    sae.estimate_statistics(tokens(3, 5, D))
    assert sae.activation.inference_threshold > 0
    assert len(sae.objectives) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drfit": 0.1}, r"drfit=0\.1: .* no such option \(did you mean drift\?\).* drift_power"),
        ({"drift": -1}, "drift=-1: expected a number of at least 0"),
        ({"drift": 1, "activation": "jumprelu"}, "drift=1: not with a penalty"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SAE(D, 40, **{"activation": "topk", **options})


def test_what_it_needs_must_be_given():
    sae = build("topk", drift=0.5)
    with pytest.raises(ValueError, match="embeddings=None: an objective of this SAE"):
        sae(tokens(3, 5, D))
    sae.eval()(tokens(3, 5, D))


def test_an_option_that_exists_twice_is_refused(monkeypatch):
    class Doubled(Objective):
        def __init__(self, latents: int, *, auxk: float = 0.0) -> None:
            super().__init__()

    monkeypatch.setitem(OBJECTIVES, "doubled", Doubled)
    with pytest.raises(ValueError, match="'auxk' is declared twice"):
        SAE(D, 20)
