"""Building a model of open_clip or timm by name, refusing early and clearly what cannot work."""

import difflib
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from open_clip.pretrained import get_pretrained_cfg
from torch import nn

from clipsae.clip.towers import EXAMPLES
from clipsae.errors import ConfigError

TIMM = "timm:"
TINY = "clipsae-tiny"
PRECISIONS = ("fp32", "bf16")


def build_model(
    name: str,
    pretrained: str | None,
    *,
    precision: str = "fp32",
    seed: int = 0,
    image_size: int | None = None,
) -> nn.Module:
    """A model in eval mode on the CPU; arguments and errors as `FrozenCLIP.load`.

    Everything that can be refused from the names alone is refused before weights are read.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"clip.precision={precision!r}: expected one of {', '.join(PRECISIONS)}")
    if name == TINY:
        # Imported here: only this model needs it.
        from clipsae.clip import tiny

        tiny.register()
    build = _timm if name.startswith(TIMM) else _open_clip
    make = build(name, pretrained, precision, image_size)
    if pretrained is None:
        warnings.warn(
            f"{name} with RANDOM WEIGHTS (clip.pretrained=null): "
            "the pipeline runs, its numbers mean nothing",
            stacklevel=3,
        )
    # Initialisation draws from a generator of its own: random weights depend on `seed` alone, and
    # loading a model leaves the caller's random state as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = make()
        except Exception as error:  # whatever a download or a foreign file can raise
            raise ConfigError(_why_not_loaded(name, pretrained, error)) from error
    return model.eval()


def _open_clip(
    name: str, pretrained: str | None, precision: str, image_size: int | None
) -> Callable[[], nn.Module]:
    config = open_clip.get_model_config(name)
    if config is None:
        near = difflib.get_close_matches(name, [*open_clip.list_models(), TINY], n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see open_clip.list_models()"
        raise ConfigError(f"clip.name={name!r}: open_clip has no such model; {hint}")
    _require_plain_vit(name, config)
    weights = None if pretrained is None else _known_weights(name, config, pretrained)
    return partial(
        open_clip.create_model,
        name,
        weights,
        precision=precision,
        pretrained_text=False,
        force_image_size=image_size,
    )


def _timm(
    name: str, pretrained: str | None, precision: str, image_size: int | None
) -> Callable[[], nn.Module]:
    model = name.removeprefix(TIMM)
    if not timm.is_model(model):
        near = difflib.get_close_matches(model, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models()"
        raise ConfigError(f"clip.name={name!r}: timm has no such model; {hint}")
    if not _is_timm_vit(model):
        raise ConfigError(f"clip.name={name!r}: expected a plain ViT, such as {EXAMPLES}")
    options: dict[str, Any] = {"pretrained": pretrained is not None, "num_classes": 0}
    if image_size is not None:
        options["img_size"] = image_size
    if pretrained is not None:
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{model}.*")]
        path = Path(pretrained).expanduser()
        if pretrained in tags:
            model = f"{model}.{pretrained}"
        elif path.is_file():
            options["pretrained_cfg_overlay"] = {"file": str(path)}
        else:
            raise ConfigError(
                f"clip.pretrained={pretrained!r}: neither a file nor weights that timm knows "
                f"for {model} (those are: {', '.join(tags) or 'none'})"
            )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return lambda: timm.create_model(model, **options).to(dtype)


def weights_file(name: str, pretrained: str | None) -> Path | None:
    """The local file that `pretrained` names, or None: random weights, or a tag of open_clip.

    Raises:
        ConfigError: "builtin" where the package has no such file.
    """
    if pretrained is None or get_pretrained_cfg(name, pretrained):
        return None
    if name == TINY and pretrained == "builtin":
        from clipsae.clip import tiny

        path = tiny.weights_path()
        if not path.is_file():
            raise ConfigError(
                f"{TINY} has no built-in weights at {path}: make them with "
                "`python run.py task=pretrain`, or use clip.pretrained=null (random weights)"
            )
        return path
    path = Path(pretrained).expanduser()
    return path if path.is_file() else None


def _require_plain_vit(name: str, config: dict) -> None:
    vision = config["vision_cfg"]
    size = vision.get("image_size", 224)
    of_timm = vision.get("timm_model_name")
    if of_timm and not _is_timm_vit(of_timm):
        reason = f"its image tower is timm's {of_timm}"
    elif isinstance(vision.get("layers"), list | tuple):
        reason = "its image tower is a ResNet"
    elif vision.get("attentional_pool"):
        reason = "it pools its tokens by attention"
    elif vision.get("pool_type", "tok") not in ("tok", "avg"):
        reason = f"it pools its tokens by {vision['pool_type']!r}"
    elif isinstance(size, list | tuple) and len(set(size)) > 1:
        reason = f"its images are not square ({size[0]} x {size[1]})"
    else:
        return
    raise ConfigError(f"clip.name={name!r}: {reason}; expected a plain ViT, such as {EXAMPLES}")


def _is_timm_vit(model: str) -> bool:
    return timm.models.is_model_in_modules(model, ["vision_transformer"])


def _known_weights(name: str, config: dict, pretrained: str) -> str:
    """The tag or path as open_clip takes it, refused if it is neither or the GELUs differ."""
    tag = get_pretrained_cfg(name, pretrained)
    if not tag:
        path = weights_file(name, pretrained)
        if path is not None:
            return str(path)
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ConfigError(
            f"clip.pretrained={pretrained!r}: neither a file nor weights that open_clip knows "
            f"for {name} (those are: {tags})"
        )
    trained, built = tag.get("quick_gelu", False), config.get("quick_gelu", False)
    if trained != built:
        # open_clip only warns, and computes with an activation that the weights never saw.
        other = name.removesuffix("-quickgelu") + ("-quickgelu" if trained else "")
        gelu = {True: "QuickGELU", False: "plain GELU"}
        raise ConfigError(
            f"clip.name={name!r} computes {gelu[built]}, but its weights {pretrained!r} were "
            f"trained with {gelu[trained]}: use clip.name={other}"
        )
    return pretrained


def _why_not_loaded(name: str, weights: str | None, error: Exception) -> str:
    detail = " ".join(str(error).split())[:200]
    if weights is None:
        return f"clip.name={name!r} could not be built: {detail}"
    if weights_file(name, weights) is not None:
        return f"clip.pretrained={weights!r} does not hold the weights of {name}: {detail}"
    return (
        f"the weights {weights!r} of {name} could not be downloaded: fetch them where there is a "
        f"network (the Hugging Face cache, HF_HOME, may then be copied), or give a weights file: "
        f"clip.pretrained=/path/to/file ({detail})"
    )
