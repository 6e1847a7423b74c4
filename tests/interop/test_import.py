"""Files as other libraries write them, made by hand; codes and reconstructions are compared with
their formulas, written out here in float64."""

import json
import logging
import pickle
import sys
import types

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

import clipsae
from clipsae.interop import read

D, M, K = 12, 40, 5


def weights(**shapes) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def agree(sae, x: Tensor, codes: Tensor, reconstruction: Tensor) -> None:
    """The imported SAE against formulas; some latents must act and some not."""
    share = (codes != 0).double().mean()
    assert 0.02 < share < 0.98
    found = sae(x)
    assert torch.allclose(found.codes.double(), codes, atol=1e-4, rtol=1e-4)
    assert torch.allclose(found.reconstruction.double(), reconstruction, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.codes != 0, codes != 0)


def topk(scores: Tensor, k: int) -> Tensor:
    rows = [torch.where(row >= row.sort(descending=True).values[k - 1], row, 0) for row in scores]
    return torch.stack(rows)


def naive_sparsemax(scores: Tensor) -> Tensor:
    """tau by trying every size of the support."""
    taus = []
    for row in scores:
        ranked = row.sort(descending=True).values
        sizes = [r for r in range(1, len(row) + 1) if ranked[r - 1] > (ranked[:r].sum() - 1) / r]
        taus.append((ranked[: sizes[-1]].sum() - 1) / sizes[-1])
    return torch.stack(taus)[:, None]


# --- {"cfg", "state_dict"}: PatchSAE's and the Sparsemax SAE's own ---


