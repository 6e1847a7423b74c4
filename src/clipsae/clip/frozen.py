"""A frozen CLIP, cut in two where the SAE reads it.

    image -> prefix -> tokens [B, T, d] -> tail -> embedding [B, e]

`tail(prefix(x))` equals the whole model's `encode_image(x)` for every layer; changes to the tokens
in between (an SAE's reconstruction, a masked one) reach the embedding. Beside the residual stream
the tokens may be what a block's attention or MLP adds to it; then the stream itself, the context,
is handed from `prefix` to `tail`, too.

B images, T tokens of an image (class token first, then the patches row by row), d width,
e embedding size, S image side. DINOv2 through timm is cut in the same way, though it has no texts.
At the hook "towers" captions are read, too: `pairs` has an image's embedding and its caption's.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, overload

import torch
from open_clip import get_model_config, get_tokenizer
from torch import Tensor, nn

from clipsae.clip.build import build_model
from clipsae.clip.changes import Changes
from clipsae.clip.sources import HUB, cache_alone_if_offline, weights_file
from clipsae.clip.towers import tower_of
from clipsae.errors import ConfigError
from clipsae.rules import (
    CLIP_PRECISION,
    EMBEDDINGS,
    TOKENS,
    check_layer,
    check_layers,
    require,
)


class FrozenCLIP(nn.Module):
    """A model with a plain ViT image tower, never trained and always in eval mode.

    Make one with `FrozenCLIP.load`. It belongs to whoever streams features (the DataModule), not
    to the module that is trained, and so is no part of a checkpoint.

    Attributes:
        name, pretrained: as given to `load`.
        precision: the same; it may be changed.
        layer: index of the last block in the prefix, counted from the end (-1: all blocks).
        hook: as given to `load`.
        blocks: number of blocks in the image tower.
        width: d.  tokens: T.  grid: (rows, columns) of patches.  embed_dim: e.
        prefix_tokens: tokens before the patches: 1 in CLIP, 0 in SigLIP, 5 with four registers.
        has_patches: False at the hooks "embedding" and "towers", where the image is one token of
            width e: T = 1, grid (1, 1), no prefix tokens.
        has_captions: True at the hook "towers", where SAEs are trained on `pairs`.
        positions: tokens of an image and its caption: T, at the hook "towers" T + 1.
        has_text: whether texts can be embedded beside images.
        image_size: S.  mean, std: the model's own normalisation, per channel, of values in [0, 1].
    """

    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        pretrained: str | None = None,
        layer: int = -2,
        hook: str = "resid",
        precision: str = "fp32",
    ) -> None:
        super().__init__()
        self.model: Any = model  # of a library without types
        self.tower = tower = tower_of(name, getattr(model, "visual", model))
        tower.check(name, layer, hook)
        self.name = name
        self.pretrained = pretrained
        self.precision = precision
        self.blocks = tower.blocks
        self.layer = layer - tower.blocks if layer >= 0 else layer
        self.hook = hook
        self.has_text = hasattr(model, "encode_text")
        self.has_patches = hook not in EMBEDDINGS
        self.has_captions = hook == "towers"
        if self.has_captions and not self.has_text:
            raise ConfigError(
                f"clip.hook=towers: clip.name={name!r} has no text tower, so captions have no "
                "embeddings: use clip.hook=embedding"
            )
        self.width = tower.width if self.has_patches else tower.embed_dim
        self.grid = tower.grid if self.has_patches else (1, 1)
        self.prefix_tokens = tower.prefix_tokens if self.has_patches else 0
        self.tokens = self.prefix_tokens + self.grid[0] * self.grid[1]
        self.positions = self.tokens + self.has_captions
        self.embed_dim = tower.embed_dim
        self.image_size = tower.image_size
        self.mean, self.std = tower.mean, tower.std
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
        image_size: int | None = None,
        hook: str = "resid",
    ) -> "FrozenCLIP":
        """Build a model by open_clip's or timm's name for it, and its weights.

        Args:
            name: an open_clip model with a plain ViT image tower, "timm:MODEL" (no texts),
                "clipsae-tiny", or as for open_clip "local-dir:FOLDER" or "hf-hub:REPOSITORY" with
                an `open_clip_config.json`.
            pretrained: a tag that open_clip (or timm) knows for this model; the path of a file of
                weights (see `weights.py`), or of a folder or cached repository of the Hugging Face
                Hub that holds one; a repository of the Hub; "builtin": what comes
                with clipsae-tiny or lies in the folder of `name`; None: random weights, with a
                warning.
            layer: the prefix ends with this block: -2 is the second to last (the paper's), -1 the
                last, 0 the first.
            precision: "fp32", or "bf16-mixed": the prefix runs under bfloat16 autocast. Weights and
                the residual stream are float32 either way; so are the tail and the text tower.
            seed: of the random weights of `pretrained=None`.
            image_size: S, if not the model's own; positions are interpolated.
            hook: what the tokens are. "resid": the residual stream after block `layer`; "attn_out",
                "mlp_out": what the block's attention or MLP adds to the stream, with its layer
                scale (in TransformerLens hook_resid_post, hook_attn_out and hook_mlp_out);
                "embedding": the image's embedding [1, e], whatever the layer; "towers": the same,
                of unit length, and in the training its caption's beside it (`pairs`).

        Raises:
            ConfigError: an unknown name, tag, precision or hook; a model that is no plain ViT;
                weights trained with another activation, or not available; a layer out of range,
                a hook that its blocks lack; "towers" without a text tower. None of this waits for
                a network that is down.
        """
        require("precision", precision, CLIP_PRECISION)
        model = build_model(
            name, pretrained, layer=layer, hook=hook, seed=seed, image_size=image_size
        )
        return cls(
            model,
            name=name,
            pretrained=pretrained,
            layer=layer,
            hook=hook,
            precision=precision,
        )

    weights_file = staticmethod(weights_file)

    def train(self, mode: bool = True) -> "FrozenCLIP":
        """Stays in eval mode: a trainer calls this on all it holds."""
        return super().train(False)

    def require_text(self) -> None:
        """Raises ConfigError if there is no text tower."""
        if not self.has_text:
            raise ConfigError(
                f"clip.name={self.name!r} has no text tower, so it cannot name classes: train and "
                "measure without zero-shot classification by evaluation=none"
            )

    @property
    def device(self) -> torch.device:
        return self._mean.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the image tower's weights."""
        return self.tower.dtype

    @cached_property
    def tokenizer(self) -> Any:
        """open_clip's tokenizer of this model: list of strings -> LongTensor [B, context].

        Raises:
            ConfigError: no text tower, or a tokenizer that cannot be loaded.
        """
        self.require_text()
        of_hub = self.name.startswith(HUB) or (get_model_config(self.name) or {}).get(
            "text_cfg", {}
        ).get("hf_tokenizer_name")
        try:
            with cache_alone_if_offline() if of_hub else nullcontext():
                return get_tokenizer(self.name)
        except Exception as error:  # a download or a missing package can raise anything
            detail = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"the tokenizer of clip.name={self.name!r} cannot be loaded: it comes from the "
                f"Hugging Face Hub through the package transformers ({detail})"
            ) from error

    @property
    def logit_scale(self) -> Tensor:
        """The factor that cosines are multiplied with (the exponential of the parameter).

        Raises:
            ConfigError: there is no text tower.
        """
        self.require_text()
        return self.model.logit_scale.exp().float()

    def normalize(self, images: Tensor) -> Tensor:
        """Images uint8 [B, 3, S, S] -> float32 of the same shape on this model's device."""
        if images.dtype != torch.uint8:
            raise ValueError(f"images of dtype {images.dtype}: expected uint8 in 0..255")
        images = images.to(self.device, non_blocking=True).to(self._mean.dtype)
        return images.div_(255).sub_(self._mean).div_(self._std)

    @overload
    def prefix(self, images: Tensor) -> Tensor: ...

    @overload
    def prefix(
        self, images: Tensor, *, with_context: Literal[True]
    ) -> tuple[Tensor, Tensor | None]: ...

    def prefix(
        self, images: Tensor, *, with_context: bool = False
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Normalised images [B, 3, S, S] -> the tokens [B, T, d] at `hook` of block `layer`; at
        "towers" their embeddings [B, 1, e], of unit length.

        Args:
            with_context: also returns what `tail` needs beside them: at "attn_out" and "mlp_out"
                the stream [B, T, d] that they are added to, else None.
        """
        with self._autocast():
            images = images.to(self.compute_dtype)
            tokens, context = self.tower.read(images, self.blocks + self.layer, self.hook)
        tokens = _at_least_fp32(tokens)
        if self.has_captions:
            tokens = nn.functional.normalize(tokens, dim=-1)
        if not with_context:
            return tokens
        return tokens, None if context is None else _at_least_fp32(context)

    def pairs(self, images: Tensor, texts: Tensor) -> Tensor:
        """Images and their captions as an SAE of both towers is trained on them: the embeddings
        [B, 2, e], of unit length, position 0 the image's and position 1 its caption's.

        Args:
            images: normalised, [B, 3, S, S].
            texts: the tokenised captions [B, context].

        Raises:
            ConfigError: another hook than "towers".
        """
        if not self.has_captions:
            raise ConfigError(
                f"clip.hook={self.hook}: the tokens are of images alone; those of images and "
                "captions are at clip.hook=towers"
            )
        captions = self.encode_text(texts, normalize=True)
        return torch.cat((self.prefix(images), captions[:, None]), dim=1)

    @overload
    def prefixes(self, images: Tensor, layers: Iterable[int]) -> dict[int, Tensor]: ...

    @overload
    def prefixes(
        self, images: Tensor, layers: Iterable[int], *, with_context: Literal[True]
    ) -> dict[int, tuple[Tensor, Tensor | None]]: ...

    def prefixes(
        self, images: Tensor, layers: Iterable[int], *, with_context: bool = False
    ) -> dict[int, Tensor] | dict[int, tuple[Tensor, Tensor | None]]:
        """The tokens [B, T, d] at `hook` of each of several blocks, in one pass: as much work as
        the deepest `prefix` alone, and each is bit for bit what it is alone.

        Args:
            images: normalised, [B, 3, S, S].
            layers: of the blocks, counted from the end as `layer` is.
            with_context: as for `prefix`.

        Raises:
            ConfigError: several layers of the hook "embedding" or "towers".
        """
        layers = sorted(set(layers))
        self.check_layers(layers)
        found: dict[int, tuple[Tensor, Tensor | None]] = {}
        with self._autocast():
            stream, done = self.tower.start(images.to(self.compute_dtype)), 0
            for layer in layers:
                block = self.blocks + layer
                # Up to the block, and through it only where the stream behind it is what is read.
                end = block + 1 if self.hook == "resid" else block
                stream, done = self.tower.through(stream, range(done, end)), end
                tokens, context = self.tower.added(stream, block, self.hook)
                found[layer] = _at_least_fp32(tokens), context
        if with_context:
            pairs = found.items()
            return {at: (x, None if c is None else _at_least_fp32(c)) for at, (x, c) in pairs}
        return {layer: tokens for layer, (tokens, _) in found.items()}

    def check_layers(self, layers: Iterable[int]) -> None:
        """Refuse several layers where they make no difference (`rules.check_layers`).

        Raises:
            ConfigError: several layers of the hook "embedding" or "towers".
        """
        check_layers(self.hook, layers)

    def at(self, layer: int, option: str = "clip.layer") -> "FrozenCLIP":
        """The same model cut after another block; the weights are shared.

        Raises:
            ConfigError: a layer out of range, where `option` is what the message calls it, or one
                whose block lacks the hook.
        """
        check_layer(self.name, layer, self.blocks, option)
        self.tower.check(self.name, layer, self.hook)
        other = copy(self)
        other.layer = layer - self.blocks if layer >= 0 else layer
        return other

    def token_slice(self, tokens: str) -> slice:
        """Where "all", "patches" or "cls" (the class token) lie among the T tokens of an image.

        Raises:
            ConfigError: other words; the class token of a model that has none; a part of the one
                token at the hooks "embedding" and "towers".
        """
        require("features.tokens", tokens, TOKENS)
        if tokens != "all" and not self.has_patches:
            raise ConfigError(
                f"features.tokens={tokens}: at clip.hook={self.hook} an image is one token, its "
                "embedding: use all"
            )
        if tokens == "cls" and not self.prefix_tokens:
            raise ConfigError(
                f"features.tokens=cls: {self.name} has no class token; use all or patches"
            )
        slices = {"all": slice(None), "patches": slice(self.prefix_tokens, None)}
        return slices.get(tokens, slice(1))

    def with_tokens(self, stream: Tensor, part: Tensor, tokens: str) -> Tensor:
        """Streams [B, T, d] whose `token_slice(tokens)` is replaced by `part` [B, T', d]."""
        if part.shape == stream.shape:
            return part
        replaced = stream.clone()
        replaced[:, self.token_slice(tokens)] = part
        return replaced

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "fp32":  # whatever the caller has chosen
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def tail(self, tokens: Tensor, context: Tensor | None = None) -> Tensor:
        """The tokens [B, T, d] at `hook` of block `layer` -> embedding [B, e], not normalised.

        Differentiable in `tokens`.

        Args:
            context: what `prefix(images, with_context=True)` returned beside the tokens.

        Raises:
            ValueError: tokens of another shape, or a context that is missing or of another shape.
        """
        if tokens.ndim != 3 or tokens.shape[1:] != (self.tokens, self.width):
            raise ValueError(
                f"tokens of shape {tuple(tokens.shape)}: expected [B, {self.tokens}, {self.width}]"
            )
        if not self.has_patches:
            return _at_least_fp32(tokens[:, 0])
        stream = self._stream(tokens, context)
        return _at_least_fp32(self.tower.tail(stream, self.blocks + self.layer))

    def _stream(self, tokens: Tensor, context: Tensor | None) -> Tensor:
        """The residual stream after block `layer`, of tokens at `hook` and their context."""
        tokens = tokens.to(self.compute_dtype)
        if self.hook == "resid":
            return tokens
        if context is None or context.shape != tokens.shape:
            raise ValueError(
                f"context {None if context is None else tuple(context.shape)} of tokens "
                f"{tuple(tokens.shape)} at hook {self.hook!r}: expected the stream that they are "
                "added to, which prefix(images, with_context=True) returns beside them"
            )
        stream = context.to(self.compute_dtype) + tokens
        if self.hook == "attn_out":
            stream = stream + self.tower.mlp(stream, self.blocks + self.layer)
        return stream

    def tail_of_changes(self, changes: Changes, context: Tensor | None = None) -> Tensor:
        """The tail of versions of one image's tokens [T, d] -> embedding [V, e].

        With the default layer the work is by the changes, not by the tokens of all versions.

        Args:
            context: of the image, [T, d], as for `tail`.
        """
        if self.hook in EMBEDDINGS:
            return self.tail(changes.streams())
        stream, change = self._stream(changes.stream, context), changes.change
        if self.hook == "attn_out":  # which the MLP reads: what it adds to the same token changes
            at = changes.token
            beside = None if context is None else context[at]
            change = self._stream(changes.stream[at] + change, beside) - stream[at]
        changes = replace(changes, stream=stream, change=change).to(self.compute_dtype)
        return _at_least_fp32(self.tower.tail_of_changes(changes, self.blocks + self.layer))

    def direct(self, rows: Tensor) -> Tensor | None:
        """What rows [M, d], added to a token, add to the embedding [M, e] directly, to first order
        and up to a scale, the later blocks left out; None where the embedding is no linear map of a
        normed token. Of an embedding the rows are that themselves."""
        return self.tower.direct(rows) if self.has_patches else rows.float()

    def logits(self, tokens: Tensor, classifier: Tensor, context: Tensor | None = None) -> Tensor:
        """Tokens [B, T, d], with their context as for `tail`, and text embeddings [C, e] -> logits
        [B, C], temperature included."""
        return self.logits_of(self.tail(tokens, context), classifier)

    def logits_of(self, image: Tensor, classifier: Tensor) -> Tensor:
        """Image embeddings [B, e] of any length and text embeddings [C, e] -> logits [B, C]."""
        return nn.functional.normalize(image, dim=-1) @ classifier.T * self.logit_scale

    def encode_image(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] -> embedding [B, e] by the whole model in one go."""
        return _at_least_fp32(self.tower.whole(images.to(self.compute_dtype)))

    def encode_text(self, tokenised: Tensor, normalize: bool = False) -> Tensor:
        """Tokenised texts [B, context] -> embedding [B, e], of unit length if `normalize`.

        Raises:
            ConfigError: there is no text tower.
        """
        self.require_text()
        embedding = _at_least_fp32(self.model.encode_text(tokenised.to(self.device)))
        return nn.functional.normalize(embedding, dim=-1) if normalize else embedding


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
