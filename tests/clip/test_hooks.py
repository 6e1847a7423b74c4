"""What `clip.hook` reads and how CLIP continues from there, against forward hooks on the stock
models of open_clip and timm."""

import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelThingsBlock, ResPostBlock

from clipsae.clip import FrozenCLIP
from clipsae.clip.changes import Changes
from clipsae.errors import ConfigError
from tests.clip.conftest import load_random
from tests.clip.test_frozen_clip import some_images

ADDED = ("attn_out", "mlp_out")
# Modules of a block: whose outputs are added to the stream, and whose input is the stream between.
OPEN_CLIP = {"attn_out": "ls_1", "mlp_out": "ls_2", "between": "ln_2"}
TIMM = {"attn_out": "drop_path1", "mlp_out": "drop_path2", "between": "norm2"}
POST_NORM = TIMM | {"between": "mlp"}
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 3}


def of_timm(name: str, hook: str = "resid", **options) -> FrozenCLIP:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=0, **{**SMALL, **options}).eval()
        for parameter in model.parameters():  # some layer scales begin at 1e-5
            if parameter.ndim == 1:
                torch.nn.init.uniform_(parameter, 0.3, 0.9)
    return FrozenCLIP(model, name=f"timm:{name}", hook=hook)


KINDS = {
    "CLIP": (lambda register: load_random(register()), OPEN_CLIP),
    "layer scale, mean of patches": (
        lambda register: load_random(register(ls_init_value=0.3, pool_type="avg")),
        OPEN_CLIP,
    ),
    "custom blocks": (
        lambda register: load_random(register(qk_norm=True, scale_fc=True, ls_init_value=0.3)),
        OPEN_CLIP,
    ),
    "SigLIP": (
        lambda register: load_random(
            register(timm_model_name="test_vit", timm_pool="map", timm_proj="none")
        ),
        TIMM,
    ),
    "DINOv2": (lambda _: of_timm("vit_small_patch14_reg4_dinov2"), TIMM),
    "norms after attention and MLP": (
        lambda _: of_timm("vit_tiny_patch16_224", block_fn=ResPostBlock, init_values=0.5),
        POST_NORM,
    ),
    "DINOv3": (lambda _: of_timm("vit_small_patch16_dinov3"), TIMM),
    "EVA-02": (lambda _: of_timm("eva02_tiny_patch14_224"), TIMM),
    "rotary positions of each block": (lambda _: of_timm("vit_small_patch16_rope_mixed_224"), TIMM),
    "EVA, norms last": (lambda _: of_timm("eva02_tiny_patch14_224", use_post_norm=True), POST_NORM),
    "Perception Encoder": (lambda _: of_timm("vit_pe_core_tiny_patch16_384"), TIMM),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request, register):
    make, modules = KINDS[request.param]
    return make(register), modules


def at(clip: FrozenCLIP, layer: int, hook: str) -> FrozenCLIP:
    """The same weights, read elsewhere."""
    return FrozenCLIP(clip.model, name=clip.name, layer=layer, hook=hook)


def whole(clip: FrozenCLIP, images: torch.Tensor) -> torch.Tensor:
    return getattr(clip.model, "encode_image", clip.model)(images)


def run_stock(clip: FrozenCLIP, images, layer: int, modules, hook=None, instead=None):
    """The stock model's embedding and what its block's modules saw, the output of one replaced."""
    seen: dict[str, torch.Tensor] = {}
    block = clip.tower.layers[layer]

    def keep(name):
        def added(_module, _inputs, output):
            seen[name] = output
            return instead if name == hook else None

        return added

    handles = [block.get_submodule(modules[h]).register_forward_hook(keep(h)) for h in ADDED]
    handles.append(block.register_forward_pre_hook(lambda _, x: seen.update(before=x[0])))
    between = block.get_submodule(modules["between"])
    handles.append(between.register_forward_pre_hook(lambda _, x: seen.update(between=x[0])))
    handles.append(block.register_forward_hook(lambda _, _in, out: seen.update(after=out)))
    embedding = whole(clip, images)
    for handle in handles:
        handle.remove()
    return embedding, seen