@pytest.fixture
def theirs(monkeypatch):
    """A pickled object of a class of their training code, as their checkpoints hold one."""
    module = types.ModuleType("src.sae_training.config")

    class ViTSAERunnerConfig:
        pass

    ViTSAERunnerConfig.__module__ = module.__name__
    ViTSAERunnerConfig.__qualname__ = "ViTSAERunnerConfig"
    module.ViTSAERunnerConfig = ViTSAERunnerConfig
    for name in ("src", "src.sae_training"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def save(path, cfg, state):
        held = ViTSAERunnerConfig()
        vars(held).update(cfg, dtype=torch.float32, device=torch.device("cpu"))
        torch.save({"cfg": held, "state_dict": state}, path)
        return path

    return save


CFG = {"d_in": D, "d_sae": M, "model_name": "openai/clip-vit-base-patch16", "block_layer": -2}


def test_the_papers_release(tmp_path, theirs, x, caplog):
    state = weights(concept=(M, D), k=(D, D), v=(D, D), W_enc=(D, M), log_threshold=())
    path = theirs(tmp_path / "release.pt", CFG | {"gated_sae": False}, state)
    found = read(path)
    w = {name: t.double() for name, t in state.items()}
    norm = x.double().norm(dim=1, keepdim=True)
    scores = (x.double() / norm) @ (w["concept"] @ w["k"]).T
    codes = torch.where(scores > naive_sparsemax(scores), scores, 0)
    agree(found.sae, x, codes, codes @ (w["concept"] @ w["v"]) * norm)
    assert found.format == "Sparsemax SAE's release"
    assert found.reads == {"model_name": "openai/clip-vit-base-patch16", "block_layer": -2}
    assert any("W_enc, log_threshold" in sentence for sentence in found.lost)
    assert any("10 %" in sentence for sentence in found.lost)
    with caplog.at_level(logging.WARNING, "clipsae"):
        clipsae.load(path)
    assert [record.getMessage() for record in caplog.records] == list(found.lost)


def test_patchsae(tmp_path, theirs, x):
    state = weights(W_enc=(D, M), W_dec=(M, D), b_enc=(M,), b_dec=(D,))
    theirs(tmp_path / "patchsae.pt", CFG, state)
    found = read(tmp_path)  # the only checkpoint of its folder
    w = {name: t.double() for name, t in state.items()}
    codes = ((x.double() - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).clamp(min=0)
    agree(found.sae, x, codes, codes @ w["W_dec"] + w["b_dec"])
    assert found.lost == ()
    # Its config may be a dict, and be called config.
    torch.save({"config": CFG, "state_dict": state}, tmp_path / "patchsae.pt")
    assert read(tmp_path).reads == found.reads


# --- dictionary_learning ---


def dictionary_learning(folder, name, state, **trainer):
    config = {"trainer": {"dict_class": name, "layer": 3, "lm_name": "pythia", **trainer}}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(state, folder / "ae.pt")
    return read(folder)


LINEAR = {"encoder.weight": (M, D), "encoder.bias": (M,), "decoder.weight": (D, M)}
MATRICES = {"W_enc": (D, M), "b_enc": (M,), "W_dec": (M, D), "b_dec": (D,)}


def of_linear(state):
    return [state[name].double() for name in LINEAR]


def test_dictionary_learning_autoencoder(tmp_path, x):
    state = weights(**LINEAR, bias=(D,))
    encoder, bias, decoder = of_linear(state)
    b = state["bias"].double()
    codes = ((x - b) @ encoder.T + bias).clamp(min=0)
    found = dictionary_learning(tmp_path, "AutoEncoder", state)
    agree(found.sae, x, codes, codes @ decoder.T + b)
    assert found.reads == {"lm_name": "pythia", "layer": 3}


def test_dictionary_learning_new_autoencoder_encodes_x_itself(tmp_path, x):
    state = weights(**LINEAR, **{"decoder.bias": (D,)})
    encoder, bias, decoder = of_linear(state)
    codes = (x.double() @ encoder.T + bias).clamp(min=0)
    found = dictionary_learning(tmp_path, "AutoEncoderNew", state)
    agree(found.sae, x, codes, codes @ decoder.T + state["decoder.bias"].double())


def test_dictionary_learning_gated(tmp_path, x):
    shapes = {"decoder_bias": (D,), "r_mag": (M,), "gate_bias": (M,), "mag_bias": (M,)}
    state = weights(**LINEAR, **shapes)
    del state["encoder.bias"]
    w = {name: t.double() for name, t in state.items()}
    h = (x - w["decoder_bias"]) @ w["encoder.weight"].T
    norm = w["decoder.weight"].norm(dim=0)
    magnitude = (w["r_mag"].exp() * h + w["mag_bias"]).clamp(min=0)
    codes = (h + w["gate_bias"] > 0) * magnitude * norm
    reconstruction = (codes / norm) @ w["decoder.weight"].T + w["decoder_bias"]
    agree(dictionary_learning(tmp_path, "GatedAutoEncoder", state).sae, x, codes, reconstruction)


def test_dictionary_learning_jumprelu(tmp_path, x):
    state = weights(**MATRICES, threshold=(M,))  # some of them negative
    w = {name: t.double() for name, t in state.items()}
    scores = x.double() @ w["W_enc"] + w["b_enc"]
    norm = w["W_dec"].norm(dim=1)
    codes = (scores * (scores > w["threshold"])).clamp(min=0) * norm
    reconstruction = (codes / norm) @ w["W_dec"] + w["b_dec"]
    agree(dictionary_learning(tmp_path, "JumpReluAutoEncoder", state).sae, x, codes, reconstruction)


def test_dictionary_learning_topk(tmp_path, x):
    more = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(-1.0)}
    state = weights(**LINEAR, b_dec=(D,)) | more
    encoder, bias, decoder = of_linear(state)
    codes = topk(((x - state["b_dec"].double()) @ encoder.T + bias).clamp(min=0), K)
    found = dictionary_learning(tmp_path, "AutoEncoderTopK", state, k=K)
    agree(found.sae, x, codes, codes @ decoder.T + state["b_dec"].double())
    assert found.sae.config["k"] == K
    assert found.lost == ()


@pytest.mark.parametrize("tau", [0.8, -1.0])
def test_dictionary_learning_batch_topk(tmp_path, x, tau):
    state = weights(**LINEAR, b_dec=(D,)) | {"k": torch.tensor(K), "threshold": torch.tensor(tau)}
    encoder, bias, decoder = of_linear(state)
    scores = ((x - state["b_dec"].double()) @ encoder.T + bias).clamp(min=0)
    codes = scores * (scores > state["threshold"])
    found = dictionary_learning(tmp_path, "BatchTopKSAE", state, k=K)
    agree(found.sae, x, codes, codes @ decoder.T + state["b_dec"].double())
    assert bool(found.lost) == (tau < 0)


def test_dictionary_learning_matryoshka(tmp_path, x):
    more = {"k": torch.tensor(K), "threshold": torch.tensor(1.5), "group_sizes": torch.tensor([M])}
    state = weights(**MATRICES) | more
    w = {name: t.double() for name, t in state.items()}
    scores = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).clamp(min=0)
    codes = scores * (scores > 1.5)
    found = dictionary_learning(tmp_path, "MatryoshkaBatchTopKSAE", state, k=K)
    agree(found.sae, x, codes, codes @ w["W_dec"] + w["b_dec"])
    assert any("groups" in sentence for sentence in found.lost)


