"""The separate image encoder of MonoSemanticity, by name.

Images come as the SAE's CLIP sees them, uint8 [B, 3, S, S], already resized and cropped; an
encoder resizes them on the device to its own size (bicubic with antialiasing) and normalises them
with its own mean and standard deviation. Where S is smaller than that size this is upsampling.

B images, S image side, e embedding size.
"""

import warnings
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from torch import Tensor, nn

from clipsae.clip import FrozenCLIP
from clipsae.clip.build import create_open_clip, create_timm
from clipsae.clip.sources import published_by_timm
from clipsae.errors import ConfigError
from clipsae.evaluation.truth import AttributeEncoder, has_truth

RANDOM = "random"
_EXPECTED = (
    'expected "open_clip:MODEL/WEIGHTS" (such as open_clip:ViT-B-32/openai), "timm:MODEL" (such as '
    'timm:vit_small_patch14_dinov2.lvd142m), "tiny" or "attributes"'
)


class ImageEncoder(nn.Module):
    """A frozen backbone with its own preprocessing.

    Args:
        name: for results.
        backbone: normalised images [B, 3, h, w] -> embeddings [B, e].
        size: (h, w).
        mean, std: per channel, of values in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        backbone: nn.Module,
        size: tuple[int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.name = name
        self.backbone = backbone
        self.size = tuple(size)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def preprocess(self, images: Tensor) -> Tensor:
        """Images uint8 [B, 3, S, S] -> normalised float32 [B, 3, h, w] on this device."""
        if images.dtype != torch.uint8:
            raise ValueError(f"images of dtype {images.dtype}: expected uint8 in 0..255")
        x = images.to(self.mean.device).float()
        if tuple(x.shape[-2:]) != self.size:
            x = nn.functional.interpolate(x, self.size, mode="bicubic", antialias=True)
            x = x.clamp(0, 255)  # bicubic overshoots at edges
        return (x / 255 - self.mean) / self.std

    def forward(self, images: Tensor, indices: Tensor | None = None) -> Tensor:
        """Images uint8 [B, 3, S, S] -> float32 [B, e]; which images they are does not matter."""
        return self.backbone(self.preprocess(images)).float()


def image_encoder(name: str, dataset: Any = None) -> nn.Module:
    """An encoder to compare images with: a module called with (images uint8, indices) -> [B, e].

    Args:
        name: one of
            "open_clip:MODEL/WEIGHTS": the projected image embedding of any open_clip model; the
            weights are a tag, a file's path, or "random".
            "timm:MODEL" or "timm:MODEL/WEIGHTS": timm's pooled features before a classifier (for
            DINOv2 the normalised class token); weights as above, timm's own by default.
            "tiny": the built-in CLIP's own embedding. Not a separate encoder where the SAE reads
            that same model: the score then flatters.
            "attributes": the dataset's ground truth (`AttributeEncoder`).
        dataset: needed by "attributes".

    Raises:
        ConfigError: a name of another form, an unknown model, weights that cannot be had, a
            dataset without ground truth.
    """
    if name == "tiny":
        clip = FrozenCLIP.load("clipsae-tiny", "builtin")
        size = (clip.image_size, clip.image_size)
        return ImageEncoder(name, _Embedding(clip, "encode_image"), size, clip.mean, clip.std)
    if name == "attributes":
        if not has_truth(dataset):
            raise ConfigError(
                f"image_encoder='attributes' on {getattr(dataset, 'name', dataset)!r}: expected a "
                "dataset with ground truth, such as the built-in scenes; choose another encoder"
            )
        return AttributeEncoder(dataset)
    library, _, rest = name.partition(":")
    model, _, weights = rest.partition("/")
    if (
        library not in ("open_clip", "timm")
        or not model
        or (library == "open_clip" and not weights)
    ):
        raise ConfigError(f"image_encoder={name!r}: {_EXPECTED}")
    if weights == RANDOM:
        warnings.warn(f"{name}: RANDOM WEIGHTS, its scores mean nothing", stacklevel=2)
    build = _open_clip if library == "open_clip" else _timm
    try:
        with torch.random.fork_rng(devices=[]):  # random weights are the same each time
            torch.manual_seed(0)
            return build(name, model, weights)
    except Exception as error:  # whatever a download or a foreign file can raise
        detail = " ".join(str(error).split())[:200]
        raise ConfigError(f"image_encoder={name!r} could not be had: {detail}") from error


class _Embedding(nn.Module):
    """A model's method as a module, so that it moves with its owner."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model = model
        self.method = method

    def forward(self, images: Tensor) -> Tensor:
        return getattr(self.model, self.method)(images)


def _open_clip(name: str, model: str, weights: str) -> ImageEncoder:
    if open_clip.get_model_config(model) is None:
        raise ValueError(f"open_clip has no model {model!r}")
    given = None if weights == RANDOM else weights
    built: Any = create_open_clip(model, given, weights_decide=True).eval()
    how = built.visual.preprocess_cfg
    size = how["size"]
    size = (size, size) if isinstance(size, int) else tuple(size)
    return ImageEncoder(name, _Embedding(built, "encode_image"), size, how["mean"], how["std"])


def _timm(name: str, model: str, weights: str) -> ImageEncoder:
    if weights == RANDOM:
        file = None
    elif weights:
        file = Path(weights).expanduser()
    else:
        file, _ = published_by_timm(model)
    built = create_timm(model, file)
    how = timm.data.resolve_model_data_config(built)
    return ImageEncoder(name, built, how["input_size"][1:], how["mean"], how["std"])
