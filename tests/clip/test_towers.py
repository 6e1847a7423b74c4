"""The families of models that work: each name at random weights, narrow and two blocks deep,
against the library's own model. docs/how-to/backbone.md has them as a table."""

import copy

import open_clip
import pytest
import timm
import torch

from clipsae.clip import FrozenCLIP
from tests.clip.conftest import load_random
from tests.clip.test_frozen_clip import some_images

SHALLOW = {"embed_dim": 32, "depth": 2, "num_heads": 2}
FAMILIES = {  # family -> a pattern of timm's names, tokens before the patches
    "DINOv2": ("vit_*_dinov2", {1, 5}),
    "DINOv3": ("vit_*_dinov3*", {5}),
    "EVA-02": ("eva02_*", {1}),
    "Perception Encoder": ("vit_pe_*", {0, 1}),
    "rotary": ("vit_*_rope_*", {1, 2, 4, 5}),
}
IN_OPEN_CLIP = {
    "PE-Core": ("PE-Core-", {0, 1}),
    "SigLIP 2": ("-SigLIP2", {0}),
    "EVA-02": ("EVA02-", {1}),
}


@torch.no_grad()
def check(clip: FrozenCLIP, blocks) -> None:
    """Tokens are what the blocks put out; the tail gives what the whole model gives."""
    images = clip.normalize(some_images(clip))
    seen = []
    handles = [b.register_forward_hook(lambda _module, _in, out: seen.append(out)) for b in blocks]
    expected = getattr(clip.model, "encode_image", clip.model)(images)
    for handle in handles:
        handle.remove()
    assert clip.embed_dim == expected.shape[1]
    assert (clip.blocks, clip.grid) == (2, (2, 2))
    for hook in ("resid", "attn_out", "mlp_out"):
        cut = FrozenCLIP(clip.model, name=clip.name, layer=0, hook=hook)
        tokens, context = cut.prefix(images, with_context=True)
        assert tokens.shape == (2, clip.tokens, 32)
        if hook != "attn_out":
            after = tokens if context is None else context + tokens
            assert torch.equal(after, seen[0])
        assert torch.allclose(cut.tail(tokens, context), expected, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_timm(family):
    pattern, prefix_tokens = FAMILIES[family]
    found = set()
    for name in timm.list_models(pattern):
        size = 28 if "patch14" in name else 32
        model = timm.create_model(name, img_size=size, num_classes=0, **SHALLOW).eval()
        clip = FrozenCLIP(model, name=f"timm:{name}")
        found.add(clip.prefix_tokens)
        check(clip, model.blocks)
    assert found <= prefix_tokens
    assert found


@pytest.mark.parametrize("family", IN_OPEN_CLIP)
def test_models_of_open_clip(family, monkeypatch):
    """With their text towers, built as a user does."""
    part, prefix_tokens = IN_OPEN_CLIP[family]
    create, config_of = timm.create_model, open_clip.get_model_config
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}

    def shallow(name, **options):
        return create(name, **{**options, **SHALLOW})

    def small(name):
        config = copy.deepcopy(config_of(name))
        config["text_cfg"] = {**config["text_cfg"], **text}
        if config["vision_cfg"]["timm_proj"] == "none":
            config["embed_dim"] = SHALLOW["embed_dim"]
        return config

    monkeypatch.setattr("open_clip.timm_model.timm.create_model", shallow)
    monkeypatch.setattr("open_clip.factory.get_model_config", small)
    names = [name for name in open_clip.list_models() if part in name]
    assert names
    for name in names:
        size = next(2 * patch for patch in (14, 16, 32) if f"-{patch}" in name)
        clip = load_random(name, image_size=size)
        assert clip.prefix_tokens in prefix_tokens
        assert clip.has_text
        check(clip, clip.model.visual.trunk.blocks)
        texts = clip.encode_text(torch.randint(1, 50, (3, 8)))
        assert texts.shape == (3, clip.embed_dim)
