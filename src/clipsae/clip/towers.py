"""Image towers cut in two at a block, behind one interface: open_clip's own ViT, timm's, and timm's
with rotary positions.

B images, T tokens of an image (those that are no patches first, then the patches row by row),
d width, e embedding size, S image side.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import (
    CustomResidualAttentionBlock,
    ResidualAttentionBlock,
    VisionTransformer,
)
from timm.data import resolve_model_data_config
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor, nn

from clipsae.clip.changes import Changes, class_token_of_changes
from clipsae.errors import ConfigError
from clipsae.rules import EMBEDDINGS, check_layer

EXAMPLES = "ViT-B-16-quickgelu, ViT-B-16-SigLIP or timm:vit_small_patch14_dinov2"


class Tower:
    """A ViT as a residual stream [B, T, d]: each block i = 0, 1, ... adds to it the output of its
    attention, then that of its MLP. `tail(prefix(x, i), i)` is `whole(x)`.

    Attributes are those of `FrozenCLIP`, and

        layers: the blocks.
        adds_twice: the classes of blocks whose two additions `attention` and `mlp` compute.
    """

    layers: Sequence[nn.Module]
    adds_twice: tuple[type, ...]
    width: int
    grid: tuple[int, int]
    prefix_tokens: int
    embed_dim: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def blocks(self) -> int:
        return len(self.layers)

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        raise NotImplementedError

    def check(self, name: str, layer: int, hook: str) -> None:
        """Refuse a block that the model `name` does not have, and a hook that its blocks lack.

        Raises:
            ConfigError: as it says.
        """
        check_layer(name, layer, self.blocks)
        if hook in ("attn_out", "mlp_out") and type(self.layers[layer]) not in self.adds_twice:
            raise ConfigError(
                f"clip.hook={hook}: the blocks of {name} ({type(self.layers[layer]).__name__}) do "
                "not add the output of one attention and then that of one MLP: use resid"
            )

    def start(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] -> the stream before the first block, [B, T, d]."""
        raise NotImplementedError

    def through(self, x: Tensor, blocks: range) -> Tensor:
        """The stream after these blocks from that before them, [B, T, d]."""
        for i in blocks:
            x = self.layers[i](x)
        return x

    def attention(self, x: Tensor, block: int) -> Tensor:
        """What a block's attention adds to the stream before the block, [B, T, d]: its output,
        after its layer scale or, where that comes last, its norm."""
        raise NotImplementedError

    def mlp(self, x: Tensor, block: int) -> Tensor:
        """What a block's MLP adds to the stream between attention and MLP, [B, T, d]."""
        raise NotImplementedError

    def prefix(self, images: Tensor, block: int) -> Tensor:
        """Normalised images [B, 3, S, S] -> the residual stream after a block, [B, T, d]."""
        return self.through(self.start(images), range(block + 1))

    def read(self, images: Tensor, block: int, hook: str) -> tuple[Tensor, Tensor | None]:
        """Normalised images [B, 3, S, S] -> the tokens at a hook of a block, and what is needed
        beside them to continue: the stream that they are added to; None where nothing is.

        Args:
            hook: see `FrozenCLIP.load`.
        """
        if hook in EMBEDDINGS:
            return self.whole(images)[:, None], None
        last = block if hook == "resid" else block - 1
        return self.added(self.prefix(images, last), block, hook)

    def added(self, stream: Tensor, block: int, hook: str) -> tuple[Tensor, Tensor | None]:
        """What `read` returns, from the stream [B, T, d] before the block, or at "resid" that after
        it."""
        if hook == "resid":
            return stream, None
        attention = self.attention(stream, block)
        if hook == "attn_out":
            return attention, stream
        between = stream + attention
        return self.mlp(between, block), between

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
    elif type(trunk) is Eva:
        return RotaryTower(visual, trunk)
    else:
        reason = f"its image tower is {type(trunk).__name__}"
    raise ConfigError(f"clip.name={name!r}: {reason}; expected a plain ViT, such as {EXAMPLES}")


