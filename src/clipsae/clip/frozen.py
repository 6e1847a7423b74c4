"""A frozen CLIP from open_clip, cut in two where the SAE reads it.

    image -> prefix -> tokens [B, T, d] -> tail -> embedding [B, e]

`tail(prefix(x))` equals the whole model's `encode_image(x)` for every layer; whatever is done to
the tokens in between (an SAE's reconstruction, a masked one) reaches the embedding.

B images, T tokens of an image (class token first, then the patches row by row), d width,
e embedding size, S image side.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from open_clip import get_tokenizer
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

from clipsae.clip.build import build_open_clip, weights_file
from clipsae.errors import ConfigError


class FrozenCLIP(nn.Module):
    """An open_clip model with a plain ViT image tower, never trained and always in eval mode.

    Make one with `FrozenCLIP.load`. It belongs to whoever streams features (the DataModule), not
    to the module that is trained, and so is no part of a checkpoint.

    Attributes:
        name, pretrained, precision: as given to `load`.
        layer: index of the last block in the prefix, counted from the end (-1: all blocks).
        blocks: number of blocks in the image tower.
        width: d.  tokens: T.  grid: (rows, columns) of patches.  embed_dim: e.
        image_size: S.  mean, std: the model's own normalisation, per channel, of values in [0, 1].
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        pretrained: str | None = None,
        layer: int = -2,
        precision: str = "fp32",
    ) -> None:
        super().__init__()
        visual = model.visual
        blocks = len(visual.transformer.resblocks)
        if not -blocks <= layer < blocks:
            raise ConfigError(
                f"layer={layer}: {name} has {blocks} blocks, so expected {-blocks}..{-1} "
                f"(from the end) or 0..{blocks - 1}"
            )
        self.model = model
        self.name = name
        self.pretrained = pretrained
        self.precision = precision
        self.blocks = blocks
        self.layer = layer - blocks if layer >= 0 else layer
        self.width: int = visual.transformer.width
        self.grid: tuple[int, int] = tuple(visual.grid_size)
        self.tokens = 1 + self.grid[0] * self.grid[1]
        self.embed_dim: int = visual.output_dim
        self.image_size: int = visual.image_size[0]
        self.mean: tuple[float, ...] = tuple(visual.preprocess_cfg["mean"])
        self.std: tuple[float, ...] = tuple(visual.preprocess_cfg["std"])
        for buffer, values in (("_mean", self.mean), ("_std", self.std)):
            self.register_buffer(buffer, torch.tensor(values).view(-1, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def load(
        cls,
        name: str = "ViT-B-16-quickgelu",
        pretrained: str | None = "openai",
        layer: int = -2,
        precision: str = "fp32",
        seed: int = 0,
    ) -> "FrozenCLIP":
        """Build a model by open_clip's name for it, and its weights.

        Args:
            name: an open_clip model with a plain ViT image tower, or "clipsae-tiny".
            pretrained: a tag that open_clip knows for this model, the path of a weights file,
                "builtin" (clipsae-tiny), or None: random weights, with a warning.
            layer: the prefix ends with this block: -2 is the second to last (the paper's), -1 the
                last, 0 the first.
            precision: "fp32", or "bf16": weights and products in bfloat16, layer norms in
                float32. Tokens and embeddings are handed over in float32 either way.
            seed: of the random weights of `pretrained=None`.

        Raises:
            ConfigError: an unknown name, tag or precision; a model that is no plain ViT; OpenAI's
                weights with the wrong activation; weights that cannot be had; a layer out of range.
        """
        model = build_open_clip(name, pretrained, precision=precision, seed=seed)
        return cls(model, name=name, pretrained=pretrained, layer=layer, precision=precision)

    @staticmethod
    def weights_file(name: str, pretrained: str | None) -> Path | None:
        """The local file that the weights come from; None: random, or fetched by open_clip."""
        return weights_file(name, pretrained)

    def train(self, mode: bool = True) -> "FrozenCLIP":
        """Stays in eval mode whatever is asked: a trainer calls this on all it holds."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return self._mean.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the image tower's products."""
        return self.model.visual.conv1.weight.dtype

    @cached_property
    def tokenizer(self) -> Any:
        """open_clip's tokenizer of this model: list of strings -> LongTensor [B, context]."""
        return get_tokenizer(self.name)

    @property
    def logit_scale(self) -> Tensor:
        """The factor that cosines are multiplied with (the exponential of the parameter)."""
        return self.model.logit_scale.exp().float()

    def normalize(self, images: Tensor) -> Tensor:
        """Images uint8 [B, 3, S, S] -> float32 of the same shape on this model's device."""
        if images.dtype != torch.uint8:
            raise ValueError(f"images of dtype {images.dtype}: expected uint8 in 0..255")
        images = images.to(self.device, non_blocking=True).to(self._mean.dtype)
        return images.div_(255).sub_(self._mean).div_(self._std)

    def prefix(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] -> the residual stream after block `layer`, [B, T, d]."""
        found = self.model.visual.forward_intermediates(
            images.to(self.compute_dtype),
            indices=[self.blocks + self.layer],
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        parts = found["image_intermediates_prefix"][0], found["image_intermediates"][0]
        return _at_least_fp32(torch.cat(parts, dim=1))

    def tail(self, tokens: Tensor) -> Tensor:
        """The residual stream after block `layer` [B, T, d] -> embedding [B, e], not normalised.

        Differentiable in `tokens`.
        """
        if tokens.ndim != 3 or tokens.shape[1:] != (self.tokens, self.width):
            raise ValueError(
                f"tokens of shape {tuple(tokens.shape)}: expected [B, {self.tokens}, {self.width}]"
            )
        visual = self.model.visual
        x = tokens.to(self.compute_dtype)
        remaining = list(visual.transformer.resblocks[self.blocks + self.layer + 1 :])
        last = remaining.pop() if remaining and self._reads_class_token_only else None
        x = self._run(remaining, x)
        if last is not None:
            x = _class_token_of_block(last, x)
        # Layer norm acts on each token by itself: before the pooling or after it is the same
        # where the pooling picks a token, and not where it averages.
        if visual.pool_type == "tok":
            x = visual.ln_post(x[:, 0])
        elif visual.final_ln_after_pool:
            x = visual.ln_post(x[:, 1:].mean(dim=1))
        else:
            x = visual.ln_post(x)[:, 1:].mean(dim=1)
        return _at_least_fp32(x if visual.proj is None else x @ visual.proj)

    def logits(self, tokens: Tensor, classifier: Tensor) -> Tensor:
        """Streams [B, T, d] and text embeddings [C, e] -> logits [B, C], temperature included."""
        image = nn.functional.normalize(self.tail(tokens), dim=-1)
        return image @ classifier.T * self.logit_scale

    def encode_image(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] -> embedding [B, e] by the whole model in one go."""
        return _at_least_fp32(self.model.encode_image(images.to(self.compute_dtype)))

    def encode_text(self, tokenised: Tensor, normalize: bool = False) -> Tensor:
        """Tokenised texts [B, context] -> embedding [B, e], of unit length if `normalize`."""
        embedding = _at_least_fp32(self.model.encode_text(tokenised.to(self.device)))
        return nn.functional.normalize(embedding, dim=-1) if normalize else embedding

    @property
    def _reads_class_token_only(self) -> bool:
        visual = self.model.visual
        # The block's own type: subclasses and custom blocks may mix tokens in other ways.
        plain = type(visual.transformer.resblocks[-1]) is ResidualAttentionBlock
        return plain and visual.pool_type == "tok" and visual.transformer.batch_first

    def _run(self, blocks: list[nn.Module], x: Tensor) -> Tensor:
        batch_first = self.model.visual.transformer.batch_first
        x = x if batch_first else x.transpose(0, 1)
        for block in blocks:
            x = block(x)
        return x if batch_first else x.transpose(0, 1)


def _class_token_of_block(block: ResidualAttentionBlock, x: Tensor) -> Tensor:
    """The block's output for the class token alone: [B, T, d] -> [B, 1, d].

    Keys and values are needed of all tokens; query, attention's output and MLP of one.
    """
    h = block.ln_1(x)
    cls = x[:, :1] + block.ls_1(block.attention(q_x=h[:, :1], k_x=h, v_x=h))
    return cls + block.ls_2(block.mlp(block.ln_2(cls)))


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
