"""Files of weights as people have them, against the same weights loaded by open_clip itself."""

import argparse
import json
import os
import shutil
import time
import warnings
from collections import OrderedDict
from pathlib import Path

import huggingface_hub
import numpy as np
import open_clip
import pytest
import timm
import torch
from omegaconf import OmegaConf
from open_clip.pretrained import get_pretrained_cfg
from safetensors.torch import save_file
from torch import Tensor, nn

from clipsae.clip import FrozenCLIP, sources
from clipsae.clip.weights import Inert
from clipsae.errors import ConfigError
from clipsae.evaluation.encoders import image_encoder

NAMES = {True: "clipsae-test-w-quickgelu", False: "clipsae-test-w"}


@pytest.fixture(scope="module", autouse=True)
def registered(register):
    """A small CLIP with either activation."""
    for quick, name in NAMES.items():
        register(name, quick, layers=2, patch_size=16)


@pytest.fixture(scope="module", params=[True, False], ids=["quickgelu", "gelu"])
def quick(request) -> bool:
    return request.param


@pytest.fixture(scope="module")
def model(quick):
    """Weights of open_clip's initialisation, with no bias at zero."""
    torch.manual_seed(0)
    found = open_clip.create_model(NAMES[quick], None).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return found


@pytest.fixture(scope="module")
def expected(model, quick, tmp_path_factory) -> nn.Module:
    """The model of open_clip's own loading."""
    path = tmp_path_factory.mktemp("w") / "open_clip_model.safetensors"
    save_file(model.state_dict(), path)
    return open_clip.create_model(NAMES[quick], str(path)).eval()


def embeddings(model) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    texts = torch.randint(1, 1000, (2, 16), generator=generator)
    texts[:, -1] = 49407
    with torch.no_grad():
        return model.encode_image(images), model.encode_text(texts), model.logit_scale.exp()


def alike(model: nn.Module, other: nn.Module, exact: bool = True) -> None:
    """The same tensors, and the same embeddings of them; less of both where one was rounded."""
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert not exact or all(torch.equal(ours[name], theirs[name]) for name in ours)
    tolerance = 1e-5 if exact else 1e-2
    for found, right in zip(embeddings(model), embeddings(other), strict=True):
        torch.testing.assert_close(found, right, rtol=tolerance, atol=tolerance)


