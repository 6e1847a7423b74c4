"""FrozenCLIP against the stock open_clip model, for every place where it can be cut."""

import json
import warnings

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from clipsae.clip import FrozenCLIP
from clipsae.clip.changes import Changes
from clipsae.errors import ConfigError


def load_random(name: str, layer: int = -2, **options) -> FrozenCLIP:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FrozenCLIP.load(name, pretrained=None, layer=layer, **options)


def recut(clip: FrozenCLIP, layer: int) -> FrozenCLIP:
    """The same weights, cut elsewhere: building a ViT-L takes seconds."""
    return FrozenCLIP(clip.model, name=clip.name, layer=layer)


def some_images(clip: FrozenCLIP, count: int = 2) -> torch.Tensor:
    size = clip.image_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def vit_b() -> FrozenCLIP:
    return load_random("ViT-B-16-quickgelu")


def small_config(**vision) -> dict:
    return {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 32,
            "layers": 3,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
            **vision,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 1,
        },
    }


@pytest.fixture
def small(tmp_path):
    """Registers a small open_clip model with the given vision settings, returns its name."""

    def register(**vision) -> str:
        name = "clipsae-test-" + "-".join(f"{k}={v}" for k, v in vision.items())
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(small_config(**vision)))
        open_clip.add_model_config(path)
        return name

    return register


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("ViT-B-16-quickgelu", [-12, -7, -2, -1, 0, 11]),  # every layer of the tiny one
        ("ViT-L-14", [-24, -2, 23]),
        ("clipsae-tiny", None),
    ],
)
def test_tail_of_prefix_is_encode_image(name, layers, vit_b):
    clip = vit_b if name == vit_b.name else load_random(name)
    images = clip.normalize(some_images(clip, count=1 if name == "ViT-L-14" else 2))
    with torch.no_grad():
        expected = clip.model.encode_image(images)
        for layer in layers or range(-clip.blocks, clip.blocks):
            cut = recut(clip, layer)
            found = cut.tail(cut.prefix(images))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_prefix_is_the_output_of_the_named_block(vit_b):
    images = vit_b.normalize(some_images(vit_b))
    seen = {}
    block = vit_b.model.visual.transformer.resblocks[10]
    handle = block.register_forward_hook(lambda _module, _in, out: seen.update(tokens=out))
    with torch.no_grad():
        vit_b.model.encode_image(images)
    handle.remove()
    assert vit_b.layer == -2
    assert torch.equal(vit_b.prefix(images), seen["tokens"])
    assert recut(vit_b, 10).layer == -2


def test_attributes(vit_b):
    assert (vit_b.width, vit_b.tokens, vit_b.grid, vit_b.image_size) == (768, 197, (14, 14), 224)
    assert (vit_b.blocks, vit_b.embed_dim) == (12, 512)
    assert vit_b.mean == open_clip.OPENAI_DATASET_MEAN
    assert vit_b.std == open_clip.OPENAI_DATASET_STD
    assert vit_b.logit_scale.item() == pytest.approx(1 / 0.07)


@pytest.mark.parametrize(
    "vision",
    [
        {"pool_type": "avg"},
        {"pool_type": "avg", "final_ln_after_pool": True},
        {"final_ln_after_pool": True},
        {"ls_init_value": 0.3},
        {"no_ln_pre": True},
        {"qk_norm": True, "scale_fc": True},  # open_clip's custom blocks
        {"patch_dropout": 0.5},  # training only: nothing is dropped in eval mode
        {"layers": 1},
    ],
    ids=str,
)
def test_every_kind_of_plain_vit(vision, small):
    clip = load_random(small(**vision), layer=-1)
    images = clip.normalize(some_images(clip, 3))
    expected = clip.model.encode_image(images)
    for layer in range(clip.blocks):
        cut = recut(clip, layer)
        torch.testing.assert_close(cut.tail(cut.prefix(images)), expected, rtol=1e-4, atol=1e-5)


def test_sequence_first_blocks(small):
    clip = load_random(small())
    images = clip.normalize(some_images(clip))
    expected = clip.model.encode_image(images)
    transformer = clip.model.visual.transformer
    transformer.batch_first = False
    for block in transformer.resblocks:
        block.attn.batch_first = False
    torch.testing.assert_close(clip.tail(clip.prefix(images)), expected, rtol=1e-4, atol=1e-5)


def test_the_last_block_runs_its_mlp_for_the_class_token_only(small):
    clip = load_random(small())
    sizes = []
    mlp = clip.model.visual.transformer.resblocks[-1].mlp
    mlp.register_forward_hook(lambda _module, inputs, _out: sizes.append(inputs[0].shape[1]))
    tokens = torch.randn(2, clip.tokens, clip.width)
    clip.tail(tokens)
    assert sizes == [1]


