"""Image towers cut in two at a block, behind one interface: open_clip's own ViT, and timm's.

B images, T tokens of an image (those that are no patches first, then the patches row by row),
d width, e embedding size, S image side.
"""

from typing import Any, cast

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor, nn

from clipsae.clip.changes import Changes, class_token_of_changes
from clipsae.errors import ConfigError

EXAMPLES = "ViT-B-16-quickgelu, ViT-B-16-SigLIP or timm:vit_small_patch14_dinov2"


class Tower:
    """A ViT whose `tail(prefix(x, i), i)` is `whole(x)` for every block i = 0, 1, ...

    Attributes are those of `FrozenCLIP`.
    """

    blocks: int
    width: int
    grid: tuple[int, int]
    prefix_tokens: int
    embed_dim: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        raise NotImplementedError

    def prefix(self, images: Tensor, block: int) -> Tensor:
        """Normalised images [B, 3, S, S] -> the residual stream after a block, [B, T, d]."""
        raise NotImplementedError

    def through(self, x: Tensor, blocks: range) -> Tensor:
        """The stream after these blocks from that before them, [B, T, d]."""
        raise NotImplementedError

    def tail(self, tokens: Tensor, block: int) -> Tensor:
        """The residual stream after a block, [B, T, d] -> embedding [B, e]."""
        raise NotImplementedError

    def whole(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] -> embedding [B, e], as the library computes it."""
        raise NotImplementedError

    def tail_of_changes(self, changes: Changes, block: int) -> Tensor:
        """The tail of versions of one image's stream -> embedding [V, e]."""
        return self.tail(changes.streams(), block)

    def direct(self, rows: Tensor) -> Tensor | None:
        """What rows [M, d], added to the last stream, add to the embedding [M, e] to first order,
        up to the layer norm's scale; None where the embedding is no linear map of a normed token.
        """
        return None


def tower_of(name: str, visual: Any) -> Tower:
    """The tower of an open_clip model's `visual`, or of a timm model.

    Raises:
        ConfigError: it is no plain ViT.
    """
    trunk = visual.trunk if isinstance(visual, TimmModel) else visual
    if isinstance(visual, VisionTransformer):
        if visual.attn_pool is not None:
            reason = "it pools its tokens by attention"
        elif visual.pool_type not in ("tok", "avg"):
            reason = f"it pools its tokens by {visual.pool_type!r}"
        elif len(set(visual.image_size)) > 1:
            reason = "its images are not square ({} x {})".format(*visual.image_size)
        else:
            return OpenClipTower(visual)
    elif type(trunk) is TimmViT:  # subclasses may mix tokens in other ways
        return TimmTower(visual, trunk)
    else:
        reason = f"its image tower is {type(trunk).__name__}"
    raise ConfigError(f"clip.name={name!r}: {reason}; expected a plain ViT, such as {EXAMPLES}")


