"""The separate image encoder of MonoSemanticity, by name.

Images come as the SAE's CLIP sees them, uint8 [B, 3, S, S], already resized and cropped; an
encoder resizes them on the device to its own size (bicubic with antialiasing) and normalises them
with its own mean and standard deviation. Where S is smaller than that size this is upsampling.

B images, S image side, e embedding size.
"""

import warnings
from collections.abc import Callable, Sequence
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
# Suffixes of the numbers of further encoders, by what their names contain.
JUDGES = ("dinov2", "siglip", "tiny", "attributes", "clip")
_EXPECTED = (
    'expected "open_clip:MODEL/WEIGHTS" (such as open_clip:ViT-B-32/openai), "timm:MODEL" (such as '
    'timm:vit_small_patch14_dinov2.lvd142m), "tiny" or "attributes"'
)


class ImageEncoder(nn.Module):
    """A frozen model with its own preprocessing.

    Args:
        name: for results.
        model: the module whose weights `embed` uses.
        embed: normalised images [B, 3, h, w] -> embeddings [B, e].
        size: (h, w), or h = w.
        mean, std: per channel, of values in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        model: nn.Module,
        embed: Callable[[Tensor], Tensor],
        size: int | Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.name = name
        self.model = model
        self.embed = embed
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor, indices: Tensor | None = None) -> Tensor:
        """Images uint8 [B, 3, S, S] -> float32 [B, e]; indices are not used."""
        if images.dtype != torch.uint8:
            raise ValueError(f"images of dtype {images.dtype}: expected uint8 in 0..255")
        x = images.to(self.mean.device).float()
        if tuple(x.shape[-2:]) != self.size:
            x = nn.functional.interpolate(x, self.size, mode="bicubic", antialias=True)
            x = x.clamp(0, 255)  # bicubic overshoots at edges
        return self.embed((x / 255 - self.mean) / self.std).float()


def judge(name: str) -> str:
    """The suffix of a further encoder's numbers, one of `JUDGES` or "other": "dinov2" of
    timm:vit_small_patch14_dinov2.lvd142m."""
    return next((one for one in JUDGES if one in name.lower()), "other")


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
        ConfigError: a name of another form, an unknown model, weights that cannot be loaded, a
            dataset without ground truth.
    """
    if name == "tiny":
        clip = FrozenCLIP.load("clipsae-tiny", "builtin")
        return ImageEncoder(name, clip, clip.encode_image, clip.image_size, clip.mean, clip.std)
    if name == "attributes":
        if not has_truth(dataset):
            raise ConfigError(
                f"image_encoder='attributes' on {getattr(dataset, 'name', dataset)!r}: expected a "
                "dataset with ground truth, such as the built-in scenes; choose another encoder"
            )
        return AttributeEncoder(dataset)
    library, _, rest = name.partition(":")
    model, _, weights = rest.partition("/")
    build = {"open_clip": _open_clip, "timm": _timm}.get(library)
    if build is None or not model or (library == "open_clip" and not weights):
        raise ConfigError(f"image_encoder={name!r}: {_EXPECTED}")
    if weights == RANDOM:
        warnings.warn(f"{name}: RANDOM WEIGHTS, its scores mean nothing", stacklevel=2)
    try:
        with torch.random.fork_rng(devices=[]):  # random weights are the same each time
            torch.manual_seed(0)
            return build(name, model, weights)
    except Exception as error:  # anything that a download or a file from elsewhere can raise
        detail = " ".join(str(error).split())[:200]
        raise ConfigError(f"image_encoder={name!r} cannot be loaded: {detail}") from error


def _open_clip(name: str, model: str, weights: str) -> ImageEncoder:
    if open_clip.get_model_config(model) is None:
        raise ValueError(f"open_clip has no model {model!r}")
    given = None if weights == RANDOM else weights
    built: Any = create_open_clip(model, given, weights_decide=True)
    how = built.visual.preprocess_cfg
    return ImageEncoder(name, built, built.encode_image, how["size"], how["mean"], how["std"])


def _timm(name: str, model: str, weights: str) -> ImageEncoder:
    if weights == RANDOM:
        file = None
    elif weights:
        file = Path(weights).expanduser()
    else:
        file, _ = published_by_timm(model)
    built = create_timm(model, file)
    how = timm.data.resolve_model_data_config(built)
    return ImageEncoder(name, built, built.forward, how["input_size"][1:], how["mean"], how["std"])
