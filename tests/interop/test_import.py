"""What other libraries' files hold is what they compute: codes and reconstructions are compared
with their formulas, written out here in float64."""

import dataclasses
import logging
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import clipsae
from clipsae.interop import read
from tests.interop import foreign
from tests.interop.foreign import (
    CLIPSCOPE,
    LINEAR,
    MATRICES,
    MSAE,
    RELEASE,
    SIMPLE,
    SPARSIFY,
    D,
    K,
    M,
    weights,
)


def agree(sae, x: Tensor, codes: Tensor, reconstruction: Tensor) -> None:
    """The imported SAE against formulas; some latents must act and some not."""
    share = (codes != 0).double().mean()
    assert 0.02 < share < 0.98
    found = sae(x)
    assert torch.allclose(found.codes.double(), codes, atol=1e-4, rtol=1e-4)
    assert torch.allclose(found.reconstruction.double(), reconstruction, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.codes != 0, codes != 0)


def relu(w: dict[str, Tensor], scores: Tensor) -> Tensor:
    return scores.clamp(min=0)


def topk(w: dict[str, Tensor], scores: Tensor) -> Tensor:
    scores = scores.clamp(min=0)
    rows = [torch.where(row >= row.sort(descending=True).values[K - 1], row, 0) for row in scores]
    return torch.stack(rows)


def abs_topk(w: dict[str, Tensor], scores: Tensor) -> Tensor:
    least = [row.abs().sort(descending=True).values[K - 1] for row in scores]
    return torch.where(scores.abs() >= torch.stack(least)[:, None], scores, 0)


def pursuit(steps, threshold=0.0, repeats=True, rows="W_dec", bias="b_dec"):
    """Matching pursuit, a token at a time."""

    def formula(w, x):
        bias_, codes = w.get(bias, torch.zeros(D)), torch.zeros(len(x), M).double()
        for token, code in zip(x, codes, strict=True):
            left = token - bias_
            for _ in range(steps):
                best = (w[rows] @ left).argmax().item()
                value, again = (w[rows][best] @ left).clamp(min=0), code[best] != 0
                code[best] += value
                left = left - value * w[rows][best]
                if left.norm() < threshold or (again and not repeats):
                    break
        return codes, codes @ w[rows] + bias_

    return formula


def jumprelu(name: str = "threshold"):
    return lambda w, scores: scores.clamp(min=0) * (scores > w[name])


def naive_sparsemax(scores: Tensor) -> Tensor:
    """tau by trying every size of the support."""
    taus = []
    for row in scores:
        ranked = row.sort(descending=True).values
        sizes = [r for r in range(1, len(row) + 1) if ranked[r - 1] > (ranked[:r].sum() - 1) / r]
        taus.append((ranked[: sizes[-1]].sum() - 1) / sizes[-1])
    return torch.stack(taus)[:, None]


# Formulas: (tensors in float64, x) -> codes, reconstruction.


def layer_normed(formula):
    """The formula, of tokens of mean 0 and deviation 1."""

    def whole(w, x):
        mean, deviation = x.mean(dim=1, keepdim=True), x.std(dim=1, keepdim=True)
        codes, u = formula(w, (x - mean) / (deviation + 1e-5))
        return codes, u * deviation + mean

    return whole


def linear(rule, names=("W_enc", "b_enc", "W_dec", "b_dec"), centred=True, unit=False, rows=False):
    """rule((x - b_dec) W_enc + b_enc) W_dec + b_dec, without the first b_dec unless `centred`; of
    tokens of norm sqrt(d) where `unit`; with codes times the norms of decoder rows where `rows`."""

    def formula(w, x):
        encoder, decoder = w[names[0]], w[names[2]]
        encoder = encoder if len(encoder) == D else encoder.T
        decoder = decoder if len(decoder) == M else decoder.T
        bias = w.get(names[3], torch.zeros(D))
        factor = D**0.5 / x.norm(dim=1, keepdim=True) if unit else 1
        norm = decoder.norm(dim=1) if rows else 1
        codes = rule(w, ((x * factor - centred * bias) @ encoder + w[names[1]]) * norm)
        combined = (codes * w.get("scaling_factor", 1) / norm) @ decoder
        return codes, (combined + bias) / factor

    return formula