# --- SAELens, without the library ---


def saelens(folder, cfg, state):
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": M, **cfg}))
    save_file(state, folder / "sae_weights.safetensors")
    return read(folder)


def test_saelens_of_version_6(tmp_path, x):
    state = weights(**MATRICES)
    w = {name: t.double() for name, t in state.items()}
    metadata = {"sae_lens_version": "6.5.0", "model_name": "clip", "hook_name": "blocks.10"}
    cfg = {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True}
    found = saelens(tmp_path, cfg | {"metadata": metadata, "l1_coefficient": 5}, state)
    norm = w["W_dec"].norm(dim=1)
    codes = topk((((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norm).clamp(min=0), K)
    agree(found.sae, x, codes, (codes / norm) @ w["W_dec"] + w["b_dec"])
    assert found.reads == {"model_name": "clip", "hook_name": "blocks.10"}
    assert found.lost == ()


def test_saelens_before_version_6(tmp_path, x):
    state = weights(**MATRICES, scaling_factor=(M,))
    w = {name: t.double() for name, t in state.items()}
    cfg = {
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "apply_b_dec_to_input": False,
        "finetuning_scaling_factor": True,
        "hook_point": "blocks.5.hook_resid_post",
        "prepend_bos": True,
    }
    found = saelens(tmp_path, cfg, state)
    codes = topk((x.double() @ w["W_enc"] + w["b_enc"]).clamp(min=0), K)
    agree(found.sae, x, codes, (codes * w["scaling_factor"]) @ w["W_dec"] + w["b_dec"])
    assert found.reads == {"hook_point": "blocks.5.hook_resid_post"}


def test_saelens_constant_norm_and_thresholds(tmp_path, x):
    state = weights(**MATRICES, threshold=(M,))
    w = {name: t.double() for name, t in state.items()}
    cfg = {"architecture": "jumprelu", "normalize_activations": "constant_norm_rescale"}
    found = saelens(tmp_path, cfg, state)
    factor = D**0.5 / x.double().norm(dim=1, keepdim=True)
    scores = (x * factor - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    codes = scores.clamp(min=0) * (scores > w["threshold"])
    agree(found.sae, x, codes, (codes @ w["W_dec"] + w["b_dec"]) / factor)


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        ({"architecture": "transcoder"}, "'transcoder' has no counterpart here"),
        ({"architecture": ["standard"]}, "has no counterpart here"),
        ({"activation_fn": "tanh-relu"}, "activation_fn='tanh-relu'"),
        ({"normalize_activations": "layer_norm"}, "'layer_norm' has no counterpart"),
        ({"architecture": "topk"}, "k=None"),
        ({"architecture": "topk", "k": M + 1}, f"k={M + 1} is more than the {M} latents"),
        ({"architecture": "batchtopk", "k": 3}, "holds no topk_threshold"),
        ({"architecture": "gated"}, "holds no b_gate"),
        ({"d_in": D + 1}, f"d_in={D + 1}: the weights have {D}"),
        ({"d_sae": "many"}, "d_sae='many'"),
    ],
)
def test_saelens_refusals(tmp_path, cfg, words):
    with pytest.raises(ValueError, match=r".") as refused:
        saelens(tmp_path, cfg, weights(**MATRICES))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_saelens_by_name_needs_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(ValueError, match=r"pip install 'clipsae\[peers\]'"):
        clipsae.load("saelens:some-release/some/id")


# --- visaebench ---

SIMPLE = {"encoder.weight": (M, D), "encoder.bias": (M,), "decoder.weight": (M, D)}


@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize(
    ("file", "about"),
    [("sae.pt", "config.json"), ("model.safetensors", "config.yaml"), ("sae.pt", "config.yml")],
)
def test_visaebench(tmp_path, x, name, file, about):
    state = weights(**SIMPLE, **{"decoder.bias": (D,), "jump_thresholds": (M,)})
    if name != "jumprelu":
        del state["jump_thresholds"]
    w = {n: t.double() for n, t in state.items()}
    scores = (x.double() @ w["encoder.weight"].T + w["encoder.bias"]).clamp(min=0)
    config = {"activation": name, "k": K, "threshold": 1.25, "backbone": "clip_vitb16"}
    write = json.dumps if about == "config.json" else yaml.safe_dump
    (tmp_path / about).write_text(write(config))
    torch.save(state, tmp_path / file) if file == "sae.pt" else save_file(state, tmp_path / file)
    codes = {
        "topk": lambda: topk(scores, K),
        "batchtopk": lambda: scores * (scores >= 1.25),
        "jumprelu": lambda: scores * (scores > w["jump_thresholds"]),
    }[name]()
    found = read(tmp_path)
    agree(found.sae, x, codes, codes @ w["decoder.weight"] + w["decoder.bias"])
    assert found.reads == {"backbone": "clip_vitb16"}
    assert "standardises" in found.lost[0]


def test_visaebench_with_overcompletes_names(tmp_path, x):
    shapes = {
        "encoder.final_block.0.weight": (M, D),
        "encoder.final_block.0.bias": (M,),
        "dictionary._weights": (M, D),
        "dictionary.multiplier": (),
    }
    state = weights(**shapes)
    torch.save(state | {"_running_threshold": torch.tensor(1.5)}, tmp_path / "sae.pt")
    (tmp_path / "config.json").write_text('{"sae_type": "BatchTopK", "k": 5}')
    encoder, bias, decoder, multiplier = (t.double() for t in state.values())
    scores = (x.double() @ encoder.T + bias).clamp(min=0)
    codes = scores * (scores >= 1.5)
    agree(read(tmp_path).sae, x, codes, codes @ decoder * multiplier.exp())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("!!python/object/apply:os.system ['false']", "is not valid YAML: could not determine"),
        ("- topk", "holds a list: expected a YAML object"),
        ("activation: topk\nk: many", "config.yaml: k='many': expected a whole number"),
    ],
)
def test_a_config_that_is_none_is_refused_in_a_sentence(tmp_path, text, words):
    torch.save(weights(**SIMPLE), tmp_path / "sae.pt")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r".") as refused:
        clipsae.load(tmp_path)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