def training_checkpoint(model) -> dict:
    """What open_clip's training saves, and what others add."""
    optimizer = torch.optim.AdamW(model.parameters())
    return {
        "epoch": 3,
        "name": "run",
        "state_dict": {f"module.{name}": t for name, t in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "scaler": {"scale": 2.0},
        "args": argparse.Namespace(lr=1e-3, logs=Path("logs")),
        "best": np.float64(1.5),
        "when": OrderedDict(a=np.arange(3)),
        "config": OmegaConf.create({"a": [1, 2]}),
    }


def torchscript(model: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(model), path)
    return path


class OfOpenAI(nn.Module):
    """An archive with what OpenAI's have beside the weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name in ("input_resolution", "context_length", "vocab_size"):
            self.register_buffer(name, torch.tensor(32))
        for name, child in model.named_children():
            setattr(self, name, child)
        for name in ("positional_embedding", "text_projection", "logit_scale"):
            setattr(self, name, getattr(model, name))

    def forward(self, x: Tensor) -> Tensor:
        return self.visual(x)


def as_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's tensors under transformers' names, written from its `CLIPModel`."""
    text, vision = "text_model.embeddings", "vision_model.embeddings"
    found = {
        "logit_scale": state["logit_scale"],
        "text_projection.weight": state["text_projection"].T.contiguous(),
        "visual_projection.weight": state["visual.proj"].T.contiguous(),
        f"{text}.token_embedding.weight": state["token_embedding.weight"],
        f"{text}.position_embedding.weight": state["positional_embedding"],
        f"{text}.position_ids": torch.arange(16)[None],
        f"{vision}.class_embedding": state["visual.class_embedding"],
        f"{vision}.patch_embedding.weight": state["visual.conv1.weight"],
        f"{vision}.position_embedding.weight": state["visual.positional_embedding"],
    }
    same = {
        "text_model.final_layer_norm": "ln_final",
        "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
    }
    for tower, prefix in (("text", ""), ("vision", "visual.")):
        for n in range(2):
            ours = f"{prefix}transformer.resblocks.{n}"
            theirs = f"{tower}_model.encoder.layers.{n}"
            for kind in ("weight", "bias"):
                parts = state[f"{ours}.attn.in_proj_{kind}"].chunk(3)
                for part, tensor in zip("qkv", parts, strict=True):
                    found[f"{theirs}.self_attn.{part}_proj.{kind}"] = tensor.clone()
            same[f"{theirs}.self_attn.out_proj"] = f"{ours}.attn.out_proj"
            for number in "12":
                same[f"{theirs}.layer_norm{number}"] = f"{ours}.ln_{number}"
            same[f"{theirs}.mlp.fc1"] = f"{ours}.mlp.c_fc"
            same[f"{theirs}.mlp.fc2"] = f"{ours}.mlp.c_proj"
    for theirs, ours in same.items():
        for kind in ("weight", "bias"):
            found[f"{theirs}.{kind}"] = state[f"{ours}.{kind}"]
    return found


HOW = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def written(kind: str, model: nn.Module, quick: bool, folder: Path) -> Path:
    """A file or folder of weights of one kind."""
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    if kind.startswith("torchscript"):
        copy = open_clip.create_model(NAMES[quick], None).eval()
        copy.load_state_dict(state)
        copy = OfOpenAI(copy) if "OpenAI" in kind else copy.half() if "half" in kind else copy
        return torchscript(copy, folder / "ViT.pt")
    if kind.startswith("transformers"):
        vision = {"hidden_act": "quick_gelu" if quick else "gelu"}
        (folder / "config.json").write_text(json.dumps({"vision_config": vision}))
        if "bin" in kind:
            torch.save(as_transformers(state), folder / "pytorch_model.bin")
        else:
            save_file(as_transformers(state), folder / "model.safetensors", {"format": "pt"})
        return folder
    if kind.startswith("open_clip"):
        config = {"model_cfg": open_clip.get_model_config(NAMES[quick]), "preprocess_cfg": HOW}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        if "bin" in kind:
            torch.save(state, folder / "open_clip_pytorch_model.bin")
        else:
            save_file(state, folder / "open_clip_model.safetensors")
        return folder
    content = {
        "checkpoint": lambda: training_checkpoint(model),
        "compiled": lambda: {"state_dict": {f"module._orig_mod.{k}": t for k, t in state.items()}},
    }.get(kind, lambda: state)()
    new = kind != "before zip"
    torch.save(content, folder / "epoch_3.pt", _use_new_zipfile_serialization=new)
    return folder / "epoch_3.pt"


def check(path, expected, quick, exact=True) -> FrozenCLIP:
    clip = FrozenCLIP.load(NAMES[quick], str(path))
    alike(clip.model, expected, exact)
    assert FrozenCLIP.weights_file(NAMES[quick], str(path)).is_file()
    return clip


SILENT = ["state dict", "before zip", "checkpoint", "compiled"]  # about the activation
TELLING = [
    *("torchscript", "torchscript half", "torchscript of OpenAI"),
    *("transformers", "transformers bin", "open_clip", "open_clip bin"),
]


@pytest.mark.parametrize("kind", [*SILENT, *TELLING])
def test_what_people_have(model, expected, quick, tmp_path, kind, caplog):
    path = written(kind, model, quick, tmp_path / "w")
    trained = quick or "OpenAI" in kind  # all of theirs were trained with QuickGELU
    if trained == quick:
        clip = check(path, expected, quick, exact="half" not in kind)
        assert (clip.mean == (0.5, 0.5, 0.5)) == kind.startswith("open_clip")
    if kind in SILENT:
        computes = "QuickGELU" if quick else "plain GELU"
        assert "does not say whether it was trained with QuickGELU" in caplog.text
        assert f"clip.name={NAMES[quick]} computes {computes}" in caplog.text
        return
    with pytest.raises(ConfigError, match=f"were trained with.*use clip.name={NAMES[trained]}$"):
        FrozenCLIP.load(NAMES[not trained], str(path))


def test_positions_are_interpolated(model, quick, tmp_path):
    path = written("torchscript half", model, quick, tmp_path)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    larger = open_clip.create_model(NAMES[quick], tmp_path / "w.safetensors", force_image_size=64)
    found = FrozenCLIP.load(NAMES[quick], str(path), image_size=64).model.visual
    theirs = larger.visual.positional_embedding
    assert theirs.shape == (17, 32)
    torch.testing.assert_close(found.positional_embedding, theirs, rtol=1e-2, atol=1e-3)


def test_transformers_own_model_embeds_as_ours_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    about = transformers.CLIPConfig(
        text_config={**options, "intermediate_size": 128, "max_position_embeddings": 16,
                     "vocab_size": 49408, "eos_token_id": 49407},
        vision_config={**options, "intermediate_size": 128, "image_size": 32, "patch_size": 16},
        projection_dim=24,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.CLIPModel(about).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    texts = torch.randint(1, 1000, (2, 16))
    texts[:, -1] = 49407
    ours = FrozenCLIP.load(NAMES[True], str(tmp_path))
    with torch.no_grad():
        vision = theirs.vision_model(pixel_values=images).pooler_output
        text = theirs.text_model(input_ids=texts).pooler_output
        for found, right in (
            (ours.encode_image(images), theirs.visual_projection(vision)),
            (ours.encode_text(texts), theirs.text_projection(text)),
        ):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


def hub_cache(folder: Path, repository: str, files: Path, revision: str = "0123abc") -> Path:
    """A repository in the layout of the Hub's cache."""
    home = folder / f"models--{repository.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(revision)
    (home / "blobs").mkdir()
    (home / "snapshots" / revision).mkdir(parents=True)
    for n, file in enumerate(files.iterdir()):
        shutil.copy(file, home / "blobs" / str(n))
        (home / "snapshots" / revision / file.name).symlink_to(f"../../blobs/{n}")
    return home


@pytest.fixture
def nowhere(tmp_path, monkeypatch) -> Path:
    """Empty caches, and a Hub that does not answer: no name server is asked here."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home" / "torch"))
    return cache


def test_a_repository_in_the_hubs_cache(model, expected, quick, tmp_path, nowhere):
    folder = written("transformers", model, quick, tmp_path / "clip")
    home = hub_cache(nowhere, "me/clip-small", folder)
    check(home, expected, quick)
    check(home / "snapshots" / "0123abc", expected, quick)
    check("me/clip-small", expected, quick)
    check("hf-hub:me/clip-small", expected, quick)
    shutil.rmtree(home / "refs")
    check(home, expected, quick)


def test_a_model_named_by_its_folder_or_repository(model, quick, tmp_path, nowhere):
    folder = written("open_clip", model, quick, tmp_path / "open")
    hub_cache(nowhere, "me/open", folder)
    of_open_clip = open_clip.create_model(f"local-dir:{folder}").eval()
    for name in (f"local-dir:{folder}", "hf-hub:me/open"):
        clip = FrozenCLIP.load(name, "builtin")
        alike(clip.model, of_open_clip)
        assert (clip.mean, clip.std) == (tuple(HOW["mean"]), tuple(HOW["std"]))
        assert clip.tokenizer(["a cat"]).shape == (1, 16)
        assert FrozenCLIP.weights_file(name, "builtin").parent.is_dir()


def test_a_file_is_normalised_as_the_models_published_weights_are():
    """SigLIP's images have mean and standard deviation 0.5."""
    half = (0.5, 0.5, 0.5)
    assert sources.usual_preprocess("ViT-B-16-SigLIP") == {"mean": half, "std": half}
    # Published ones of this model have been normalised in two ways: then open_clip's default.
    assert sources.usual_preprocess("ViT-L-14") == {}


def test_code_in_a_pickle_does_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"state_dict": {"a": torch.zeros(1)}, "other": Hostile()}, tmp_path / "x.pt")
    with pytest.raises(ConfigError, match="does not hold the weights") as caught:
        FrozenCLIP.load(NAMES[True], str(tmp_path / "x.pt"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert Inert(1, a=2) == {}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"weights": torch.zeros(2)}, "Missing key"),
        ({"vision_model.x": torch.zeros(2)}, "Missing key"),
        ({"epoch": 3}, "holds no tensors by name"),
        ([1, 2], "holds no tensors by name"),
        (b"", ""),
        (b"not a file of weights", ""),
        (b"PK\x03\x04 broken", ""),
    ],
)
def test_what_holds_no_weights_is_refused(tmp_path, content, said):
    files = [tmp_path / "x.pt"]
    if isinstance(content, bytes):
        files.append(tmp_path / "x.safetensors")
        for file in files:
            file.write_bytes(content)
    else:
        torch.save(content, files[0])
    for file in files:
        with pytest.raises(ConfigError, match=f"does not hold the weights of .*{said}") as caught:
            FrozenCLIP.load(NAMES[True], str(file))
        assert "\n" not in str(caught.value)


