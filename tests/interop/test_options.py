"""No option of a foreign config is dropped: it is read, known to decide nothing, or refused by its
name, in every format. Codes are compared with the formulas, in float64."""

import json
import sys
import types

import pytest
import torch
from safetensors.torch import save_file

import clipsae
from clipsae.interop import read
from tests.interop.test_import import (
    CFG,
    LINEAR,
    MATRICES,
    SIMPLE,
    D,
    K,
    M,
    agree,
    topk,
    weights,
)


def container(folder, cfg, state):
    torch.save({"cfg": cfg, "state_dict": state}, folder / "sae.pt")
    return folder / "sae.pt"


def saelens(folder, cfg, state):
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": M, **cfg}))
    save_file(state, folder / "sae_weights.safetensors")
    return folder


def sparsify(folder, cfg, state):
    cfg = {"d_in": D, "k": K, "activation": "topk", "num_latents": 0, "multi_topk": False, **cfg}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file(state, folder / "sae.safetensors")
    return folder


def dictionary_learning(folder, cfg, state):
    trainer = {"dict_class": "AutoEncoder", "lr": 1e-3, **cfg}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    torch.save(state, folder / "ae.pt")
    return folder


def visaebench(folder, cfg, state):
    (folder / "config.json").write_text(json.dumps({"activation": "topk", "k": K, **cfg}))
    torch.save(state, folder / "sae.pt")
    return folder


SPARSIFY = {"encoder.weight": (M, D), "encoder.bias": (M,), "W_dec": (M, D), "b_dec": (D,)}
FORMATS = {
    "container": (container, MATRICES),
    "SAELens": (saelens, MATRICES),
    "sparsify": (sparsify, SPARSIFY),
    "dictionary_learning": (dictionary_learning, {**LINEAR, "bias": (D,)}),
    "visaebench": (visaebench, SIMPLE),
}


def refused(write, folder, cfg, state) -> str:
    with pytest.raises(ValueError, match=r".") as said:
        clipsae.load(write(folder, cfg, state))
    assert "\n" not in str(said.value)
    return str(said.value)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [0, False, 3, "yes", [1], {"a": 1}])
def test_an_unknown_option_is_refused_by_name_in_every_format(tmp_path, name, value):
    write, shapes = FORMATS[name]
    said = refused(write, tmp_path, {"surprise": value}, weights(**shapes))
    assert f"surprise={value!r} is an option that is not known here" in said
    # What is not set decides nothing.
    assert clipsae.load(write(tmp_path, {"surprise": None}, weights(**shapes))).latents == M


@pytest.mark.parametrize("name", FORMATS)
def test_an_unknown_tensor_is_refused_by_name_in_every_format(tmp_path, name):
    write, shapes = FORMATS[name]
    said = refused(write, tmp_path, {}, weights(**shapes, W_skip=(D, D)))
    assert "W_skip is not known here" in said


@pytest.mark.parametrize("more", [{"hparams": {"k": 8}}, {"scaling": 2.0}, {"norm_mean": 3}])
def test_what_lies_beside_a_config_is_refused_by_name(tmp_path, more):
    torch.save({"cfg": {}, "state_dict": weights(**MATRICES), **more}, tmp_path / "sae.pt")
    with pytest.raises(ValueError, match=f"sae.pt: {next(iter(more))}=.* is an option that"):
        clipsae.load(tmp_path)
    torch.save({"state_dict": weights(**MATRICES), "optimizer": {"lr": 1}}, tmp_path / "sae.pt")
    assert "has no config: its weights are read as those of a ReLU SAE" in read(tmp_path).lost[-1]