def gated(w, x):
    h = (x - w["decoder_bias"]) @ w["encoder.weight"].T
    norm = w["decoder.weight"].norm(dim=0)
    codes = (h + w["gate_bias"] > 0) * (w["r_mag"].exp() * h + w["mag_bias"]).clamp(min=0) * norm
    return codes, (codes / norm) @ w["decoder.weight"].T + w["decoder_bias"]


def scaled(rule, tied=False):
    """MSAE's, of tokens x' = 0.5 (x - mean)."""

    def formula(w, x):
        x = 0.5 * (x - MEAN.double())
        codes = rule(w, (x - w["pre_bias"]) @ w["encoder"] + w["latent_bias"])
        decoder = w["encoder"].T if tied else w["decoder"]
        return codes, (codes @ decoder + w["pre_bias"]) / 0.5 + MEAN.double()

    return formula


def no_negative_scores(w, x):
    """clipscope's, in which the largest scores are positive."""
    codes = topk(w, (x - w["pre_b"]) @ w["enc"])
    return codes, codes @ w["dec"] + w["pre_b"]


def gated_once(w, x):
    """ViT-Prisma's, whose b_enc is not used."""
    h = (x - w["b_dec"]) @ w["W_enc"]
    codes = (h + w["b_gate"] > 0) * (h * w["r_mag"].exp() + w["b_mag"]).clamp(min=0)
    return codes, codes @ w["W_dec"] + w["b_dec"]


def overcomplete(w, x):
    prefix = "encoder.final_block.0."
    scores = (x @ w[f"{prefix}weight"].T + w[f"{prefix}bias"]).clamp(min=0)
    codes = scores * (scores >= 1.5)
    return codes, codes @ w["dictionary._weights"] * w["dictionary.multiplier"].exp()


def release(w, x):
    norm = x.norm(dim=1, keepdim=True)
    scores = (x / norm) @ (w["concept"] @ w["k"]).T
    codes = torch.where(scores > naive_sparsemax(scores), scores, 0)
    return codes, codes @ (w["concept"] @ w["v"]) * norm


@dataclasses.dataclass
class Case:
    write: Callable
    shapes: dict
    formula: Callable
    cfg: dict = dataclasses.field(default_factory=dict)
    reads: dict = dataclasses.field(default_factory=dict)
    lost: tuple[str, ...] = ()  # a part of each sentence


def learnt(name, shapes, formula, lost=(), **cfg):
    """A case of dictionary_learning."""
    reads = {"lm_name": "pythia", "layer": 3}
    cfg = {"dict_class": name, **reads, **cfg}
    return Case(foreign.dictionary_learning, shapes, formula, cfg, reads, lost)


def visual(name, rule, file, about, **shapes):
    """A case of visaebench."""

    def write(folder, cfg, state):
        return foreign.visaebench(folder, cfg, state, file, about)

    formula = linear(rule, (*FACTORED, "decoder.bias"), centred=False)
    cfg = {"activation": name, "threshold": 1.25, "backbone": "clip_vitb16"}
    shapes = {**SIMPLE, "decoder.bias": (D,), **shapes}
    return Case(write, shapes, formula, cfg, {"backbone": "clip_vitb16"}, ("standardises",))