class OpenClipTower(Tower):
    """open_clip's own ViT, as CLIP has it: one class token, pooled by it or by the mean."""

    prefix_tokens = 1

    def __init__(self, visual: VisionTransformer) -> None:
        self.visual = visual
        visual.conv1.register_forward_hook(_in_dtype_of_weights)
        self.blocks = len(visual.transformer.resblocks)
        self.width = visual.transformer.width
        self.grid = tuple(visual.grid_size)
        self.embed_dim = visual.output_dim
        self.image_size = visual.image_size[0]
        how = getattr(visual, "preprocess_cfg", {"mean": (), "std": ()})
        self.mean, self.std = tuple(how["mean"]), tuple(how["std"])
        # Subclasses and custom blocks may mix tokens in other ways.
        plain = type(visual.transformer.resblocks[-1]) is ResidualAttentionBlock
        self._reads_class_token_only = plain and visual.pool_type == "tok"

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.conv1.weight.dtype

    def prefix(self, images: Tensor, block: int) -> Tensor:
        found = self.visual.forward_intermediates(
            images,
            indices=[block],
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        parts = found["image_intermediates_prefix"][0], found["image_intermediates"][0]
        return torch.cat(parts, dim=1)

    def through(self, x: Tensor, blocks: range) -> Tensor:
        for i in blocks:
            x = self.visual.transformer.resblocks[i](x)
        return x

    def tail(self, tokens: Tensor, block: int) -> Tensor:
        x = tokens
        for i in range(block + 1, self.blocks):
            layer = self.visual.transformer.resblocks[i]
            last = i == self.blocks - 1
            x = _class_token(layer, x) if last and self._reads_class_token_only else layer(x)
        return self._projected(self.visual._pool(x)[0])

    def tail_of_changes(self, changes: Changes, block: int) -> Tensor:
        if block != self.blocks - 2 or not self._reads_class_token_only:
            return super().tail_of_changes(changes, block)
        x = class_token_of_changes(self.visual.transformer.resblocks[-1], changes)
        return self._projected(self.visual.ln_post(x))

    def _projected(self, x: Tensor) -> Tensor:
        return x if self.visual.proj is None else x @ self.visual.proj

    def whole(self, images: Tensor) -> Tensor:
        return self.visual(images)

    def direct(self, rows: Tensor) -> Tensor:
        visual = self.visual
        centred = (rows - rows.mean(dim=-1, keepdim=True)).float() * visual.ln_post.weight.float()
        return centred if visual.proj is None else centred @ visual.proj.float()


class TimmTower(Tower):
    """timm's ViT: DINOv2 by itself, SigLIP as the image tower of an open_clip model.

    Args:
        visual: the whole tower: the ViT, or open_clip's wrapper with a head behind it.
        trunk: the ViT, without a classifier.
    """

    def __init__(self, visual: nn.Module, trunk: TimmViT) -> None:
        self.trunk = trunk
        self.head = nn.Identity() if visual is trunk else cast(nn.Module, visual.head)
        self.blocks = len(trunk.blocks)
        self.width = trunk.embed_dim
        self.grid = tuple(trunk.patch_embed.grid_size)
        self.prefix_tokens = trunk.num_prefix_tokens
        projections = [part for part in self.head.modules() if isinstance(part, nn.Linear)]
        self.embed_dim = projections[-1].out_features if projections else trunk.num_features
        self.image_size = trunk.patch_embed.img_size[0]
        how: Any = getattr(visual, "preprocess_cfg", None) or resolve_model_data_config(trunk)
        self.mean, self.std = tuple(how["mean"]), tuple(how["std"])

    @property
    def dtype(self) -> torch.dtype:
        return self.trunk.patch_embed.proj.weight.dtype

    def prefix(self, images: Tensor, block: int) -> Tensor:
        (found,) = self.trunk.forward_intermediates(
            images,
            indices=[block],
            return_prefix_tokens=True,
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
        )
        if not self.prefix_tokens:
            return found
        patches, others = found
        return torch.cat([others, patches], dim=1)

    def through(self, x: Tensor, blocks: range) -> Tensor:
        return self.trunk.blocks[blocks.start : blocks.stop](x)

    def tail(self, tokens: Tensor, block: int) -> Tensor:
        x = self.trunk.blocks[block + 1 :](tokens)
        return self.head(self.trunk.forward_head(self.trunk.norm(x)))

    def whole(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(images))


def _in_dtype_of_weights(convolution: nn.Conv2d, _: Any, patches: Tensor) -> Tensor:
    """The residual stream is float32 under autocast, too: open_clip's has the dtype of the patches,
    and in bfloat16 the tokens' errors would be twice as large."""
    return patches.to(convolution.weight.dtype)


def _class_token(block: ResidualAttentionBlock, x: Tensor) -> Tensor:
    """The block's output for the class token alone: [B, T, d] -> [B, 1, d].

    Keys and values are needed of all tokens; query, attention's output and MLP of one.
    """
    h = block.ln_1(x)
    cls = x[:, :1] + block.ls_1(block.attention(q_x=h[:, :1], k_x=h, v_x=h))
    return cls + block.ls_2(block.mlp(block.ln_2(cls)))