@torch.no_grad()
def test_what_a_block_adds_is_read_and_replaced_as_by_hooks(kind):
    clip, modules = kind
    images = clip.normalize(some_images(clip))
    generator = torch.Generator().manual_seed(0)
    for layer in (0, -2, -1):
        expected, seen = run_stock(clip, images, layer, modules)
        for hook, beside in zip(ADDED, ("before", "between"), strict=True):
            cut = at(clip, layer, hook)
            assert (cut.tokens, cut.width, cut.grid) == (clip.tokens, clip.width, clip.grid)
            tokens, context = cut.prefix(images, with_context=True)
            assert torch.equal(tokens, seen[hook])
            assert torch.equal(context, seen[beside])
            assert torch.equal(tokens, cut.prefix(images))
            assert torch.allclose(cut.tail(tokens, context), expected, atol=1e-5)
            other = torch.randn(tokens.shape, generator=generator)
            replaced, _ = run_stock(clip, images, layer, modules, hook, other)
            error = (cut.tail(other, context) - replaced).norm()
            assert error < 1e-3 * (replaced - expected).norm()
        assert torch.equal(context + tokens, seen["after"])
        stream, nothing = at(clip, layer, "resid").prefix(images, with_context=True)
        assert nothing is None
        assert torch.equal(stream, seen["after"])


@torch.no_grad()
def test_the_embedding_is_a_token(kind):
    clip, _ = kind
    cut = at(clip, 0, "embedding")
    images = clip.normalize(some_images(clip))
    tokens, context = cut.prefix(images, with_context=True)
    assert torch.equal(tokens[:, 0], whole(clip, images))
    assert context is None
    assert torch.equal(cut.tail(2 * tokens), 2 * tokens[:, 0])
    assert (cut.tokens, cut.width, cut.grid, cut.prefix_tokens) == (1, clip.embed_dim, (1, 1), 0)
    assert not cut.has_patches
    assert clip.has_patches
    rows = torch.randn(3, clip.embed_dim)
    assert torch.equal(cut.direct(rows), rows)  # the logit lens is exact there


@torch.no_grad()
@pytest.mark.parametrize("hook", [*ADDED, "embedding"])
@pytest.mark.parametrize("layer", [-2, -1, 0])
def test_versions_of_an_image_go_through_the_tail_together(register, layer, hook):
    clip = at(load_random(register(ls_init_value=0.5)), layer, hook)
    tokens, context = clip.prefix(clip.normalize(some_images(clip, 1)), with_context=True)
    generator = torch.Generator().manual_seed(0)
    version, token = torch.tensor([0, 0, 2]), torch.tensor([0, 5, 16])
    if not clip.has_patches:
        version, token = torch.tensor([0, 2]), torch.tensor([0, 0])
    change = torch.randn(len(token), clip.width, generator=generator)
    versions = tokens.repeat(3, 1, 1)
    for v, t, by in zip(version, token, change, strict=True):
        versions[v, t] += by
    beside = None if context is None else context[0]
    found = clip.tail_of_changes(Changes(tokens[0], version, token, change, 3), beside)
    contexts = None if context is None else context.expand(3, -1, -1)
    assert torch.allclose(found, clip.tail(versions, contexts), atol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_gradients_reach_the_tokens(register):
    """Through the MLP behind them, too: central differences."""
    clip = at(load_random(register()).double(), -1, "attn_out")
    images = clip.normalize(some_images(clip, 1)).double()
    tokens, context = clip.prefix(images, with_context=True)
    assert tokens.dtype == torch.float64
    tokens.requires_grad_(True)
    (gradient,) = torch.autograd.grad(clip.tail(tokens, context).sum(), tokens)
    step = 1e-5 * torch.randn_like(tokens)
    with torch.no_grad():
        ends = [clip.tail(tokens + sign * step, context).sum() for sign in (1, -1)]
    assert (gradient * step).sum().item() == pytest.approx((ends[0] - ends[1]).item() / 2, rel=1e-5)
    assert gradient.abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("hook", [*ADDED, "embedding"])
def test_under_autocast_all_that_is_handed_on_is_float32(register, hook):
    clip = at(load_random(register()), -2, hook)
    images = clip.normalize(some_images(clip))
    tokens, context = clip.prefix(images, with_context=True)
    clip.precision = "bf16-mixed"
    rounded, beside = clip.prefix(images, with_context=True)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - tokens).norm() < 0.02 * tokens.norm()
    if context is not None:
        assert beside.dtype == torch.float32
        assert (beside - context).norm() < 0.02 * context.norm()