FACTORED = ("encoder.weight", "encoder.bias", "decoder.weight")
BIASED = {**LINEAR, "b_dec": (D,)}
GATE = {"decoder_bias": (D,), "r_mag": (M,), "gate_bias": (M,), "mag_bias": (M,)}
COUNTS = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(-1.0)}
HOOK = {"hook_point": "blocks.9.hook_resid_post"}
OF_TOPK = {"activation_fn_kwargs": {"k": K}}
UNIT_ROWS = {
    "W_dec": torch.nn.functional.normalize(weights(W_dec=(M, D))["W_dec"]),
    "b_dec": (D,),
}
V6 = {"sae_lens_version": "6.5.0", "model_name": "clip", "hook_name": "blocks.10"}
CASES = {
    "AutoEncoder": learnt(
        "AutoEncoder", {**LINEAR, "bias": (D,)}, linear(relu, (*FACTORED, "bias"))
    ),
    "AutoEncoderNew": learnt(
        "AutoEncoderNew",
        {**LINEAR, "decoder.bias": (D,)},
        linear(relu, (*FACTORED, "decoder.bias"), centred=False),
    ),
    "GatedAutoEncoder": learnt(
        "GatedAutoEncoder", {n: s for n, s in LINEAR.items() if n != "encoder.bias"} | GATE, gated
    ),
    "JumpReluAutoEncoder": learnt(  # some of its thresholds are negative
        "JumpReluAutoEncoder",
        {**MATRICES, "threshold": (M,)},
        linear(
            lambda w, s: s.clamp(min=0) * (s > w["threshold"] * w["W_dec"].norm(dim=1)),
            centred=False,
            rows=True,
        ),
    ),
    "AutoEncoderTopK": learnt(
        "AutoEncoderTopK", BIASED | COUNTS, linear(topk, (*FACTORED, "b_dec")), k=K
    ),
    "BatchTopKSAE": learnt(
        "BatchTopKSAE",
        BIASED | COUNTS | {"threshold": torch.tensor(0.8)},
        linear(jumprelu(), (*FACTORED, "b_dec")),
        k=K,
    ),
    "BatchTopKSAE, stopped early": learnt(
        "BatchTopKSAE",
        BIASED | COUNTS,
        linear(relu, (*FACTORED, "b_dec")),
        ("stopped before",),
        k=K,
    ),
    "MatryoshkaBatchTopKSAE": learnt(
        "MatryoshkaBatchTopKSAE",
        {**MATRICES, **COUNTS, "threshold": torch.tensor(1.5), "group_sizes": torch.tensor([M])},
        linear(jumprelu()),
        ("groups",),
        k=K,
    ),
    "SAELens 6": Case(
        foreign.saelens,
        MATRICES,
        linear(topk, rows=True),
        {
            "architecture": "topk",
            "k": K,
            "rescale_acts_by_decoder_norm": True,
            "metadata": V6,
            "l1_coefficient": 5,
        },
        {"model_name": "clip", "hook_name": "blocks.10"},
    ),
    "SAELens, layer norm": Case(
        foreign.saelens,
        {**MATRICES, "threshold": (M,)},
        layer_normed(linear(jumprelu(), centred=False)),
        {
            "architecture": "jumprelu",
            "normalize_activations": "layer_norm",
            "apply_b_dec_to_input": False,
        },
    ),
    "SAELens's abstopk": Case(
        foreign.saelens,
        MATRICES,
        linear(abs_topk, rows=True),
        {"architecture": "abstopk", "k": K, "rescale_acts_by_decoder_norm": True},
    ),
    "SAELens's matching pursuit": Case(
        foreign.saelens,
        UNIT_ROWS,
        pursuit(D, 1.5, repeats=False),
        {"architecture": "matching_pursuit", "residual_threshold": 1.5, "dtype": "float32"},
    ),
    "SAELens's matching pursuit without stops": Case(
        foreign.saelens,
        UNIT_ROWS | {"b_dec": torch.zeros(D)},
        pursuit(9),
        {
            "architecture": "matching_pursuit",
            "max_iterations": 9,
            "residual_threshold": 0.0,
            "stop_on_duplicate_support": False,
            "apply_b_dec_to_input": False,
        },
    ),
    "SAELens before 6": Case(
        foreign.saelens,
        {**MATRICES, "scaling_factor": (M,)},
        linear(topk, centred=False),
        {
            "activation_fn_str": "topk",
            "apply_b_dec_to_input": False,
            "finetuning_scaling_factor": True,
            "prepend_bos": True,
            **OF_TOPK,
            **HOOK,
        },
        HOOK,
    ),
    "SAELens, constant norms": Case(
        foreign.saelens,
        {**MATRICES, "threshold": (M,)},
        linear(jumprelu(), unit=True),
        {"architecture": "jumprelu", "normalize_activations": "constant_norm_rescale"},
    ),
    "early SAELens": Case(
        foreign.container,
        {**MATRICES, "scaling_factor": (M,)},
        linear(relu, unit=True),
        {"normalize_activations": "constant_norm_rescale", "finetuning_method": "scale"},
    ),
    "sparsify": Case(
        foreign.sparsify,
        SPARSIFY,
        linear(topk, ("encoder.weight", "encoder.bias", "W_dec", "b_dec")),
        {"normalize_decoder": True, "expansion_factor": 4},
    ),
    "visaebench topk": visual("topk", topk, "sae.pt", "config.json"),
    "visaebench batchtopk": visual(
        "batchtopk", lambda w, s: s * (s >= 1.25), "model.safetensors", "config.yaml"
    ),
    "visaebench jumprelu": visual(
        "jumprelu", jumprelu("jump_thresholds"), "sae.pt", "config.yml", jump_thresholds=(M,)
    ),
    "overcomplete's names": Case(
        foreign.visaebench,
        {
            "encoder.final_block.0.weight": (M, D),
            "encoder.final_block.0.bias": (M,),
            "dictionary._weights": (M, D),
            "dictionary.multiplier": (),
            "_running_threshold": torch.tensor(1.5),
        },
        overcomplete,
        {"activation": "BatchTopK"},
        lost=("standardises",),
    ),
}
MEAN = weights(mean=(D,))["mean"]
NO_BIAS = {**MATRICES, "b_enc": torch.zeros(M)}
SCALED = {"mean_center": MEAN, "scaling_factor": np.float64(0.5), "epoch": 30}
SAEV = ("scale_mean",)