def test_normalize_is_the_models_own_preprocessing(vit_b):
    images = some_images(vit_b)
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
    before = images.clone()
    torch.testing.assert_close(vit_b.normalize(images), (images / 255 - mean) / std)
    assert torch.equal(images, before)
    with pytest.raises(ValueError, match="expected uint8"):
        vit_b.normalize(images.float())


def test_never_trains_and_passes_gradients_to_the_tokens(small):
    clip = load_random(small())
    assert not clip.train().training
    assert not any(module.training for module in clip.modules())
    assert not any(parameter.requires_grad for parameter in clip.parameters())
    tokens = torch.randn(2, clip.tokens, clip.width, requires_grad=True)
    clip.tail(tokens).sum().backward()
    assert tokens.grad.abs().sum() > 0


def test_random_weights_follow_the_seed_and_leave_the_random_state(small):
    name = small()
    state = torch.get_rng_state()
    first, again, other = (load_random(name, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(first.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.model.visual.proj, other.model.visual.proj)


def test_random_weights_warn(small):
    with pytest.warns(UserWarning, match="RANDOM WEIGHTS"):
        FrozenCLIP.load(small(), pretrained=None)


def test_bf16_hands_over_float32_close_to_fp32(small):
    name = small()
    full, half = load_random(name), load_random(name, precision="bf16")
    images = full.normalize(some_images(full))
    tokens = half.prefix(images)
    assert half.compute_dtype == torch.bfloat16
    assert tokens.dtype == half.tail(tokens).dtype == half.encode_image(images).dtype
    assert tokens.dtype == torch.float32
    cosine = torch.cosine_similarity(half.tail(tokens), full.tail(full.prefix(images)))
    assert cosine.min() > 0.99


def test_weights_from_a_file(small, tmp_path):
    name = small()
    clip = load_random(name, seed=3)
    path = tmp_path / "weights.safetensors"
    save_file(clip.model.state_dict(), path)
    loaded = FrozenCLIP.load(name, pretrained=str(path))
    assert torch.equal(loaded.model.visual.proj, clip.model.visual.proj)
    assert FrozenCLIP.weights_file(name, str(path)) == path
    assert FrozenCLIP.weights_file(name, None) is None
    assert FrozenCLIP.weights_file("ViT-B-16-quickgelu", "openai") is None
    with pytest.raises(ConfigError, match="does not hold the weights of"):
        FrozenCLIP.load(small(width=64), pretrained=str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "ViT-B16"}, "did you mean .*ViT-B-16"),
        ({"name": "RN50"}, "ResNet; expected a plain ViT"),
        ({"name": "convnext_base"}, "timm's convnext_base; expected a plain ViT"),
        ({"name": "coca_ViT-B-32"}, "pools its tokens by attention; expected a plain ViT"),
        ({"name": "ViT-B-16"}, "trained with QuickGELU: use clip.name=ViT-B-16-quickgelu"),
        ({"name": "ViT-L-14"}, "trained with QuickGELU: use clip.name=ViT-L-14-quickgelu"),
        ({"pretrained": "openay"}, "neither a file nor weights .*openai"),
        ({"precision": "int4"}, "expected one of fp32, bf16"),
    ],
    ids=str,
)
def test_refused_in_one_sentence_before_any_download(options, message, monkeypatch):
    def no_download(*args, **kwargs):
        raise AssertionError("tried to load")

    monkeypatch.setattr(open_clip, "create_model", no_download)
    with pytest.raises(ConfigError, match=message) as caught:
        FrozenCLIP.load(**options)
    assert "\n" not in str(caught.value)


def test_built_in_weights_that_are_not_there(monkeypatch, tmp_path):
    tiny = pytest.importorskip("clipsae.clip.tiny")
    monkeypatch.setattr(tiny, "weights_path", lambda: tmp_path / "none.safetensors")
    with pytest.raises(ConfigError, match=r"no built-in weights.*clipsae.pretraining"):
        FrozenCLIP.load("clipsae-tiny", "builtin")


@pytest.mark.parametrize("layer", [-4, 3, 100])
def test_layer_out_of_range(layer, small):
    with pytest.raises(ConfigError, match=rf"layer={layer}: .* has 3 blocks.*-3\.\.-1.*0\.\.2"):
        load_random(small(), layer=layer)


def test_tokens_of_another_shape_are_refused(small):
    clip = load_random(small())
    with pytest.raises(ValueError, match=r"expected \[B, 17, 32\]"):
        clip.tail(torch.zeros(2, 16, 32))