# --- files that mean harm, or are damaged ---


def test_a_file_of_another_kind_does_not_stand_for_its_folder(tmp_path):
    torch.save(weights(**SIMPLE), tmp_path / "sae.pt")
    (tmp_path / "config.json").write_text('{"k": 5}')
    assert clipsae.load(tmp_path / "config.json").latents == M
    (tmp_path / "sae.pkl.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"sae\.pkl\.gz is of no known format"):
        clipsae.load(tmp_path / "sae.pkl.gz")


class Harm:
    """Its unpickling would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


PICKLES = {
    "checkpoint": ("sae.pt", {}),
    "dictionary_learning": ("ae.pt", {"trainer": {"dict_class": "AutoEncoder"}}),
    "visaebench": ("sae.pt", {"activation": "topk", "k": 5}),
}


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("protocol", [None, 2, 4])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, kind, protocol):
    name, config = PICKLES[kind]
    ran = tmp_path / "ran"
    path = tmp_path / name
    held = {"cfg": Harm(ran), "state_dict": weights(W_enc=(D, M)), "x": Harm(ran)}
    if protocol is None:
        torch.save(held, path)
    else:
        path.write_bytes(pickle.dumps(held, protocol))
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    said = "not a pickle of tensors" if protocol == 4 else "asks for exec, which could run code"
    with pytest.raises(ValueError, match=said) as refused:
        clipsae.load(tmp_path)
    assert "\n" not in str(refused.value)
    assert "weights_only" not in str(refused.value)
    assert not ran.exists()
    # It would have run, had it been opened as pickles are.
    pickle.loads(pickle.dumps(held["x"]))
    assert ran.exists()


def test_their_config_class_is_never_imported(tmp_path, theirs):
    state = weights(W_enc=(D, M), W_dec=(M, D), b_enc=(M,), b_dec=(D,))
    path = theirs(tmp_path / "sae.pt", CFG, state)
    del sys.modules["src.sae_training.config"]
    assert clipsae.load(path).latents == M
    assert "src.sae_training.config" not in sys.modules


@pytest.mark.parametrize(
    ("state", "cfg", "words"),
    [
        ({"W_dec": (M + 1, D)}, {}, f"W_dec has shape [{M + 1}, {D}]: expected [{M}, {D}]"),
        ({"W_enc": (M,)}, {}, "expected a matrix"),
        ({"W_enc": (0, M)}, {}, "expected a matrix"),
        ({}, {"gated_sae": True}, "gated_sae=True has no counterpart here: expected False"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, theirs, state, cfg, words):
    shapes = {"W_enc": (D, M), "W_dec": (M, D), "b_enc": (M,), "b_dec": (D,)} | state
    path = theirs(tmp_path / "sae.pt", CFG | cfg, weights(**shapes))
    with pytest.raises(ValueError, match=r".") as refused:
        clipsae.load(path)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "held", [3, {"state_dict": 3}, {"state_dict": {"W_enc": "no"}}, {"state_dict": {}}, {}, None]
)
def test_other_pickles_are_refused(tmp_path, held):
    torch.save(held, tmp_path / "sae.pt")
    with pytest.raises(ValueError, match=r"expected|holds no"):
        clipsae.load(tmp_path)


def test_damaged_and_infinite_files_are_refused(tmp_path, theirs):
    state = weights(W_enc=(D, M), W_dec=(M, D), b_enc=(M,), b_dec=(D,))
    state["W_dec"][0, 0] = torch.inf
    path = theirs(tmp_path / "sae.pt", CFG, state)
    with pytest.raises(ValueError, match="W_dec holds 1 numbers that are NaN or infinite"):
        clipsae.load(path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="is not a pickle of tensors"):
        clipsae.load(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is not a pickle of tensors"):
        clipsae.load(path)


def test_several_checkpoints_in_a_folder_must_be_told_apart(tmp_path, theirs):
    state = weights(W_enc=(D, M), W_dec=(M, D), b_enc=(M,), b_dec=(D,))
    for name in ("a.pt", "b.pt"):
        theirs(tmp_path / name, CFG, state)
    with pytest.raises(ValueError, match=r"2 checkpoints: name one, such as .*a\.pt"):
        clipsae.load(tmp_path)
    assert clipsae.load(tmp_path / "b.pt").latents == M