def test_a_timm_weights_file(tmp_path):
    model = timm.create_model("test_vit", num_classes=0).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    loaded = FrozenCLIP.load("timm:test_vit", str(tmp_path / "weights.safetensors"))
    images = torch.randn(2, 3, 160, 160)
    torch.testing.assert_close(loaded.encode_image(images), model(images))


def test_weights_that_are_no_local_file():
    assert FrozenCLIP.weights_file("ViT-B-16-quickgelu", None) is None
    assert FrozenCLIP.weights_file("ViT-B-16-quickgelu", "openai") is None
    assert FrozenCLIP.weights_file("ViT-B-16-quickgelu", "openay") is None


def test_folders_that_do_not_say_which_file(tmp_path, model, quick):
    with pytest.raises(ConfigError, match="holds no weights: expected open_clip_model"):
        FrozenCLIP.load(NAMES[quick], str(tmp_path))
    for name in ("a.pt", "b.pt"):
        torch.save(model.state_dict(), tmp_path / name)
    with pytest.raises(ConfigError, match=r"2 files of weights \(a.pt, ...\)"):
        FrozenCLIP.load(NAMES[quick], str(tmp_path))
    (tmp_path / "b.pt").unlink()
    FrozenCLIP.load(NAMES[quick], str(tmp_path))


