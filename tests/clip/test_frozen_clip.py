"""FrozenCLIP against the stock open_clip or timm model, for every place where it can be cut."""

from types import SimpleNamespace

import open_clip
import pytest
import torch

from clipsae.clip import FrozenCLIP
from clipsae.clip.changes import Changes
from clipsae.errors import ConfigError
from tests.clip.conftest import load_random


def recut(clip: FrozenCLIP, layer: int) -> FrozenCLIP:
    """The same weights, cut elsewhere."""
    return FrozenCLIP(clip.model, name=clip.name, layer=layer)


def some_images(clip: FrozenCLIP, count: int = 2) -> torch.Tensor:
    size = clip.image_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def vit_b() -> FrozenCLIP:
    return load_random("ViT-B-16-quickgelu")


@pytest.fixture(scope="module")
def small(register) -> FrozenCLIP:
    return load_random(register())


@torch.no_grad()
def check_cuts(clip: FrozenCLIP, layers) -> None:
    images = clip.normalize(some_images(clip))
    expected = getattr(clip.model, "encode_image", clip.model)(images)
    assert expected.shape == (2, clip.embed_dim)
    for layer in layers:
        cut = recut(clip, layer)
        tokens = cut.prefix(images)
        assert tokens.shape == (2, clip.tokens, clip.width)
        torch.testing.assert_close(cut.tail(tokens), expected, rtol=1e-4, atol=1e-5)


def test_tail_of_prefix_is_encode_image(vit_b):
    check_cuts(vit_b, [-12, -2, 11])
    clip = load_random("clipsae-tiny")
    check_cuts(clip, range(-clip.blocks, clip.blocks))


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
        {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},  # as SigLIP
    ],
    ids=str,
)
def test_every_kind_of_plain_vit(vision, register):
    clip = load_random(register(**vision), layer=-1)
    check_cuts(clip, range(clip.blocks))