def activation(kind: str, /, **options) -> dict:
    """A header of saev, with the options of its activation."""
    return {"cfg": {"activation": {"cls": kind, "params": options}, "d_model": D, "d_sae": M}}


CASES |= {
    "BatchTopK's topk": Case(
        foreign.batchtopk,
        NO_BIAS,
        linear(topk),
        {"model_name": "gpt2-small", "layer": 8, "input_unit_norm": False, "dtype": "float32"},
        {"model_name": "gpt2-small", "layer": 8},
    ),
    "BatchTopK's topk of tokens standardised one by one": Case(
        foreign.batchtopk, NO_BIAS, layer_normed(linear(topk)), {"input_unit_norm": True}
    ),
    "BatchTopK's topk, with b_enc": Case(
        foreign.batchtopk, MATRICES, linear(topk), {"use_encoder_bias": True}
    ),
    "BatchTopK's jumprelu": Case(
        foreign.batchtopk,
        {**MATRICES, "jumprelu.log_threshold": (M,)},
        linear(lambda w, s: s * (s > w["jumprelu.log_threshold"].exp()), centred=False),
        {"sae_type": "jumprelu", "bandwidth": 0.001},
    ),
    "BatchTopK's nested groups": Case(
        foreign.batchtopk,
        {**NO_BIAS, "threshold": torch.tensor(1.5)},
        linear(jumprelu()),
        {"sae_type": "global-matryoshka-topk", "group_sizes": [8, 32]},
        lost=("groups",),
    ),
    "BatchTopK's vanilla, tied, in one file": Case(
        foreign.container,
        MATRICES,
        lambda w, x: linear(relu)(w | {"W_dec": w["W_enc"].T}, x),
        {"sae_type": "vanilla", "act_size": D, "dict_size": M, "tied_weights": True, "l1_coeff": 1},
    ),
    "ViT-Prisma's folder": Case(
        foreign.prisma,
        MATRICES,
        linear(topk, unit=True),
        {
            "activation_fn_str": "topk",
            "normalize_activations": "constant_norm_rescale",
            **OF_TOPK,
            **HOOK,
        },
        HOOK,
    ),
    "ViT-Prisma's gated": Case(
        foreign.prisma,
        {**MATRICES, "b_gate": (M,), "r_mag": (M,), "b_mag": (M,)},
        gated_once,
        {"architecture": "gated", "is_training": False, "cls_token_only": True},
        {"cls_token_only": True},
    ),
    "saev before schemas": Case(
        foreign.saev,
        MATRICES,
        linear(relu),
        {"schema": None, "cfg": {"d_vit": D, "exp_factor": 2, "sparsity_coeff": 1e-4, "seed": 1}},
        lost=(*SAEV, "b_dec is subtracted"),
    ),
    "saev's schema 1": Case(
        foreign.saev,
        MATRICES,
        linear(topk, centred=False),
        {"schema": 1, "cls": "TopK", "cfg": {"d_vit": D, "exp_factor": 2, "top_k": K}},
        lost=(*SAEV, "negative codes"),
    ),
    "saev's relu": Case(
        foreign.saev,
        MATRICES,
        linear(relu, centred=False),
        {"schema": 2, **activation("Relu", sparsity={"coeff": 4e-4})},
        lost=SAEV,
    ),
    "saev's topk": Case(
        foreign.saev,
        MATRICES,
        linear(topk, centred=False),
        activation("TopK", top_k=K, kind="top-k", aux={"cls": "NoAux", "params": {}}),
        lost=(*SAEV, "negative codes"),
    ),
    "saev's batchtopk": Case(
        foreign.saev,
        {**MATRICES, "activation.threshold": torch.tensor(1.5)},
        linear(jumprelu("activation.threshold"), centred=False),
        activation("BatchTopK", top_k=K, momentum=0.1),
        lost=SAEV,
    ),
    "MSAE's relu": Case(foreign.msae, MSAE, scaled(relu), {**SCALED}, {"tokens": "cc3m"}),
    "MSAE": Case(
        foreign.msae,
        {**MSAE, "latents_activation_frequency": torch.zeros(M, dtype=torch.long)},
        scaled(topk),
        {**SCALED, "name": f"{M}_{D}_TopKReLU_{K}_RW_False_False_0.0_cc3m_ViT-L~14.pth"},
        {"tokens": "cc3m_ViT-L~14"},
        (f"k={K}",),
    ),
    "MSAE's topk, tied": Case(
        foreign.msae,
        {name: shape for name, shape in MSAE.items() if name != "decoder"},
        scaled(topk, tied=True),
        {**SCALED, "name": f"{M}_{D}_TopK_{K}_True_False_0.0.pt"},
        lost=(f"k={K}", "negative codes"),
    ),
    "clipscope": Case(foreign.clipscope, CLIPSCOPE, no_negative_scores, lost=("negative codes",)),
}
# TopK as SAELens has spelt it.
for i, spelling in enumerate(
    (
        {"activation_fn_str": "topk", **OF_TOPK},
        {"activation_fn": "topk", "architecture": "standard", **OF_TOPK},
        {"architecture": "topk", "activation_fn_str": "topk", **OF_TOPK},
        {"architecture": "topk", "k": K},
        {"activation_fn_str": "topk", "k": K},
    )
):
    for write in (foreign.container, foreign.saelens):
        centred = (i + (write is foreign.container)) % 2 == 0
        more = {"apply_b_dec_to_input": centred, "is_transcoder": False, "noise_scale": 0.0}
        cfg = more | spelling | HOOK | {"hook_head_index": None, "lr": 1e-3}
        formula = linear(topk, centred=centred)
        CASES[f"topk {i}, {write.__name__}"] = Case(write, MATRICES, formula, cfg, HOOK)