# --- published weights without a network ---


def refused_at_once(load) -> str:
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        load()
    assert time.monotonic() - start < 10  # of which two wait for an answer, and a test is slow
    said = str(caught.value)
    assert "\n" not in said
    return said


def test_absent_weights_are_refused_with_what_to_copy_and_where_to(nowhere, tmp_path):
    said = refused_at_once(FrozenCLIP.load)
    assert (
        "copy open_clip_model.safetensors of http://127.0.0.1:9/timm/vit_base_patch16_clip_224"
        in said
    )
    assert f"/ViT-B-16.pt to {tmp_path}/home/.cache/clip/ViT-B-16.pt" in said
    assert str(nowhere) in said
    assert "clip.pretrained=/path/to/open_clip_model.safetensors" in said
    said = refused_at_once(lambda: FrozenCLIP.load("timm:vit_small_patch14_dinov2", "lvd142m"))
    assert "copy model.safetensors of" in said
    assert f"{tmp_path}/home/torch/hub/checkpoints/dinov2_vits14_pretrain.pth" in said
    repository = "openai/clip-vit-base-patch16"
    said = refused_at_once(lambda: FrozenCLIP.load(pretrained=repository))
    assert f"{repository} is not in {nowhere}" in said
    assert "copy its files into a folder" in said
    said = refused_at_once(lambda: FrozenCLIP.load("hf-hub:me/clip", "builtin"))
    assert "give clip.name=local-dir:/path/to/clip" in said
    said = refused_at_once(lambda: FrozenCLIP.load("ViT-B-16", "laion2b_s34b_b88k"))
    assert "laion/CLIP-ViT-B-16-laion2B-s34B-b88K" in said
    for name in ("open_clip:ViT-B-32/openai", "timm:vit_small_patch14_dinov2.lvd142m"):
        assert "does not answer: copy" in refused_at_once(lambda name=name: image_encoder(name))


def test_a_hub_that_never_answers_is_waited_for_two_seconds(monkeypatch):
    class Silent:
        def head(self, *args, **options):
            time.sleep(30)

    monkeypatch.setattr(huggingface_hub.utils, "get_session", Silent)
    start = time.monotonic()
    assert not sources.online()
    assert time.monotonic() - start < 10
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.utils, "get_session", None)  # not even asked
    assert not sources.online()


