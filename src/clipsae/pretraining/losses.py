"""The losses of the built-in CLIP's pretraining, and a fast forward of its two towers.

Letters: B scenes of a batch, T text tokens, P patches, d width, e embedding, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.transformer import Transformer
from torch import Tensor, nn

from clipsae.data.scenes.grammar import KINDS, caption_targets, kind_labels, make_captions
from clipsae.data.scenes.world import Scenes, uniforms

_TEMPLATE_STREAM = 0x7E4A
PATCH_KINDS = ("shape", "colour", "pattern")  # what a patch of an object can show


def _attention(attention: nn.MultiheadAttention, x: Tensor, mask: Tensor | None) -> Tensor:
    """`nn.MultiheadAttention` written as two batched products: [B, T, d] -> [B, T, d].

    The CPU kernel of `scaled_dot_product_attention` is slow at these sizes in bfloat16: written
    out, a training step of the whole tower takes half the time.
    """
    b, t, d = x.shape
    h = attention.num_heads
    qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = qkv.view(b, t, 3, h, d // h).permute(2, 0, 3, 1, 4).reshape(3, b * h, t, d // h)
    scores = torch.bmm(q * (d // h) ** -0.5, k.transpose(1, 2))
    if mask is not None:
        scores = scores + mask.to(scores.dtype)
    with torch.autocast("cpu", enabled=False):  # softmax in the dtype of the scores
        weights = scores.softmax(-1)
    out = torch.bmm(weights, v).view(b, h, t, d // h).transpose(1, 2).reshape(b, t, d)
    return F.linear(out, attention.out_proj.weight, attention.out_proj.bias)


def _blocks(transformer: Transformer, x: Tensor, mask: Tensor | None = None) -> Tensor:
    for block in transformer.resblocks:
        x = x + _attention(block.attn, block.ln_1(x), mask)
        x = x + block.mlp(block.ln_2(x))
    return x


def embed_image_tokens(model: CLIP, images: Tensor) -> Tensor:
    """Unit embeddings of every token: [B, 3, S, S] normalised -> [B, 1 + P, e] float32.

    Token 0 is CLS, hence equal to `model.encode_image`; the patches go through the same
    `ln_post` and `proj`.
    """
    visual = model.visual
    x = visual.ln_post(_blocks(visual.transformer, visual._embeds(images)))
    return F.normalize((x @ visual.proj).float(), dim=-1)


def embed_texts(model: CLIP, tokens: Tensor) -> Tensor:
    """Unit embeddings [n, e] float32 of padded token ids [n, T], as `model.encode_text`.

    The padding that all texts share is cut off: attention is causal, so that nothing before the
    end-of-text token sees it.
    """
    end = tokens.argmax(-1)  # the end-of-text token has the highest id
    t = int(end.max()) + 1
    x = model.token_embedding(tokens[:, :t]) + model.positional_embedding[:t]
    x = _blocks(model.transformer, x, model.attn_mask[:t, :t])
    x = model.ln_final(x)[torch.arange(len(tokens)), end]
    return F.normalize((x @ model.text_projection).float(), dim=-1)


def class_prompts(seed: int, step: int) -> list[str]:
    """A prompt for every class of every kind, in the order of `KINDS`, templates at random."""
    n = sum(len(kind.classnames) for kind in KINDS.values())
    u = iter(uniforms(seed, _TEMPLATE_STREAM, torch.tensor([step]), n)[0].tolist())
    return [
        kind.templates[int(next(u) * len(kind.templates))](name)
        for kind in KINDS.values()
        for name in kind.classnames
    ]


def _labelled_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy [n, C] against [n], without those labelled -1; 0 if there are none."""
    total = F.cross_entropy(logits, label, ignore_index=-1, reduction="sum")
    return total / (label >= 0).sum().clamp(min=1)


def _multi_positive_loss(logits: Tensor, true: Tensor, unclear: Tensor) -> Tensor:
    """CLIP's symmetric loss [B, B] where a row or column has any number of true pairs: the
    target is uniform over them; unclear pairs are left out (as in UniCL, Yang et al. 2022)."""
    logits = logits.masked_fill(unclear, -1e4)
    target = true.float()
    per_image = -(target * logits.log_softmax(1)).sum(1) / target.sum(1)
    per_text = -(target * logits.log_softmax(0)).sum(0) / target.sum(0)
    return (per_image.mean() + per_text.mean()) / 2


def scene_losses(
    model: CLIP,
    tokenize: Callable[[list[str]], Tensor],
    images: Tensor,
    scenes: Scenes,
    patches: dict[str, Tensor] | None,
    seed: int,
    step: int,
) -> dict[str, Tensor]:
    """The named losses of one batch.

    `caption`: image against caption, one to one where captions are unique. One loss for each
    kind in `KINDS`: images against the prompts of its classes, through the text tower, so that
    training is the zero-shot task itself and there is no head. `patch`: the same for each patch
    that an object covers, with the prompts of shape, colour and pattern (a supervised warm start).

    Args:
        images: [B, 3, S, S], normalised.
        patches: `patch_labels` [B, P] for the loss on patches; None to go without.
    """
    tokens = embed_image_tokens(model, images)
    image = tokens[:, 0]
    index = step * len(images) + torch.arange(len(images))
    captions = make_captions(scenes, seed, index)
    prompts = class_prompts(seed, step)
    # Two calls, as prompts are short and captions long.
    prompt = embed_texts(model, tokenize(prompts))
    text = embed_texts(model, tokenize(captions.texts))
    scale = model.logit_scale.exp()

    true, unclear = caption_targets(scenes, captions)
    losses = {"caption": _multi_positive_loss(scale * image @ text.T, true, unclear)}
    sizes = [len(kind.classnames) for kind in KINDS.values()]
    classes = dict(zip(KINDS, prompt.split(sizes), strict=True))
    for kind, embedding in classes.items():
        losses[kind] = _labelled_loss(scale * image @ embedding.T, kind_labels(kind, scenes))
    if patches is not None:
        covered = patches["object"] >= 0  # [B, P]
        shown = tokens[:, 1:][covered]  # [n, e]
        losses["patch"] = sum(
            _labelled_loss(scale * shown @ classes[kind].T, patches[kind][covered])
            for kind in PATCH_KINDS
        )
    return losses