class OpenClipTower(Tower):
    """open_clip's own ViT, as CLIP has it: one class token, pooled by it or by the mean."""

    prefix_tokens = 1
    adds_twice = ResidualAttentionBlock, CustomResidualAttentionBlock

    def __init__(self, visual: VisionTransformer) -> None:
        self.visual = visual
        visual.conv1.register_forward_hook(_in_dtype_of_weights)
        self.layers = visual.transformer.resblocks
        self.width = visual.transformer.width
        self.grid = tuple(visual.grid_size)
        self.embed_dim = visual.output_dim
        self.image_size = visual.image_size[0]
        how = getattr(visual, "preprocess_cfg", {"mean": (), "std": ()})
        self.mean, self.std = tuple(how["mean"]), tuple(how["std"])
        # Subclasses and custom blocks may mix tokens in other ways.
        plain = type(self.layers[-1]) is ResidualAttentionBlock
        self._reads_class_token_only = plain and visual.pool_type == "tok"

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.conv1.weight.dtype

    def start(self, images: Tensor) -> Tensor:
        return self.visual._embeds(images)

    def attention(self, x: Tensor, block: int) -> Tensor:
        layer: Any = self.layers[block]
        x = layer.ln_1(x)
        if isinstance(layer, CustomResidualAttentionBlock):
            return layer.ls_1(layer.ln_attn(layer.attn(x)))
        return layer.ls_1(layer.attention(x))

    def mlp(self, x: Tensor, block: int) -> Tensor:
        layer: Any = self.layers[block]
        return layer.ls_2(layer.mlp(layer.ln_2(x)))

    def tail(self, tokens: Tensor, block: int) -> Tensor:
        last = self.blocks - 1
        if block == last or not self._reads_class_token_only:
            x = self.through(tokens, range(block + 1, self.blocks))
        else:
            x = self.through(tokens, range(block + 1, last))
            x = _class_token(cast(ResidualAttentionBlock, self.layers[last]), x)
        return self._projected(self.visual._pool(x)[0])

    def tail_of_changes(self, changes: Changes, block: int) -> Tensor:
        if block != self.blocks - 2 or not self._reads_class_token_only:
            return super().tail_of_changes(changes, block)
        layer = cast(ResidualAttentionBlock, self.layers[-1])
        return self._projected(self.visual.ln_post(class_token_of_changes(layer, changes)))

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
        trunk: the ViT, without a classifier; what open_clip makes of that is the projection.
    """

    adds_twice: tuple[type, ...] = (Block, ResPostBlock)

    def __init__(self, visual: nn.Module, trunk: TimmViT | Eva) -> None:
        self.trunk = trunk
        self.head = nn.Identity() if visual is trunk else cast(nn.Module, visual.head)
        self.layers = trunk.blocks
        self.width = trunk.embed_dim
        self.grid = tuple(trunk.patch_embed.grid_size)
        self.prefix_tokens = trunk.num_prefix_tokens
        projections = [
            part
            for head in (trunk.head, self.head)
            for part in head.modules()
            if isinstance(part, nn.Linear)
        ]
        self.embed_dim = projections[-1].out_features if projections else trunk.num_features
        self.image_size = trunk.patch_embed.img_size[0]
        how: Any = getattr(visual, "preprocess_cfg", None) or resolve_model_data_config(trunk)
        self.mean, self.std = tuple(how["mean"]), tuple(how["std"])

    @property
    def dtype(self) -> torch.dtype:
        return self.trunk.patch_embed.proj.weight.dtype

    def start(self, images: Tensor) -> Tensor:
        return self.trunk.norm_pre(self.trunk._pos_embed(self.trunk.patch_embed(images)))

    def attention(self, x: Tensor, block: int) -> Tensor:
        layer: Any = self.layers[block]
        if isinstance(layer, ResPostBlock):
            return layer.norm1(layer.attn(x))
        return layer.ls1(layer.attn(layer.norm1(x)))

    def mlp(self, x: Tensor, block: int) -> Tensor:
        layer: Any = self.layers[block]
        if isinstance(layer, ResPostBlock):
            return layer.norm2(layer.mlp(x))
        return layer.ls2(layer.mlp(layer.norm2(x)))

    def tail(self, tokens: Tensor, block: int) -> Tensor:
        x = self.through(tokens, range(block + 1, self.blocks))
        return self.head(self.trunk.forward_head(self.trunk.norm(x)))

    def whole(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(images))


class RotaryTower(TimmTower):
    """timm's ViT with rotary positions, which each attention needs: DINOv3 and EVA by themselves,
    the Perception Encoder also as the image tower of an open_clip model."""

    adds_twice = EvaBlock, EvaBlockPostNorm

    def start(self, images: Tensor) -> Tensor:
        x, _ = self.trunk._pos_embed(self.trunk.patch_embed(images))
        return self.trunk.norm_pre(x)

    def _positions(self) -> Sequence[Tensor | None]:
        """The rotary positions of each block, as the model makes them of any image."""
        size = self.image_size
        blank = self.trunk.patch_embed.proj.weight.new_zeros(1, 3, size, size)
        _, positions = self.trunk._pos_embed(self.trunk.patch_embed(blank))
        # In mixed mode each block has its own.
        return positions if getattr(self.trunk, "rope_mixed", False) else [positions] * self.blocks

    def through(self, x: Tensor, blocks: range) -> Tensor:
        positions = self._positions()
        for i in blocks:
            x = self.layers[i](x, rope=positions[i])
        return x

    def attention(self, x: Tensor, block: int) -> Tensor:
        layer: Any = self.layers[block]
        rope = self._positions()[block]
        if isinstance(layer, EvaBlockPostNorm):
            return layer.norm1(layer.attn(x, rope=rope))
        return _scaled(layer.gamma_1, layer.attn(layer.norm1(x), rope=rope))

    def mlp(self, x: Tensor, block: int) -> Tensor:
        layer: Any = self.layers[block]
        if isinstance(layer, EvaBlockPostNorm):
            return layer.norm2(layer.mlp(x))
        return _scaled(layer.gamma_2, layer.mlp(layer.norm2(x)))


def _scaled(scale: Tensor | None, x: Tensor) -> Tensor:
    return x if scale is None else scale * x


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