def test_a_tokenizer_that_comes_with_open_clip_asks_nobody(monkeypatch, nowhere):
    asked = []
    monkeypatch.setattr(sources, "online", lambda: asked.append("asked"))
    clip = FrozenCLIP.load("clipsae-tiny", "builtin")
    assert clip.tokenizer(["a red star"]).shape == (1, 32)
    assert not asked
    siglip = FrozenCLIP(clip.model, name="ViT-B-16-SigLIP")
    with pytest.raises(ConfigError, match="comes from the Hugging Face Hub through the package"):
        _ = siglip.tokenizer
    assert asked


class TestPublished:
    """Weights of a tag are found in every cache that may hold them; the small model stands for
    OpenAI's ViT-B/32."""

    @pytest.fixture(autouse=True)
    def known(self, monkeypatch):
        known = {"openai": get_pretrained_cfg("ViT-B-32", "openai")}
        for name in NAMES.values():
            monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, known)
        repository = sources._OPENAI_IN_TRANSFORMERS["ViT-B-32"]
        monkeypatch.setitem(sources._OPENAI_IN_TRANSFORMERS, NAMES[False], repository)

    @pytest.fixture
    def state(self):
        return open_clip.create_model(NAMES[True], None).eval()

    def proj(self) -> Tensor:
        return FrozenCLIP.load(NAMES[True], "openai").model.visual.proj

    def test_in_the_hubs_cache(self, state, nowhere, tmp_path):
        (tmp_path / "f").mkdir()
        save_file(state.state_dict(), tmp_path / "f" / "open_clip_model.safetensors")
        hub_cache(nowhere, "timm/vit_base_patch32_clip_224.openai", tmp_path / "f")
        assert torch.equal(self.proj(), state.visual.proj)
        assert FrozenCLIP.weights_file(NAMES[True], "openai") is None

    def test_in_the_hubs_cache_in_transformers_format(self, state, nowhere, tmp_path):
        folder = written("transformers bin", state, True, tmp_path / "clip")
        hub_cache(nowhere, "openai/clip-vit-base-patch32", folder)
        assert torch.equal(self.proj(), state.visual.proj)

    def test_where_openais_package_keeps_them(self, state, nowhere, tmp_path, caplog):
        home = tmp_path / "home" / ".cache" / "clip"
        home.mkdir(parents=True)
        path = torchscript(state, home / "ViT-B-32.pt")
        assert torch.equal(self.proj(), state.visual.proj)
        assert f"{path} is not the published file by its checksum" in caplog.text
        # So that results of it are not taken for OpenAI's.
        assert FrozenCLIP.weights_file(NAMES[True], "openai") == path
        encoder = image_encoder(f"open_clip:{NAMES[False]}/openai")
        assert torch.equal(encoder.model.visual.proj, state.visual.proj)
        assert type(encoder.model.visual.transformer.resblocks[0].mlp.gelu).__name__ == (
            "QuickGELU"
        )

    def test_timms_in_the_hubs_cache_and_torchs(self, nowhere, tmp_path):
        name = "vit_tiny_patch16_224"
        random = timm.create_model(name, num_classes=0)
        (tmp_path / "f").mkdir()
        save_file(random.state_dict(), tmp_path / "f" / "model.safetensors")
        hub_cache(nowhere, f"timm/{name}.augreg_in21k", tmp_path / "f")
        clip = FrozenCLIP.load(f"timm:{name}", "augreg_in21k")
        assert torch.equal(clip.model.cls_token, random.cls_token)
        encoder = image_encoder(f"timm:{name}.augreg_in21k")
        assert torch.equal(encoder.model.cls_token, random.cls_token)
        dino = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=518)
        kept = tmp_path / "home" / "torch" / "hub" / "checkpoints"
        kept.mkdir(parents=True)
        torch.save(dino.state_dict(), kept / "dinov2_vits14_pretrain.pth")
        clip = FrozenCLIP.load("timm:vit_small_patch14_dinov2", "lvd142m", image_size=56)
        assert torch.equal(clip.model.cls_token, dino.cls_token)