OF_SAELENS = [
    ({"d_out": D + 1}, f"d_out={D + 1}: the weights have {D}"),
    ({"activation_fn_str": "tanh-relu"}, "activation_fn_str='tanh-relu'"),
    ({"activation_fn_str": "topk"}, "activation_fn_kwargs: k=None"),
    ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 0}}, "k=0"),
    ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2, "sign": 1}}, "sign=1"),
    ({"activation_fn_kwargs": {"k": 4}}, "activation_fn_kwargs: k=4"),
    ({"activation_fn_kwargs": 3}, "activation_fn_kwargs=3"),
    ({"architecture": "topk", "k": 3, "activation_fn_kwargs": {"k": 4}}, "k=3"),
    (
        {"architecture": "gated", "activation_fn": "topk"},
        "activation_fn='topk' has no counterpart",
    ),
    ({"k": 4}, "k=4"),
    ({"top_k": 4}, "top_k=4"),
    ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm'"),
    ({"normalize_activations": "expected_average_only_in"}, "'expected_average_only_in'"),
    ({"normalize_activations": True}, "'expected_average_only_in'"),
    ({"is_transcoder": True}, "is_transcoder=True"),
    ({"transcoder_with_skip_connection": True}, "transcoder_with_skip_connection=True"),
    ({"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input='no'"),
    ({"hook_head_index": 0}, "hook_head_index=0"),
    ({"hook_point_head_index": 2}, "hook_point_head_index=2"),
    ({"metadata": {"hook_head_index": 2}}, "hook_head_index=2"),
    ({"finetuning_scaling_factor": True}, "holds no finetuning_scaling_factor"),
    ({"finetuning_scaling_factor": 1}, "finetuning_scaling_factor=1"),
    ({"noise_scale": 0.1}, "noise_scale=0.1 has no counterpart here: expected 0"),
    ({"use_error_term": True}, "use_error_term=True"),
    ({"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm=True"),
    ({"matryoshka_widths": [4, 8]}, "matryoshka_widths=[4, 8]"),
    ({"reshape_activations": "fold"}, "reshape_activations='fold'"),
    ({"architecture": "crosscoder"}, "architecture='crosscoder'"),
    ({"d_sae": M + 1}, f"d_sae={M + 1}: the weights have {M}"),
]


@pytest.mark.parametrize("name", ["container", "SAELens"])
@pytest.mark.parametrize(("cfg", "words"), OF_SAELENS)
def test_what_decides_saelens_s_codes_is_refused_where_it_is_not_read(tmp_path, name, cfg, words):
    said = refused(FORMATS[name][0], tmp_path, cfg, weights(**MATRICES))
    assert words in said


@pytest.mark.parametrize("name", ["container", "SAELens"])
@pytest.mark.parametrize(
    "cfg",
    [
        {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}},
        {"activation_fn": "topk", "activation_fn_kwargs": {"k": K}, "architecture": "standard"},
        {"architecture": "topk", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}},
        {"architecture": "topk", "k": K},
    ],
)
@pytest.mark.parametrize("centred", [True, False])
def test_topk_in_its_spellings(tmp_path, x, name, cfg, centred):
    state = weights(**MATRICES)
    w = {key: t.double() for key, t in state.items()}
    of_tokens = {"hook_point": "blocks.9.hook_resid_post", "hook_head_index": None, "lr": 1e-3}
    cfg = {"apply_b_dec_to_input": centred, "is_transcoder": False, "noise_scale": 0.0} | cfg
    found = read(FORMATS[name][0](tmp_path, cfg | of_tokens, state))
    scores = (x.double() - centred * w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    codes = topk(scores.clamp(min=0), K)
    agree(found.sae, x, codes, codes @ w["W_dec"] + w["b_dec"])
    assert found.format == "SAELens"
    assert found.reads == {"hook_point": "blocks.9.hook_resid_post"}


def test_norms_and_factors_of_a_container_are_read(tmp_path, x):
    state = weights(**MATRICES, scaling_factor=(M,))
    w = {key: t.double() for key, t in state.items()}
    cfg = {"normalize_activations": "constant_norm_rescale", "finetuning_method": "scale"}
    found = read(container(tmp_path, cfg, state))
    factor = D**0.5 / x.double().norm(dim=1, keepdim=True)
    codes = ((x * factor - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).clamp(min=0)
    reconstruction = ((codes * w["scaling_factor"]) @ w["W_dec"] + w["b_dec"]) / factor
    agree(found.sae, x, codes, reconstruction)


def test_vit_prisma_s_own_config_object(tmp_path, x, monkeypatch):
    """As its training writes it, dtype, device and the model's own config among the values."""
    held = {}
    for module, name in (
        ("vit_prisma.sae.config", "VisionModelSAERunnerConfig"),
        ("vit_prisma.configs.HookedViTConfig", "HookedViTConfig"),
    ):
        holder = types.ModuleType(module)
        held[name] = type(name, (), {"__module__": module})
        setattr(holder, name, held[name])
        for parent in ("vit_prisma", module.rpartition(".")[0]):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        monkeypatch.setitem(sys.modules, module, holder)
    cfg = held["VisionModelSAERunnerConfig"]()
    vars(cfg).update(
        model_class_name="HookedViT",
        vit_model_cfg=held["HookedViTConfig"](),
        activation_fn_str="topk",
        activation_fn_kwargs={"k": K},
        normalize_activations="none",
        hook_point_head_index=None,
        cls_token_only=False,
        dtype=torch.float32,
        device=torch.device("cpu"),
        d_in=D,
        d_out=D,
        is_transcoder=False,
        use_ghost_grads=True,
    )
    state = weights(**MATRICES)
    w = {key: t.double() for key, t in state.items()}
    path = container(tmp_path, cfg, state)
    codes = topk(((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).clamp(min=0), K)
    agree(read(path).sae, x, codes, codes @ w["W_dec"] + w["b_dec"])
    cfg.normalize_activations = "layer_norm"
    assert "normalize_activations='layer_norm'" in refused(container, tmp_path, cfg, state)


def test_patchsae_s_options_are_known(tmp_path):
    known = CFG | {"lr": 4e-4, "use_ghost_grads": True, "mse_cls_coefficient": 1.0}
    found = read(container(tmp_path, known, weights(**MATRICES)))
    assert found.format == "PatchSAE"
    said = refused(container, tmp_path, known | {"d_sae": M + 1}, weights(**MATRICES))
    assert f"d_sae={M + 1}: the weights have {M}" in said


def test_the_sparsemax_release_refuses_options_of_another_code(tmp_path):
    state = weights(concept=(M, D), k=(D, D), v=(D, D))
    said = refused(container, tmp_path, CFG | {"temperature": 0.5}, state)
    assert "temperature=0.5 is an option that is not known here" in said


def test_sparsify(tmp_path, x):
    state = weights(**SPARSIFY)
    w = {key: t.double() for key, t in state.items()}
    found = read(sparsify(tmp_path, {"normalize_decoder": True, "expansion_factor": 4}, state))
    codes = topk(((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]).clamp(min=0), K)
    agree(found.sae, x, codes, codes @ w["W_dec"] + w["b_dec"])
    assert found.format == "sparsify"


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        (
            {"activation": "groupmax"},
            "activation='groupmax' has no counterpart here: expected topk",
        ),
        ({"transcode": True}, "transcode=True"),
        ({"skip_connection": True}, "skip_connection=True"),
        ({"signed": True}, "signed=True"),
        ({"d_in": D + 1}, f"d_in={D + 1}: the weights have {D}"),
        ({"num_latents": 7}, f"num_latents=7: the weights have {M}"),
        ({"k": None}, "k=None"),
    ],
)
def test_sparsify_refusals(tmp_path, cfg, words):
    assert words in refused(sparsify, tmp_path, cfg, weights(**SPARSIFY))


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        ({"dict_size": M + 1}, f"dict_size={M + 1}: the weights have {M}"),
        ({"activation_dim": D + 1}, f"activation_dim={D + 1}: the weights have {D}"),
        ({"k": 3}, "k=3 is an option"),
        ({"group_sizes": [M]}, f"group_sizes=[{M}] is an option"),
    ],
)
def test_dictionary_learning_refusals(tmp_path, cfg, words):
    state = weights(**LINEAR, bias=(D,))
    assert words in refused(dictionary_learning, tmp_path, cfg, state)


def test_dictionary_learning_s_k_is_that_of_its_weights(tmp_path):
    state = weights(**LINEAR, b_dec=(D,)) | {"k": torch.tensor(K)}
    cfg = {"dict_class": "AutoEncoderTopK", "k": K + 1}
    assert f"k={K + 1}: the weights have {K}" in refused(dictionary_learning, tmp_path, cfg, state)


@pytest.mark.parametrize("name", ["input_dim", "hidden_dim"])
def test_visaebench_s_sizes_are_those_of_its_weights(tmp_path, name):
    said = refused(visaebench, tmp_path, {name: 7}, weights(**SIMPLE))
    assert f"{name}=7: the weights have" in said
