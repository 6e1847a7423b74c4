"""Building a model of open_clip or timm by name, refusing early and clearly what cannot work."""

import logging
import warnings
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from open_clip.model import _build_vision_tower
from open_clip.pretrained import get_pretrained_cfg
from torch import nn

from clipsae.clip import tiny
from clipsae.clip.sources import (
    BUILTIN,
    FOLDER,
    HUB,
    TIMM,
    fetch,
    find_weights,
    usual_preprocess,
)
from clipsae.clip.towers import Tower, tower_of
from clipsae.clip.weights import put_weights, read_weights
from clipsae.errors import ConfigError
from clipsae.rules import CLIP, require, similar

log = logging.getLogger(__name__)

GELU = {True: "QuickGELU", False: "plain GELU"}


def build_model(
    name: str,
    pretrained: str | None,
    *,
    layer: int = -1,
    hook: str = "resid",
    seed: int = 0,
    image_size: int | None = None,
) -> nn.Module:
    """A model in eval mode on the CPU; arguments and errors as `FrozenCLIP.load`.

    Everything that can be refused from the names alone is refused before weights are read.
    """
    given = {"name": name, "pretrained": pretrained, "layer": layer, "hook": hook}
    for option, value in {**given, "seed": seed, "image_size": image_size}.items():
        require(f"clip.{option}", value, CLIP[option])
    tiny.register()
    of_timm = name.startswith(TIMM)
    try:
        model = name.removeprefix(TIMM) if of_timm else _local(name)
        _outline(name, model).check(name, layer, hook)
        if pretrained is None:
            warnings.warn(
                f"{name} with RANDOM WEIGHTS (clip.pretrained=null): "
                "the pipeline runs, its numbers mean nothing",
                stacklevel=3,
            )
        # Random weights depend on `seed` alone, and the caller's random state is left as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if not of_timm:
                weights = name if pretrained == BUILTIN and model != name else pretrained
                return create_open_clip(model, weights, image_size).eval()
            file, published = find_weights(name, pretrained) if pretrained else (None, False)
            model = f"{model}.{pretrained}" if published else model
            options = {} if image_size is None else {"img_size": image_size}
            return create_timm(model, file, **options).eval()
    except ConfigError:
        raise
    except FileNotFoundError as error:
        raise ConfigError(f"the weights {pretrained!r} of {name}: {error}") from error
    except Exception as error:  # a foreign file can raise anything
        detail = " ".join(str(error).split())[:300]
        if pretrained is None:
            raise ConfigError(f"clip.name={name!r} could not be built: {detail}") from error
        raise ConfigError(
            f"clip.pretrained={pretrained!r} does not hold the weights of {name}: {detail}"
        ) from error


def create_open_clip(
    name: str,
    pretrained: str | None,
    image_size: int | None = None,
    weights_decide: bool = False,
) -> nn.Module:
    """A model of open_clip with weights as `find_weights` finds them, or with random ones.

    Args:
        name: of open_clip, or "local-dir:FOLDER".
        weights_decide: the model computes the activation that the weights were trained with;
            otherwise another than the name says is refused.

    Raises:
        ConfigError: QuickGELU where the weights have plain GELU, or the other way.
        FileNotFoundError: the weights are not available.
        RuntimeError, ValueError: they are not this model's.
    """
    config = open_clip.get_model_config(name)
    of_timm = bool(config["vision_cfg"].get("timm_model_name"))
    weights = path = None
    quick_gelu: bool | None = None
    preprocess: dict[str, Any] = {}
    if pretrained is not None:
        tag = get_pretrained_cfg(name, pretrained)
        preprocess = tag or usual_preprocess(name)
        if tag:
            quick_gelu = tag.get("quick_gelu", False)
            if not weights_decide:
                _require_gelu(name, config, pretrained, quick_gelu)
        path, _ = find_weights(name, pretrained)
        assert path is not None
        if path.suffix not in (".npz", ".npy"):
            weights = read_weights(path)
            preprocess = {**preprocess, **weights.preprocess}
            if not tag:
                quick_gelu = weights.quick_gelu
                if not weights_decide or quick_gelu is None:
                    _require_gelu(name, config, pretrained, quick_gelu)
    root, silent = logging.getLogger(), logging.Filter("none")
    root.addFilter(silent)  # open_clip warns that no weights were loaded yet
    try:
        model = open_clip.create_model(
            name,
            load_weights=False,
            force_quick_gelu=bool(weights_decide and quick_gelu),
            pretrained_text=False,
            force_image_size=None if of_timm else image_size,
            force_preprocess_cfg=preprocess,
        )
    finally:
        root.removeFilter(silent)
    if weights is not None:
        put_weights(model, weights.tensors)
    elif path is not None:
        open_clip.load_checkpoint(model, str(path))  # big_vision's arrays
    if of_timm and image_size is not None:  # its positions are resized after they are loaded
        model.visual.set_input_size(image_size)
        model.visual.preprocess_cfg["size"] = model.visual.image_size
    return model