@pytest.mark.parametrize("name", CASES)
def test_codes_and_reconstruction_are_those_of_its_library(name, tmp_path, x):
    case = CASES[name]
    state = weights(**case.shapes)
    found = read(case.write(tmp_path, case.cfg, state))
    agree(found.sae, x, *case.formula({n: t.double() for n, t in state.items()}, x.double()))
    assert found.reads == case.reads
    assert len(found.lost) == len(case.lost)
    for sentence, part in zip(found.lost, case.lost, strict=True):
        assert part in sentence
    assert not found.sae.training
    if "topk" in found.sae.config["activation"]:
        assert found.sae.config["k"] == K


# --- {"cfg", "state_dict"} with an object of the training code's own class ---

CFG = {"d_in": D, "d_sae": M, "model_name": "openai/clip-vit-base-patch16", "block_layer": -2}
OF_TOKENS = {"model_name": "openai/clip-vit-base-patch16", "block_layer": -2}
RUNNER = "src.sae_training.config.ViTSAERunnerConfig"


def test_the_papers_release(tmp_path, monkeypatch, x, caplog):
    state = weights(**RELEASE, W_enc=(D, M), log_threshold=())
    cfg = foreign.pickled(monkeypatch, RUNNER, CFG | {"gated_sae": False})
    path = foreign.container(tmp_path, cfg, state)
    del sys.modules["src.sae_training.config"]
    found = read(path)
    assert "src.sae_training.config" not in sys.modules  # their code is never imported
    agree(found.sae, x, *release({name: t.double() for name, t in state.items()}, x.double()))
    assert found.format == "Sparsemax SAE's release"
    assert found.reads == OF_TOKENS
    assert "10 %" in found.lost[0]
    assert "W_enc, log_threshold" in found.lost[1]
    with caplog.at_level(logging.WARNING, "clipsae"):
        clipsae.load(path)
    assert [record.getMessage() for record in caplog.records] == list(found.lost)