@pytest.mark.parametrize(
    ("name", "options", "prefix_tokens"),
    [
        ("timm:test_vit", {}, 1),
        ("timm:test_vit2", {"image_size": 64}, 1),  # a register, and the mean of the patches
        ("timm:vit_small_patch14_reg4_dinov2", {"image_size": 56}, 5),
    ],
)
def test_timm_towers_are_cut_in_the_same_way(name, options, prefix_tokens):
    clip = load_random(name, **options)
    assert clip.prefix_tokens == prefix_tokens
    check_cuts(clip, (0, clip.blocks // 2, -2, -1))
    images = clip.normalize(some_images(clip))
    seen = []
    clip.model.blocks[-2].register_forward_hook(lambda _module, _in, out: seen.append(out))
    clip.model(images)
    tokens = clip.prefix(images)
    assert torch.equal(tokens, seen[0])
    clip.precision = "bf16-mixed"
    assert 0 < (clip.prefix(images) - tokens).norm() < 0.01 * tokens.norm()
    assert clip.mean == (0.485, 0.456, 0.406) or "dinov2" not in name


def test_prefix_is_the_output_of_the_named_block(small):
    images = small.normalize(some_images(small))
    seen = {}
    block = small.model.visual.transformer.resblocks[1]
    handle = block.register_forward_hook(lambda _module, _in, out: seen.update(tokens=out))
    small.model.encode_image(images)
    handle.remove()
    assert small.layer == recut(small, 1).layer == -2
    assert torch.equal(small.prefix(images), seen["tokens"])


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
@pytest.mark.parametrize("timm", [False, True])
@torch.no_grad()
def test_several_layers_in_one_pass_are_each_as_alone(register, precision, timm):
    clip = load_random("timm:test_vit" if timm else register(), precision=precision)
    images = clip.normalize(some_images(clip))
    layers = [-1, -clip.blocks, -2]
    found = clip.prefixes(images, layers)
    assert set(found) == set(layers)
    for layer, tokens in found.items():
        cut = clip.at(layer)
        assert (cut.layer, cut.precision, clip.layer) == (layer, precision, -2)
        assert torch.equal(tokens, cut.prefix(images))
        assert cut.model is clip.model
    assert clip.at(0).layer == -clip.blocks
    with pytest.raises(ConfigError, match=r"model\.target_layer=9: "):
        clip.at(9, "model.target_layer")


def test_which_tokens(small):
    images = small.normalize(some_images(small))
    tokens = small.prefix(images)
    sizes = {"all": small.tokens, "patches": small.tokens - 1, "cls": 1}
    for kind, size in sizes.items():
        part = tokens[:, small.token_slice(kind)]
        assert part.shape[1] == size
        changed = small.with_tokens(tokens, part + 1, kind)
        assert (changed - tokens).abs().amax(dim=-1).gt(0.5).sum() == 2 * size
    with pytest.raises(ConfigError, match=r"features\.tokens='some': expected all, patches or cls"):
        small.token_slice("some")
    siglip = SimpleNamespace(name="siglip", prefix_tokens=0, has_patches=True)
    with pytest.raises(ConfigError, match=r"features\.tokens=cls: siglip has no class token"):
        FrozenCLIP.token_slice(siglip, "cls")


def test_attributes_and_preprocessing(vit_b):
    assert (vit_b.width, vit_b.tokens, vit_b.grid, vit_b.image_size) == (768, 197, (14, 14), 224)
    assert (vit_b.blocks, vit_b.embed_dim) == (12, 512)
    assert vit_b.logit_scale.item() == pytest.approx(1 / 0.07)
    assert vit_b.mean == open_clip.OPENAI_DATASET_MEAN
    assert vit_b.std == open_clip.OPENAI_DATASET_STD
    images = some_images(vit_b)
    before = images.clone()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (vit_b.mean, vit_b.std))
    torch.testing.assert_close(vit_b.normalize(images), (images / 255 - mean) / std)
    assert torch.equal(images, before)


def test_the_last_block_runs_its_mlp_for_the_class_token_only(small):
    sizes = []
    mlp = small.model.visual.transformer.resblocks[-1].mlp
    hook = mlp.register_forward_hook(lambda _module, inputs, _out: sizes.append(inputs[0].shape[1]))
    small.tail(torch.randn(2, small.tokens, small.width))
    hook.remove()
    assert sizes == [1]


def test_never_trains_and_passes_gradients_to_the_tokens(small):
    assert not small.train().training
    assert not any(module.training for module in small.modules())
    assert not any(parameter.requires_grad for parameter in small.parameters())
    tokens = torch.randn(2, small.tokens, small.width, requires_grad=True)
    small.tail(tokens).sum().backward()
    assert tokens.grad.abs().sum() > 0


def test_random_weights_warn_follow_the_seed_and_leave_the_random_state(small):
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="RANDOM WEIGHTS"):
        again = FrozenCLIP.load(small.name, pretrained=None)
    other = load_random(small.name, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    pairs = zip(small.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(small.model.visual.proj, other.model.visual.proj)


@torch.no_grad()
def test_under_autocast_products_alone_are_bfloat16(small):
    """Those of the prefix; its residual stream, the weights and the tail are float32."""
    images = small.normalize(some_images(small))
    half = FrozenCLIP(small.model, name=small.name, precision="bf16-mixed")
    block = small.model.visual.transformer.resblocks[0]
    seen = {}
    handles = [
        part.register_forward_hook(
            lambda _part, _in, out, what=what: seen.update({what: out.dtype})
        )
        for what, part in {"stream": block, "product": block.mlp.c_fc}.items()
    ]
    tokens = half.prefix(images)
    for handle in handles:
        handle.remove()
    assert seen == {"stream": torch.float32, "product": torch.bfloat16}
    assert tokens.dtype == half.compute_dtype == torch.float32
    assert 0 < (tokens - small.prefix(images)).norm() < 0.01 * tokens.norm()
    assert torch.equal(half.tail(tokens), small.tail(tokens))


def test_inputs_of_another_kind_are_refused(small):
    with pytest.raises(ValueError, match=r"expected \[B, 17, 32\]"):
        small.tail(torch.zeros(2, 16, 32))
    with pytest.raises(ValueError, match="expected uint8"):
        small.normalize(torch.zeros(1, 3, 32, 32))


def test_a_timm_model_has_no_texts():
    clip = load_random("timm:test_vit")
    assert not clip.has_text
    for use in (
        lambda: clip.tokenizer,
        lambda: clip.logit_scale,
        lambda: clip.encode_text(torch.zeros(1, 77, dtype=torch.int64)),
    ):
        with pytest.raises(ConfigError, match=r"no text tower.*evaluation=none"):
            use()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "ViT-B16"}, "did you mean .*ViT-B-16"),
        ({"name": "RN50"}, "ModifiedResNet; expected a plain ViT"),
        ({"name": "convnext_base"}, "ConvNeXt; expected a plain ViT"),
        ({"name": "coca_ViT-B-32"}, "pools its tokens by attention; expected a plain ViT"),
        ({"name": "ViT-B-16"}, "trained with QuickGELU: use clip.name=ViT-B-16-quickgelu"),
        ({"pretrained": "openay"}, "neither a file nor weights .*openai"),
        ({"name": "ViT-M-16", "pretrained": "nul"}, r"for ViT-M-16 \(it has none\)"),
        ({"name": "timm:vit_smal_patch14_dinov2"}, "did you mean vit_small_patch14_dinov2"),
        ({"name": "timm:vit_small_patch16_dinov3"}, "neither a file.*lvd1689m"),
        ({"name": "timm:beit_base_patch16_224"}, "Beit; expected a plain ViT"),
        ({"hook": "hook_attn_out"}, "clip.hook='hook_attn_out': expected resid, attn_out, mlp"),
        ({"name": "timm:resnet18"}, "expected a plain ViT"),
        ({"name": "timm:vit_small_patch14_dinov2"}, "neither a file.*lvd142m"),
        ({"layer": "x"}, "clip.layer='x': expected an integer"),
        ({"layer": 1.5}, "clip.layer=1.5"),
        ({"layer": 12}, r"layer=12: ViT-B-16-quickgelu has 12 blocks.*-12\.\.-1.*0\.\.11"),
        ({"name": "timm:vit_tiny_patch16_224", "pretrained": "augreg_in21k", "layer": 99}, "12 bl"),
        ({"name": "ViT-B-16-SigLIP", "pretrained": "webli", "layer": -13}, "12 blocks"),
        ({"name": None}, "clip.name=None: expected text"),
        ({"name": "local-dir:/nowhere"}, "clip.name='local-dir:/nowhere': .*open_clip_config.json"),
        ({"seed": "abc"}, "clip.seed='abc': expected an integer"),
        ({"pretrained": 3}, "clip.pretrained=3: expected text, or null"),
        ({"pretrained": "/nowhere/x.pt"}, "clip.pretrained='/nowhere/x.pt': neither a file"),
        ({"pretrained": "nowhere/x.safetensors"}, "neither a file"),
        ({"image_size": 0}, "clip.image_size=0: expected an integer of at least 1"),
        ({"precision": "bf16"}, "precision='bf16': expected fp32 or bf16-mixed"),
    ],
    ids=str,
)
def test_mistakes_are_refused_before_anything_is_loaded(options, message, monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("tried to load")

    monkeypatch.setattr(open_clip, "create_model", loaded)
    monkeypatch.setattr("clipsae.clip.build.create_timm", loaded)
    monkeypatch.setattr("clipsae.clip.sources.fetch", loaded)
    with pytest.raises(ConfigError, match=message) as caught:
        FrozenCLIP.load(**options)
    assert "\n" not in str(caught.value)


@torch.no_grad()
@pytest.mark.parametrize("layer", [-2, -1, 0])
@pytest.mark.parametrize(
    "vision", [{}, {"ls_init_value": 0.5}, {"pool_type": "avg"}, {"no_ln_pre": True}], ids=str
)
def test_versions_of_an_image_go_through_the_tail_together(register, layer, vision):
    clip = load_random(register(**vision), layer=layer)
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