@pytest.mark.parametrize(
    ("name", "options", "prefix_tokens"),
    [
        ("timm:vit_tiny_patch16_224", {}, 1),
        ("timm:vit_small_patch14_dinov2", {"image_size": 56}, 1),
        ("timm:vit_small_patch14_reg4_dinov2", {"image_size": 56}, 5),
        ("ViT-B-16-SigLIP", {}, 0),
    ],
)
def test_timm_towers_are_cut_in_the_same_way(name, options, prefix_tokens):
    clip = load_random(name, **options)
    images = clip.normalize(some_images(clip))
    expected = getattr(clip.model, "encode_image", clip.model)(images)
    assert clip.prefix_tokens == prefix_tokens
    for layer in (0, clip.blocks // 2, -2, -1):
        cut = recut(clip, layer)
        tokens = cut.prefix(images)
        assert tokens.shape == (2, clip.tokens, clip.width)
        torch.testing.assert_close(cut.tail(tokens), expected, rtol=1e-4, atol=1e-5)
    assert expected.shape == (2, clip.embed_dim)
    assert clip.prefix(images).equal(clip.prefix(images))  # nothing is dropped


def test_a_timm_tower_reads_a_block_and_its_own_statistics():
    clip = load_random("timm:vit_small_patch14_reg4_dinov2", image_size=56)
    assert clip.mean == (0.485, 0.456, 0.406)
    seen = {}
    block = clip.model.blocks[10]
    block.register_forward_hook(lambda _module, _in, out: seen.update(tokens=out))
    images = clip.normalize(some_images(clip))
    clip.model(images)
    assert torch.equal(clip.prefix(images), seen["tokens"])
    bf16 = load_random("timm:vit_small_patch14_reg4_dinov2", image_size=56, precision="bf16")
    assert bf16.compute_dtype == torch.bfloat16
    tokens = bf16.prefix(images)
    assert tokens.dtype == torch.float32
    assert (tokens - seen["tokens"]).norm() < 0.02 * seen["tokens"].norm()


def test_a_timm_model_has_no_texts():
    clip = load_random("timm:vit_tiny_patch16_224")
    assert not clip.has_text
    for use in (
        lambda: clip.tokenizer,
        lambda: clip.logit_scale,
        lambda: clip.encode_text(torch.zeros(1, 77, dtype=torch.int64)),
    ):
        with pytest.raises(ConfigError, match=r"no text tower.*evaluation=none"):
            use()


def test_a_timm_weights_file(tmp_path):
    clip = load_random("timm:vit_tiny_patch16_224", seed=3)
    save_file(clip.model.state_dict(), tmp_path / "weights.safetensors")
    loaded = FrozenCLIP.load("timm:vit_tiny_patch16_224", str(tmp_path / "weights.safetensors"))
    images = clip.normalize(some_images(clip))
    assert torch.equal(loaded.encode_image(images), clip.encode_image(images))


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("timm:vit_smal_patch14_dinov2", None, "did you mean vit_small_patch14_dinov2"),
        ("timm:vit_small_patch16_dinov3", None, "expected a plain ViT"),
        ("timm:resnet18", None, "expected a plain ViT"),
        ("timm:vit_small_patch14_dinov2", "openai", "neither a file.*lvd142m"),
        ("timm:vit_small_patch14_dinov2", "lvd142m", "does not answer: copy model.safetensors"),
    ],
)
def test_what_timm_cannot_give_is_refused(name, pretrained, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=message):
        FrozenCLIP.load(name, pretrained)


@torch.no_grad()
@pytest.mark.parametrize("layer", [-2, -1, 0])
@pytest.mark.parametrize(
    "vision", [{}, {"ls_init_value": 0.5}, {"pool_type": "avg"}, {"no_ln_pre": True}], ids=str
)
def test_versions_of_an_image_go_through_the_tail_together(small, layer, vision):
    clip = load_random(small(**vision), layer=layer)
    generator = torch.Generator().manual_seed(0)
    stream = torch.randn(clip.tokens, clip.width, generator=generator)
    # Version 0 changes two tokens, 2 the class token and another, 1 and 3 nothing.
    version, token = torch.tensor([0, 0, 2, 2]), torch.tensor([3, 5, 0, 5])
    change = torch.randn(4, clip.width, generator=generator)
    found = clip.tail_of_changes(Changes(stream, version, token, change, 4))
    streams = stream.repeat(4, 1, 1)
    for v, t, by in zip(version, token, change, strict=True):
        streams[v, t] += by
    assert torch.allclose(found, clip.tail(streams), atol=1e-5)
    assert not torch.allclose(found[2], found[1], atol=1e-3)
    nothing = version[:0], token[:0], change[:0]
    assert torch.allclose(
        clip.tail_of_changes(Changes(stream, *nothing, 2)), found[[1, 3]], atol=1e-5
    )
