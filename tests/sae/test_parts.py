"""Wrong options in one sentence, parts registered from outside, files that do not fit."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipsae.overrides import near
from clipsae.sae import ACTIVATIONS, ARCHITECTURES, OBJECTIVES, SAE, Activation, SparseCodes
from clipsae.sae.engine.switch import DENSE_FROM
from run import ROOT
from tests.sae.conftest import D, M, build, tokens

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d": 0}, "d=0: expected an integer"),
        ({"latents": "many"}, "latents='many': expected an integer of at least 1"),
        ({"latents": 2.5}, r"latents=2\.5"),
        ({"dead_after": 1.5}, r"dead_after=1\.5"),
        ({"normalize": "yes"}, "expected one of none, unit, layer_norm, mean_std, whiten"),
        ({"reconstruction_weight": -1}, "reconstruction_weight=-1"),
        ({"auxk": "x"}, "auxk='x'"),
        ({"auxk_k": 4}, "auxk_k=4 does nothing while auxk is 0"),
        (
            {"architecture": "matching_pursuit", "auxk": 0.1, "k": 2},
            r"auxk=0\.1 does nothing with architecture=matching_pursuit",
        ),
        ({"activation": "topk", "k": 2, "auxk": 0.1, "auxk_k": 0}, "auxk_k=0"),
        (
            {"architecture": "lienar"},
            r"choose one of attention, linear, matching_pursuit \(did you mean linear\?\)",
        ),
        ({"architecture": "attention", "encoder_init": "tied"}, "has no such option; it has"),
        ({"architecture": "attention", "query": "key"}, "expected one of identity, learned"),
        ({"architecture": "attention", "scale": 0}, "expected a number above 0, or 'sqrt_d'"),
        ({"architecture": "attention", "scale": NAN}, "scale=nan"),
        ({"encoder_init": "tide"}, r"did you mean tied\?"),
        ({"encoder_init": ["tied"]}, r"encoder_init=\['tied'\]: expected one of"),
        ({"unit_decoder": 1}, "unit_decoder=1: expected true or false"),
        ({"bias_init": "median"}, "expected one of images, tokens, zero"),
        ({"bias_innit": "zero"}, r"did you mean bias_init\?"),
        ({"activation": None}, "activation=None does not exist"),
        ({"activation": ["relu"]}, r"activation=\['relu'\] does not exist"),
        ({"l1_coefficient": NAN}, "l1_coefficient=nan: expected a number of at least 0"),
        ({"l1_coefficient": None}, "l1_coefficient=None: expected a number of at least 0"),
        ({"l1_coefficient": -1.0}, r"l1_coefficient=-1\.0: expected a number of at least 0"),
        ({"l1": 0.1}, r"l1=0\.1: this option is now l1_coefficient: l1_coefficient=0\.1"),
        ({"activation": "jumprelu", "l0": 1}, "l0=1: this option is now l0_coefficient"),
        ({"activation": "jumprelu", "initial_threshold": INF}, "initial_threshold=inf"),
        ({"activation": "jumprelu", "bandwidth": 0}, "bandwidth=0: expected a number above 0"),
        ({"activation": "jumprelu", "target_l0": "x"}, "target_l0='x': .* above 0, or null"),
        ({"activation": "jumprelu", "target_l0": 9999}, "target_l0=9999: .* up to latents="),
        ({"activation": "gated", "gate_weight": [1]}, r"gate_weight=\[1\]"),
        ({"activation": "topk", "k": 9}, "k=9: expected an integer from 1 to latents=8"),
        ({"activation": "topk", "k": None}, "k=None: expected an integer from 1"),
        ({"activation": "topk", "k": 2, "kk": 1}, r"kk=1: .*no such option \(did you mean k\?\)"),
        ({"activation": "topk", "k": 2, "l1": 1}, "l1=1: .* has no such option"),
        ({"activation": "batch_topk", "k": True}, "k=True"),
        ({"activation": "batch_topk", "k": 2, "threshold_decay": 1}, "0 <= decay < 1"),
        ({"activation": "batch_topk", "k": 2, "threshold_start_step": -1}, "at least 0"),
        ({"activation": "sparsemax", "weights": "score"}, "did you mean scores"),
        ({"activation": "sparsemax", "max_activation_frequency": 0}, "expected 0 < share <= 1"),
        (
            {"activation": "sparsemax", "weights": "probabilities", "clamp": True},
            "clamp=True does nothing",
        ),
    ],
)
def test_a_wrong_option_is_refused_by_name(options, message):
    for device in ("cpu", "meta"):  # on which a check costs no memory
        with torch.device(device), pytest.raises(ValueError, match=message) as refused:
            SAE(**{"d": 4, "latents": 8, **options})
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (tokens(3, D + 1), f"expected floating point numbers \\[..., {D}\\]"),
        (tokens(D), "expected floating point"),
        (torch.ones(3, D, dtype=torch.int64), "int64"),
        (tokens(3, D, dtype=torch.float64), "float64 and the SAE is torch.float32: cast one"),
    ],
)
def test_wrong_tokens_are_refused(x, message):
    sae = build("topk")
    for call in (sae, sae.encode, sae.scores, sae.initialize):
        with pytest.raises(ValueError, match=message):
            call(x)


@pytest.fixture
def squared():
    """An activation from outside the package."""

    @ACTIVATIONS.register("squared")
    class Squared(Activation):
        def __init__(self, latents: int, *, border: float, gain: float = 1.0) -> None:
            super().__init__(latents)
            self.border, self.gain = border, gain

        def threshold(self, scores):
            return scores.new_full((), self.border)

        def magnitude(self, scores, tau, latents):
            return self.gain * scores**2

    yield Squared
    ACTIVATIONS.pop("squared")


def test_a_part_registered_from_outside_is_one_like_any_other(squared, tmp_path):
    sae = SAE(D, 20, "linear", "squared", border=0.5)
    assert sae.config["gain"] == 1.0
    x = tokens(6, D)
    sae(x).loss.backward()
    scores = sae.scores(x)
    torch.testing.assert_close(sae.encode(x), scores**2 * (scores > 0.5))
    sae.save(tmp_path)
    assert torch.equal(SAE.load(tmp_path).encode(x), sae.encode(x))
    with pytest.raises(ValueError, match="border has no default"):
        SAE(D, 20, "linear", "squared")


def test_options_that_are_passed_on_are_the_base_classs_too(squared, monkeypatch):
    class Softer(squared):
        def __init__(self, latents: int, *, gain: float = 0.5, **options) -> None:
            super().__init__(latents, gain=gain, **options)

    monkeypatch.setitem(ACTIVATIONS, "softer", Softer)
    sae = SAE(D, 20, "linear", "softer", border=0.25)
    assert (sae.config["border"], sae.config["gain"]) == (0.25, 0.5)


def test_the_command_line_names_the_new_option():
    assert near("l1", ["k", "l1_coefficient"], "model") == "did you mean model.l1_coefficient?"


@pytest.fixture
def norms():
    """The objective of the documentation."""
    page = (ROOT / "docs" / "how-to" / "sae.md").read_text()
    (code,) = re.findall(r'```python title="mine/norms.py"\n(.*?)```', page, re.DOTALL)
    exec(code, {"__name__": "norms"})
    yield
    OBJECTIVES.pop("norms")


@pytest.mark.parametrize("share", [2, -0.5, None], ids=["sparse", "dense", "plain dense"])
@pytest.mark.parametrize("architecture", ["linear", "attention"])
def test_a_loss_term_for_any_sae_is_a_plugins_few_lines(norms, architecture, share, monkeypatch):
    if share is None:  # as on devices without sparse codes
        monkeypatch.delitem(DENSE_FROM, "cpu")
    else:
        monkeypatch.setitem(DENSE_FROM, "cpu", {1: share, 2: share})
    torch.manual_seed(0)
    options = {"k": 4, "norms": 0.3, "normalize": "unit"}
    sae = SAE(D, 20, architecture, "topk", **options).double()
    x = tokens(6, 3, D, dtype=torch.float64)
    out = sae(x)
    out.loss.backward()
    assert isinstance(out.encoded, SparseCodes) == (share == 2)

    p = {name.split(".")[1]: w.detach().clone() for name, w in sae.named_parameters()}
    p = {name: w.requires_grad_() for name, w in p.items()}
    norm = x.norm(dim=-1, keepdim=True)
    if architecture == "linear":
        scores, rows = (x / norm - p["b_dec"]) @ p["W_enc"].T + p["b_enc"], p["W_dec"]
    else:
        scores, rows = (x / norm) @ p["W_K"].T @ p["C"].T, p["C"] @ p["W_V"]
    kept = scores >= scores.topk(4, dim=-1).values[..., -1:]
    x_hat = (torch.relu(scores) * kept @ rows + p.get("b_dec", 0)) * norm
    expected = ((x_hat - x).square().sum(-1) / norm[..., 0]).mean() / D
    expected = expected + 0.3 * ((x_hat.norm(dim=-1) / norm[..., 0] - 1) ** 2).mean()
    expected.backward()
    torch.testing.assert_close(out.loss, expected)
    for name, w in sae.named_parameters():
        torch.testing.assert_close(w.grad, p[name.split(".")[1]].grad, msg=name)


def test_a_name_or_an_option_that_exists_twice_is_refused(squared):
    with pytest.raises(ValueError, match="'relu' is taken"):
        ACTIVATIONS.register("relu")(squared)
    assert set(ARCHITECTURES) == {"linear", "attention", "matching_pursuit"}

    class Doubled(Activation):
        def __init__(self, latents: int, *, unit_decoder: bool = True) -> None:
            super().__init__(latents)

    ACTIVATIONS["squared"] = Doubled
    with pytest.raises(ValueError, match="'unit_decoder' is declared twice"):
        SAE(D, 20, "linear", "squared")


def test_files_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no SAE"):
        SAE.load(tmp_path)
    sae = build("topk")
    sae.save(tmp_path)
    weights = load_file(tmp_path / "sae.safetensors")
    about = json.loads((tmp_path / "sae.json").read_text())
    fewer = {k: v for k, v in weights.items() if k != "architecture.b_enc"}
    for state, changes, message in (
        (fewer, {}, "does not fit its config.*b_enc"),
        ({**weights, "extra": torch.ones(1)}, {}, "does not fit its config.*extra"),
        (weights, {"config": {**about["config"], "latents": 41}}, "does not fit its config"),
        (weights, {"version": 99}, "version 99: expected .*up to"),
        (weights, {"format": "other"}, "format 'other'"),
    ):
        save_file(state, tmp_path / "sae.safetensors")
        (tmp_path / "sae.json").write_text(json.dumps({**about, **changes}))
        with pytest.raises(ValueError, match=message):
            SAE.load(tmp_path)


@pytest.mark.parametrize(("name", "old"), [("relu", "l1"), ("gated", "l1"), ("jumprelu", "l0")])
def test_an_sae_with_the_old_names_of_options_loads(name, old, tmp_path):
    sae = build(name, **{f"{old}_coefficient": 0.25})
    sae.save(tmp_path)
    about = json.loads((tmp_path / "sae.json").read_text())
    about["config"][old] = about["config"].pop(f"{old}_coefficient")
    (tmp_path / "sae.json").write_text(json.dumps({**about, "version": 1}))
    assert SAE.load(tmp_path).config == sae.config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_old_jumprelu_that_has_log_theta_loads(dtype, tmp_path):
    sae = build("jumprelu", initial_threshold=0.4).to(dtype)
    sae.save(tmp_path)
    weights = load_file(tmp_path / "sae.safetensors")
    log_theta = torch.linspace(-3, 1, M)
    weights["activation.log_theta"] = log_theta
    del weights["activation.theta"]
    save_file(weights, tmp_path / "sae.safetensors")
    about = json.loads((tmp_path / "sae.json").read_text())
    (tmp_path / "sae.json").write_text(json.dumps({**about, "version": 2}))
    loaded, x = SAE.load(tmp_path), tokens(8, D, dtype=dtype)
    scores = loaded.scores(x)
    assert torch.equal(loaded.encode(x), torch.where(scores > log_theta.exp(), scores, 0))
    assert loaded.activation.theta.dtype == torch.float32
    sae.load_state_dict(weights)  # as in a checkpoint
    assert torch.equal(sae.activation.theta, log_theta.exp())
    assert "activation.log_theta" in weights


def test_thresholds_that_a_step_took_below_0_are_0():
    sae = build("jumprelu")
    with torch.no_grad():
        sae.activation.theta.copy_(torch.linspace(-1, 1, M))
    sae.after_step()
    assert torch.equal(sae.activation.theta.detach(), torch.linspace(-1, 1, M).clamp(min=0))
    assert not (sae.encode(tokens(8, D)) < 0).any()


@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25)])
@pytest.mark.parametrize(
    ("name", "options", "penalty"),
    [
        ("relu", {"l1_coefficient": 0.03}, "l1"),
        ("attention_relu", {"l1_coefficient": 0.03}, "l1"),
        ("gated", {"l1_coefficient": 0.03}, "l1"),
        ("jumprelu", {"auxk": 0.1, "dead_after": 1}, "l0"),
    ],
)
def test_the_scale_of_the_penalties_is_that_of_no_other_term(name, options, penalty, scale):
    sae, x = build(name, **options), tokens(8, D)
    if "auxk" in options:
        sae.tokens_since_fired[:20] = 10
        sae.architecture.b_enc.data[:20] = -100  # silent
        sae.architecture.b_enc.data[0] = 0.0
        sae.activation.theta.data[0] = 100  # silent, with a score that AuxK can use
    twin = copy.deepcopy(sae)
    twin.activation.penalty_scale = scale
    whole, scaled = sae(x).losses, twin(x).losses
    assert all(term > 0 for term in whole.values())
    assert len(whole) == (3 if name in ("gated", "jumprelu") else 2)
    for term, value in whole.items():
        assert scaled[term] == value * (0.25 if term == penalty else 1), term


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_of_decoder_rows_and_their_gradients(dtype):
    architecture = build("attention_relu").architecture.to(dtype)
    with torch.no_grad():
        architecture.C[3] = 0
    weights = torch.randn(M, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norms = architecture.decoder_norms()
    (norms * weights.to(dtype)).sum().backward()
    C, W_V = (p.detach().double().requires_grad_() for p in (architecture.C, architecture.W_V))
    expected = torch.linalg.vector_norm(C @ W_V, dim=1)
    (expected * weights).sum().backward()
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    pairs = (norms, expected), (architecture.C.grad, C.grad), (architecture.W_V.grad, W_V.grad)
    for found, wanted in pairs:
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
