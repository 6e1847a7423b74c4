"""No option and no tensor of a foreign file is dropped: it is read, known to decide nothing, or
refused by its name; and no file runs code."""

import json
import pickle

import pytest
import torch

import clipsae
from tests.interop import foreign
from tests.interop.foreign import FORMATS, LINEAR, MATRICES, RELEASE, D, K, M, weights


def refused(source) -> str:
    with pytest.raises(ValueError, match=r".") as said:
        clipsae.load(source)
    assert "\n" not in str(said.value)
    return str(said.value)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_unknown_is_refused_by_name_in_every_format(tmp_path, name):
    write, shapes = FORMATS[name]
    state = weights(**shapes)
    for value in (0, False, "yes", [1], {"a": 1}):
        said = refused(write(tmp_path, {"surprise": value}, state))
        assert f"surprise={value!r} is an option that is not known here" in said
    said = refused(write(tmp_path, {}, weights(**shapes, W_skip=(D, D))))
    assert "W_skip is not known here" in said
    # What is not set decides nothing.
    assert clipsae.load(write(tmp_path, {"surprise": None}, state)).latents == M


OF_SAELENS = [
    ({"architecture": "transcoder"}, "'transcoder' has no counterpart here"),
    ({"architecture": ["standard"]}, "has no counterpart here"),
    ({"architecture": "topk"}, "k=None"),
    ({"architecture": "topk", "k": M + 1}, f"k={M + 1} is more than the {M} latents"),
    ({"architecture": "topk", "k": 3, "activation_fn_kwargs": {"k": 4}}, "k=3"),
    ({"architecture": "abstopk", "k": M + 1}, f"k={M + 1} is more than the {M} latents"),
    ({"architecture": "batchtopk", "k": 3}, "holds no topk_threshold"),
    ({"architecture": "gated"}, "holds no b_gate"),
    ({"architecture": "gated", "activation_fn": "topk"}, "activation_fn='topk' has no counterpart"),
    ({"activation_fn": "tanh-relu"}, "activation_fn='tanh-relu'"),
    ({"activation_fn_str": "topk"}, "activation_fn_kwargs: k=None"),
    ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 0}}, "k=0"),
    ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2, "sign": 1}}, "sign=1"),
    ({"activation_fn_kwargs": {"k": 4}}, "activation_fn_kwargs: k=4"),
    ({"activation_fn_kwargs": 3}, "activation_fn_kwargs=3"),
    ({"d_in": D + 1}, f"d_in={D + 1}: the weights have {D}"),
    ({"d_out": D + 1}, f"d_out={D + 1}: the weights have {D}"),
    ({"d_sae": M + 1}, f"d_sae={M + 1}: the weights have {M}"),
    ({"d_sae": "many"}, "d_sae='many'"),
    ({"k": 4}, "k=4"),
    ({"normalize_activations": "covariance_whitening"}, "='covariance_whitening' has no"),
    (
        {"normalize_activations": "constant_norm_rescale", "architecture": "matching_pursuit"},
        "'constant_norm_rescale' has no counterpart here: expected none or layer_norm",
    ),
    ({"normalize_activations": "expected_average_only_in"}, "'expected_average_only_in'"),
    ({"normalize_activations": True}, "'expected_average_only_in'"),
    ({"is_transcoder": True}, "is_transcoder=True has no counterpart here: expected False"),
    ({"transcoder_with_skip_connection": True}, "transcoder_with_skip_connection=True"),
    ({"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input='no'"),
    ({"hook_head_index": 0}, "hook_head_index=0"),
    ({"metadata": {"hook_head_index": 2}}, "hook_head_index=2"),
    ({"finetuning_scaling_factor": True}, "holds no finetuning_scaling_factor"),
    ({"finetuning_scaling_factor": 1}, "finetuning_scaling_factor=1"),
    ({"noise_scale": 0.1}, "noise_scale=0.1 has no counterpart here: expected 0"),
    ({"use_error_term": True}, "use_error_term=True"),
    ({"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm=True"),
    ({"matryoshka_widths": [4, 8]}, "matryoshka_widths=[4, 8]"),
    ({"reshape_activations": "fold"}, "reshape_activations='fold'"),
    ({"gated_sae": True}, "gated_sae=True has no counterpart here: expected False"),
]


@pytest.mark.parametrize(("cfg", "words"), OF_SAELENS)
def test_what_decides_saelenss_codes_is_refused_where_it_is_not_read(tmp_path, cfg, words):
    for write in (foreign.container, foreign.saelens):
        assert words in refused(write(tmp_path, cfg, weights(**MATRICES)))


AUTOENCODER = {**LINEAR, "bias": (D,)}
TOPK = {**LINEAR, "b_dec": (D,), "k": torch.tensor(K)}


@pytest.mark.parametrize(
    ("name", "shapes", "cfg", "words"),
    [
        ("sparsify", {}, {"activation": "groupmax"}, "has no counterpart here: expected topk"),
        ("sparsify", {}, {"transcode": True}, "transcode=True"),
        ("sparsify", {}, {"skip_connection": True}, "skip_connection=True"),
        ("sparsify", {}, {"d_in": D + 1}, f"d_in={D + 1}: the weights have {D}"),
        ("sparsify", {}, {"num_latents": 7}, f"num_latents=7: the weights have {M}"),
        ("sparsify", {}, {"k": None}, "k=None"),
        ("dictionary_learning", {}, {"dict_size": 7}, f"dict_size=7: the weights have {M}"),
        (
            "dictionary_learning",
            {},
            {"activation_dim": 7},
            f"activation_dim=7: the weights have {D}",
        ),
        ("dictionary_learning", {}, {"dict_class": "CrossCoder"}, "dict_class='CrossCoder'"),
        ("dictionary_learning", {}, {"k": 3}, "k=3 is an option"),
        ("dictionary_learning", {}, {"group_sizes": [M]}, f"group_sizes=[{M}] is an option"),
        (
            "dictionary_learning",
            TOPK,
            {"dict_class": "AutoEncoderTopK", "k": K + 1},
            f"k={K + 1}: the weights have {K}",
        ),
        ("visaebench", {}, {"input_dim": 7}, f"input_dim=7: the weights have {D}"),
        ("visaebench", {}, {"hidden_dim": 7}, f"hidden_dim=7: the weights have {M}"),
        ("container", RELEASE, {"temperature": 0.5}, "temperature=0.5 is an option that is not"),
        (
            "container",
            {**MATRICES, "W_dec": (M + 1, D)},
            {},
            f"W_dec has shape [{M + 1}, {D}]: expected [{M}, {D}]",
        ),
        ("container", {**MATRICES, "W_enc": (M,)}, {}, "expected a matrix"),
        ("container", {**MATRICES, "W_enc": (0, M)}, {}, "expected a matrix"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, name, shapes, cfg, words):
    write, usual = FORMATS[name]
    assert words in refused(write(tmp_path, cfg, weights(**(shapes or usual))))


KINDS = {"activation": {"cls": "BatchTopK", "params": {"top_k": K}}}
OF_OTHERS = [
    ("saev", {"schema": 6}, "schema=6: expected none or 1 to 5"),
    ("saev", {"schema": 1, "cls": "Relu", "cfg": {"d_vit": D}}, "schema=1, cls='Relu': some"),
    ("saev", {"schema": 1, "cls": "JumpRelu", "cfg": {}}, "cls='JumpRelu' has no counterpart here"),
    ("saev", {"cfg": {**KINDS, "d_model": 7}}, f"d_model=7: the weights have {D}"),
    ("saev", {"cfg": KINDS}, "holds no activation.threshold"),
    ("saev", {"cfg": {"activation": {"cls": "TopK", "params": {}}}}, "top_k=None"),
    ("MSAE", {"name": "sae.pth"}, "MSAE keeps an SAE's options in its file's name"),
    ("MSAE", {"name": f"{M}_{D}_TopKabs_5_False_False_0.0.pth"}, "activation='TopKabs' has no"),
    ("MSAE", {"name": f"{M}_{D}_BatchTopK_5_False_False_0.0.pth"}, "activation='BatchTopK' has no"),
    ("MSAE", {"name": f"{M}_{D}_TopK_{M + 1}_False_False_0.0.pth"}, f"k={M + 1}: expected 1 to"),
    ("MSAE", {"name": f"{M}_{D}_TopK_False_False_0.0.pth"}, "k=None: expected 1 to"),
    ("MSAE", {"name": f"{M}_{D}_ReLU_003_False_True_0.0.pth"}, "normalised='True' has no"),
    ("MSAE", {"name": f"{M}_{D}_ReLU_003_False_False_30.0.pth"}, "cap='30.0' has no counterpart"),
    ("MSAE", {"name": f"{M}_7_ReLU_003_False_False_0.0.pth"}, f"d=7: the weights have {D}"),
    ("MSAE", {"scaling_factor": -1.0}, "scaling_factor=-1.0: expected a number above 0"),
    ("MSAE", {"scaling_factor": float("nan")}, "scaling_factor=nan: expected a number"),
    ("MSAE", {"mean_center": torch.zeros(7)}, f"mean_center has shape [7]: expected [{D}]"),
    ("MSAE", {"mean_center": 2.0}, f"mean_center=2.0: expected 0 or {D} numbers"),
    ("clipscope", {"k": None}, "k=None"),
    ("clipscope", {"n_features": 7}, f"n_features=7: the weights have {M}"),
    ("BatchTopK", {"sae_type": "quantile"}, "sae_type='quantile' has no counterpart"),
    ("BatchTopK", {"sae_type": "batchtopk"}, "holds no threshold"),
    ("BatchTopK", {"input_unit_norm": 1}, "input_unit_norm=1: expected true or false"),
    ("BatchTopK", {"activation": "gelu"}, "activation='gelu' has no counterpart here"),
    ("BatchTopK", {"dict_size": 7}, f"dict_size=7: the weights have {M}"),
    ("ViT-Prisma", {"normalize_activations": "rms_norm"}, "'rms_norm' has no counterpart"),
    ("ViT-Prisma", {"is_transcoder": True}, "is_transcoder=True has no counterpart here"),
    ("visaebench", {"activation": "batchtopk", "threshold": 10**400}, "expected a number"),
    ("visaebench", {"activation": "batchtopk", "threshold": True}, "True: expected a number"),
    ("sparsify", {"embed_skip": True}, "embed_skip=True has no counterpart here"),
    ("sparsify", {"n_targets": 3}, "n_targets=3 is an option that is not known here"),
]


@pytest.mark.parametrize(("name", "cfg", "words"), OF_OTHERS)
def test_what_has_no_counterpart_is_refused_by_name(tmp_path, name, cfg, words):
    write, shapes = FORMATS[name]
    assert words in refused(write(tmp_path, cfg, weights(**shapes)))


def test_b_enc_that_batchtopk_does_not_add_must_be_zero(tmp_path):
    assert "adds b_enc with use_encoder_bias=true alone" in refused(
        foreign.batchtopk(tmp_path, {}, weights(**MATRICES))
    )


def test_a_training_of_several_layers_says_which_folders_it_holds(tmp_path):
    (tmp_path / "layers.5").mkdir()
    foreign.sparsify(tmp_path / "layers.5", {}, weights(**foreign.SPARSIFY))
    with pytest.raises(FileNotFoundError, match=r"name one of the 1 SAEs in it, .*layers\.5"):
        clipsae.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"sae": {}, "hookpoints": ["layers.5"]}))
    said = refused(tmp_path)
    assert "is that of a training of sparsify: name one of the 1 SAEs in it" in said
    assert clipsae.load(tmp_path / "layers.5").latents == M


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "omp_sae.OMPSAE"}, "holds overcomplete's OMPSAE, which has no counterpart here"),
        ({"kind": "mp_sae.MpSAE"}, "encoder='MLPEncoder' has no counterpart here: expected Ident"),
        ({"encoder": "modules.IdentityEncoder"}, "encoder='IdentityEncoder' has no counterpart"),
        ({"norm": torch.nn.LayerNorm(M)}, "1='LayerNorm' has no counterpart here"),
        ({"blocks": torch.nn.ModuleList([torch.nn.Linear(D, D)])}, "hidden layers have no"),
        ({"sae": {"surprise": 1}}, "surprise=1 is an option that is not known here"),
        ({"sae": {"_parameters": {"bias": torch.zeros(3)}}}, "bias is not known here"),
        ({"sae": {"_modules": {}}}, "dictionary: expected a module"),
        ({"sae": {"top_k": None}}, "top_k=None"),
    ],
)
def test_what_overcomplete_has_and_is_not_known_here_is_refused(
    tmp_path, monkeypatch, change, words
):
    def make(*args, **attributes):
        return foreign.module(monkeypatch, *args, **attributes)

    block = torch.nn.Sequential(torch.nn.Linear(D, M), change.get("norm", torch.nn.Identity()))
    parts = {"mlp_blocks": change.get("blocks", torch.nn.ModuleList()), "final_block": block}
    parts["final_activation"] = torch.nn.ReLU()
    dictionary = make("dictionary.DictionaryLayer", _fused_dictionary=torch.ones(M, D))
    encoder = make(change.get("encoder", "modules.MLPEncoder"), {}, parts)
    sae = make(
        change.get("kind", "topk_sae.TopKSAE"),
        {},
        {"encoder": encoder, "dictionary": dictionary},
        **{"top_k": K, **change.get("sae", {})},
    )
    torch.save(sae, tmp_path / "sae.pt")
    assert words in refused(tmp_path / "sae.pt")