def test_what_cannot_be_is_refused(register):
    clip = at(load_random(register()), -2, "mlp_out")
    tokens = torch.zeros(1, clip.tokens, clip.width)
    with pytest.raises(ValueError, match=r"context None.*'mlp_out'.*with_context=True"):
        clip.tail(tokens)
    with pytest.raises(ValueError, match=r"context \(2, 17, 32\) of tokens \(1, 17, 32\)"):
        clip.tail(tokens, tokens.expand(2, -1, -1))
    with pytest.raises(ConfigError, match="expected resid, attn_out, mlp_out, embedding or towers"):
        load_random(clip.name, hook="hook_mlp_out")
    # Two attentions, and two MLPs, beside each other.
    parallel = of_timm("vit_tiny_patch16_224", block_fn=ParallelThingsBlock)
    with pytest.raises(ConfigError, match=r"attn_out: the blocks of .* \(ParallelThingsBlock\)"):
        at(parallel, 0, "attn_out")


@pytest.mark.parametrize("hook", ADDED)
@torch.no_grad()
def test_several_layers_in_one_pass_are_each_as_alone(register, hook):
    clip = FrozenCLIP(load_random(register()).model, name="small", hook=hook)
    images = clip.normalize(some_images(clip))
    for layer, (tokens, context) in clip.prefixes(images, [-1, -2], with_context=True).items():
        alone, beside = clip.at(layer).prefix(images, with_context=True)
        assert torch.equal(tokens, alone)
        assert torch.equal(context, beside)
        assert torch.equal(clip.prefixes(images, [layer])[layer], alone)


@torch.no_grad()
def test_pairs_are_the_embeddings_of_images_and_captions(register):
    whole = load_random(register())
    clip = at(whole, 0, "towers")
    images = clip.normalize(some_images(clip))
    texts = torch.randint(1, 49408, (len(images), 16))
    pairs = clip.pairs(images, texts)
    for position, of in ((0, whole.encode_image(images)), (1, whole.model.encode_text(texts))):
        expected = of / of.square().sum(dim=-1, keepdim=True).sqrt()
        torch.testing.assert_close(pairs[:, position], expected)
    tokens, context = clip.prefix(images, with_context=True)  # of images without captions
    assert torch.equal(tokens, pairs[:, :1])
    assert context is None
    assert torch.equal(clip.tail(2 * tokens), 2 * tokens[:, 0])
    assert (clip.tokens, clip.positions, clip.width) == (1, 2, clip.embed_dim)
    assert (whole.tokens, whole.has_captions) == (whole.positions, False)
    with pytest.raises(ConfigError, match=r"clip\.hook=resid: the tokens are of images alone"):
        whole.pairs(images, texts)
    with pytest.raises(ConfigError, match="no text tower, so captions have no embeddings"):
        of_timm("vit_small_patch14_reg4_dinov2", hook="towers")


@pytest.mark.parametrize("hook", ["embedding", "towers"])
def test_an_embedding_is_of_no_layer_and_has_no_parts(register, hook):
    clip = FrozenCLIP(load_random(register()).model, name="small", hook=hook)
    with pytest.raises(ConfigError, match="the same for every layer"):
        clip.check_layers([-1, -2])
    clip.check_layers([-1])
    for tokens in ("cls", "patches"):
        with pytest.raises(ConfigError, match=rf"at clip\.hook={hook} an image is one token"):
            clip.token_slice(tokens)