def create_timm(model: str, file: Path | None, **options: Any) -> nn.Module:
    """A model of timm without a classifier, with weights from a file or with random ones."""
    if file is not None:
        # Of published arrays alone it has a reader of its own.
        overlay = {"file": str(file), "custom_load": file.suffix == ".npz"}
        options["pretrained_cfg_overlay"] = overlay
    return timm.create_model(model, pretrained=file is not None, num_classes=0, **options)


def _local(name: str) -> str:
    """A repository of the Hub as a local folder, for open_clip; other names as they are."""
    if not name.startswith(HUB):
        return name
    repository = name.removeprefix(HUB)
    by_hand = f"copy it here and give clip.name={FOLDER}/path/to/{repository.rpartition('/')[2]}"
    return f"{FOLDER}{fetch(repository, ('open_clip_config.json',), by_hand).parent}"


def _outline(name: str, model: str) -> Tower:
    """The image tower without weights, on the meta device.

    Raises:
        ConfigError: there is no such model, or it is no plain ViT.
    """
    try:
        with torch.device("meta"):
            if name.startswith(TIMM):
                known, library = timm.list_models(), "timm"
                if timm.is_model(model):
                    return tower_of(name, timm.create_model(model, num_classes=0))
            else:
                known, library = [*open_clip.list_models(), tiny.NAME], "open_clip"
                config = open_clip.get_model_config(model)
                if config is not None:
                    vision, quick_gelu = config["vision_cfg"], config.get("quick_gelu", False)
                    visual = _build_vision_tower(config["embed_dim"], vision, quick_gelu)
                    return tower_of(name, visual)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"clip.name={name!r}: {error}") from error
    near = " or ".join(similar(model, known))
    hint = f"did you mean {near}?" if near else f"see {library}.list_models()"
    raise ConfigError(f"clip.name={name!r}: {library} has no such model; {hint}")


def _require_gelu(name: str, config: dict, pretrained: str, trained: bool | None) -> None:
    """Refuse weights of another activation: open_clip only warns, and computes with one that they
    never saw. Warn if it is not known."""
    built, plain = config.get("quick_gelu", False), name.removesuffix("-quickgelu")
    if trained is None and {plain, f"{plain}-quickgelu"} <= set(open_clip.list_models()):
        log.warning(
            "%s does not say whether it was trained with QuickGELU, as OpenAI's weights were, "
            "or with plain GELU, as most others: clip.name=%s computes %s",
            *(pretrained, name, GELU[built]),
        )
    if trained is None or trained == built:
        return
    other = f"{plain}-quickgelu" if trained else plain
    use = f"use clip.name={other}" if other in open_clip.list_models() else "use other weights"
    raise ConfigError(
        f"clip.name={name!r} computes {GELU[built]}, but its weights {pretrained!r} were "
        f"trained with {GELU[trained]}: {use}"
    )