@pytest.mark.parametrize("more", [{"hparams": {"k": 8}}, {"scaling": 2.0}, {"norm_mean": 3}])
def test_what_lies_beside_a_config_is_refused_by_name(tmp_path, more):
    cfg = {"architecture": "standard"}
    torch.save({"cfg": cfg, "state_dict": weights(**MATRICES), **more}, tmp_path / "sae.pt")
    assert f"sae.pt: {next(iter(more))}=" in refused(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("!!python/object/apply:os.system ['false']", "is not valid YAML: could not determine"),
        ("- topk", "holds a list: expected a YAML object"),
        ("activation: topk\nk: many", "config.yaml: k='many': expected an integer"),
    ],
)
def test_a_config_that_is_none_is_refused(tmp_path, text, words):
    torch.save(weights(**foreign.SIMPLE), tmp_path / "sae.pt")
    (tmp_path / "config.yaml").write_text(text)
    assert words in refused(tmp_path)


class Harm:
    """Its unpickling would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


PICKLES = {
    "saev": ("sae.pt", {}),
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
    held = {"cfg": Harm(ran), "state_dict": weights(W_enc=(D, M)), "x": Harm(ran)}
    header = b'{"d_vit": 12}\n' if kind == "saev" else b""
    with (tmp_path / name).open("wb") as file:
        file.write(header)
        if protocol is None:
            torch.save(held, file)
        else:
            file.write(pickle.dumps(held, protocol))
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    said = refused(tmp_path)
    assert (
        "not a pickle of tensors" if protocol == 4 else "asks for exec, which could run"
    ) in said
    assert "weights_only" not in said
    assert not ran.exists()
    # It would have run, had it been opened as pickles are.
    pickle.loads(pickle.dumps(held["x"]))
    assert ran.exists()


@pytest.mark.parametrize(
    "held", [3, {"state_dict": 3}, {"state_dict": {"W_enc": "no"}}, {"state_dict": {}}, {}, None]
)
def test_other_pickles_are_refused(tmp_path, held):
    torch.save(held, tmp_path / "sae.pt")
    said = refused(tmp_path)
    assert "expected" in said or "holds no" in said


def test_damaged_and_infinite_files_are_refused(tmp_path):
    state = weights(**MATRICES)
    state["W_dec"][0, 0] = torch.inf
    path = foreign.container(tmp_path, {}, state)
    assert "W_dec holds 1 numbers that are NaN or infinite" in refused(path)
    for content in (path.read_bytes()[:300], b""):
        path.write_bytes(content)
        assert "not a pickle of tensors" in refused(path)