def test_patchsae(tmp_path, monkeypatch, x):
    state = weights(**MATRICES)
    more = {"lr": 4e-4, "use_ghost_grads": True, "mse_cls_coefficient": 1.0}
    foreign.container(tmp_path, foreign.pickled(monkeypatch, RUNNER, CFG | more), state)
    found = read(tmp_path)  # the only checkpoint of its folder
    w = {name: t.double() for name, t in state.items()}
    agree(found.sae, x, *linear(relu)(w, x.double()))
    assert (found.format, found.reads, found.lost) == ("PatchSAE", OF_TOKENS, ())
    # Its config may be a dict, and be called config.
    torch.save({"config": CFG, "state_dict": state}, tmp_path / "sae.pt")
    assert read(tmp_path).reads == OF_TOKENS


@pytest.mark.parametrize(
    "held",
    [
        {},
        {"cfg": {}},
        {"cfg": {"d_in": D, "d_sae": M, "lr": 1e-3, "expansion_factor": 4, "seed": 1}},
        {"config": {"model_name": "clip", "hook_point": "blocks.9"}, "optimizer": {"lr": 1}},
    ],
)
def test_weights_whose_config_names_no_activation_are_not_guessed_at(tmp_path, held):
    torch.save({"state_dict": weights(**MATRICES), **held}, tmp_path / "sae.pt")
    with pytest.raises(ValueError, match="does not say which activation") as said:
        read(tmp_path / "sae.pt")
    assert "activation_fn_str, architecture" in str(said.value)
    assert "\n" not in str(said.value)
    for word in ({"architecture": "standard"}, {"activation_fn": "relu"}, {"block_layer": -2}):
        torch.save({"state_dict": weights(**MATRICES), "cfg": word}, tmp_path / "sae.pt")
        assert read(tmp_path / "sae.pt").sae.config["activation"] == "relu"


# --- whole objects of overcomplete ---


def of_overcomplete(monkeypatch, name):
    """An SAE as `torch.save` pickles it, with its W, b and D, float64."""
    w = weights(W=(M, D), b=(M,), D=(M, D), points=(60, D), mix=(M, 60), relax=(M, D))
    w64 = {key: t.double() for key, t in w.items()}
    W, b, D_ = w64["W"], w64["b"], w64["D"]

    def make(kind, *args, **attributes):
        return foreign.module(monkeypatch, kind, *args, **attributes)

    linear = torch.nn.Linear(D, M)
    linear.weight.data, linear.bias.data = w["W"], w["b"]
    norm = torch.nn.Identity()
    own, fixed = {}, w["D"]
    dictionary = make("dictionary.DictionaryLayer", own, _fused_dictionary=fixed, nb_concepts=M)
    kind, more, parameters = "topk_sae.TopKSAE", {"top_k": K}, {}
    if name == "JumpSAE, batch normalised, in training mode":
        norm = torch.nn.BatchNorm1d(M).eval()
        for tensor, by in ((norm.running_mean, 0), (norm.running_var, 2), (norm.bias.data, 0)):
            tensor.copy_(w["b"].flip(0).abs() + by)
        scale = (w["b"].double().flip(0).abs() + 2 + 1e-5).sqrt().reciprocal()
        shift = w["b"].double().flip(0).abs()
        W, b = W * scale[:, None], (b - shift) * scale + shift
        kind, more = "jump_sae.JumpSAE", {"bandwidth": torch.tensor(1e-3)}
        parameters = {"thresholds": w["b"]}
        l2 = foreign.instance(monkeypatch, "overcomplete.sae.dictionary.normalize_l2")
        own |= {"_weights": w["D"], "multiplier": torch.tensor(0.3)}
        vars(dictionary).update(training=True, normalization=type(l2), device="cpu")
        D_ = D_ / D_.norm(dim=1, keepdim=True) * torch.tensor(0.3).double().exp()
    elif name == "RATopKSAE in training mode":
        own |= {"C": w["points"], "W": w["mix"], "Relax": w["relax"]}
        own |= {"multiplier": torch.tensor(0.0)}
        dictionary = make("archetypal_dictionary.RelaxedArchetypalDictionary", own, delta=1.0)
        vars(dictionary).update(training=True, in_dimensions=D)
        kind = "rasae.RATopKSAE"
        rows = []
        for mix, relax in zip(w64["mix"].clamp(min=0), w64["relax"], strict=True):
            rows.append(mix / mix.sum() @ w64["points"] + relax * min(1, 1 / relax.norm().item()))
        D_ = torch.stack(rows)
    elif name == "MpSAE":
        kind, more = "mp_sae.MpSAE", {"k": K, "dropout": None}
        own |= {"_weights": w["D"], "multiplier": torch.tensor(0.0)}
        l2 = foreign.instance(monkeypatch, "overcomplete.sae.dictionary.normalize_l2")
        vars(dictionary).update(training=True, normalization=type(l2))
        D_ = D_ / D_.norm(dim=1, keepdim=True)
    encoder = make(
        "modules.MLPEncoder",
        {},
        {
            "mlp_blocks": torch.nn.ModuleList(),
            "final_block": torch.nn.Sequential(linear, norm),
            "final_activation": torch.nn.ReLU(),
        },
        hidden_activation=torch.nn.ReLU,
        norm_layer=torch.nn.Identity,
        nb_blocks=0,
    )
    if name == "MpSAE":
        encoder = make("modules.IdentityEncoder", input_size=D)
    elif name == "BatchTopKSAE, tied":
        encoder = make("modules.TieableEncoder", {"weight": None, "bias": w["b"]})
        vars(encoder)["_modules"] = {"tied_to": dictionary}
        W, kind = D_, "batchtopk_sae.BatchTopKSAE"
        more = {"top_k": 900, "running_threshold": torch.tensor(1.5), "threshold_momentum": 0.9}
    parts = {"encoder": encoder, "dictionary": dictionary}
    sae = make(kind, parameters, parts, device="cpu", fitted=False, **more)
    return sae, W, b, D_, w64


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("TopKSAE", topk),
        ("JumpSAE, batch normalised, in training mode", lambda w, s: s * (s >= w["b"].exp())),
        ("RATopKSAE in training mode", topk),
        ("BatchTopKSAE, tied", lambda w, s: s * (s >= 1.5)),
        ("MpSAE", None),
    ],
)
def test_a_whole_sae_of_overcomplete(tmp_path, monkeypatch, x, name, rule):
    with monkeypatch.context() as patched:
        sae, W, b, D_, w = of_overcomplete(patched, name)
        torch.save(sae, tmp_path / "sae.pth")
    found = read(tmp_path / "sae.pth")
    assert "overcomplete" not in sys.modules or hasattr(sys.modules["overcomplete"], "__file__")
    if name == "MpSAE":
        codes, _ = pursuit(K, rows="D")({"D": D_}, x.double())
    else:
        codes = rule(w, x.double() @ W.T + b)
    agree(found.sae, x, codes, codes @ D_)
    assert found.format == "overcomplete"
    assert found.lost == () or "whole batch" in found.lost[0] or "positive product" in found.lost[0]


def test_vit_prismas_own_config_object(tmp_path, monkeypatch, x):
    """As its training writes it, dtype, device and the model's own config among the values."""
    model = foreign.pickled(monkeypatch, "vit_prisma.configs.HookedViTConfig.HookedViTConfig", {})
    values = {
        "model_class_name": "HookedViT",
        "vit_model_cfg": model,
        "activation_fn_str": "topk",
        "normalize_activations": "none",
        "hook_point_head_index": None,
        "cls_token_only": False,
        "d_out": D,
        "is_transcoder": False,
        "use_ghost_grads": True,
    }
    name = "vit_prisma.sae.config.VisionModelSAERunnerConfig"
    cfg = foreign.pickled(monkeypatch, name, values | OF_TOPK)
    state = weights(**MATRICES)
    found = read(foreign.container(tmp_path, cfg, state))
    w = {key: t.double() for key, t in state.items()}
    agree(found.sae, x, *linear(topk)(w, x.double()))
    cfg.normalize_activations = "layer_norm"  # its default
    found = read(foreign.container(tmp_path, cfg, state))
    agree(found.sae, x, *layer_normed(linear(topk))(w, x.double()))


def test_saelens_by_name_needs_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(ValueError, match=r"pip install 'clipsae\[peers\]'"):
        clipsae.load("saelens:some-release/some/id")


def test_one_checkpoint_of_several_must_be_named(tmp_path):
    for name in ("a.pt", "b.pt"):
        foreign.container(tmp_path, {}, weights(**MATRICES)).rename(tmp_path / name)
    with pytest.raises(ValueError, match=r"2 checkpoints: name one, such as .*a\.pt"):
        clipsae.load(tmp_path)
    assert clipsae.load(tmp_path / "b.pt").latents == M


def test_a_file_of_another_kind_does_not_stand_for_its_folder(tmp_path):
    foreign.visaebench(tmp_path, {}, weights(**SIMPLE))
    assert clipsae.load(tmp_path / "config.json").latents == M
    (tmp_path / "sae.pkl.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"sae\.pkl\.gz has no known format"):
        clipsae.load(tmp_path / "sae.pkl.gz")
