"""Building a model of open_clip or timm by name, refusing early and clearly what cannot work."""

import difflib
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from open_clip.pretrained import get_pretrained_cfg
from torch import nn

from clipsae.clip import published
from clipsae.clip.published import Published
from clipsae.clip.towers import EXAMPLES
from clipsae.clip.weights import SUFFIXES as WEIGHT_SUFFIXES
from clipsae.clip.weights import file_in, put_weights, read_weights
from clipsae.errors import ConfigError
from clipsae.rules import check_layer

log = logging.getLogger(__name__)

TIMM = "timm:"
HUB, FOLDER = "hf-hub:", "local-dir:"  # as open_clip has them
TINY = "clipsae-tiny"
BUILTIN = "builtin"
PRECISIONS = ("fp32", "bf16")
GELU = {True: "QuickGELU", False: "plain GELU"}


@dataclass(frozen=True)
class Source:
    """Where a model's weights come from.

    Attributes:
        given: as `clip.pretrained` gives them.
        path: their file; None: of `published`.
        published: what a library knows by the name given.
        quick_gelu, preprocess: what is known of them besides.
    """

    given: str
    path: Path | None = None
    published: Published | None = None
    quick_gelu: bool | None = None
    preprocess: dict[str, Any] | None = None

    def file(self) -> Path:
        """The file of weights, fetched if it is not here.

        Raises:
            FileNotFoundError: it cannot be had.
        """
        if self.published is None:
            assert self.path is not None
            return self.path
        path = self.published.get()
        if self.published.altered() is not None:
            log.warning(
                "%s is not the published file by its checksum: it is used as it is, and told "
                "apart from that one; remove it to fetch it anew",
                path,
            )
        return path


def build_model(
    name: str,
    pretrained: str | None,
    *,
    layer: int = -1,
    precision: str = "fp32",
    seed: int = 0,
    image_size: int | None = None,
) -> nn.Module:
    """A model in eval mode on the CPU; arguments and errors as `FrozenCLIP.load`.

    Everything that can be refused from the names alone is refused before weights are read.
    """
    _require_types(name, pretrained, layer, seed, image_size)
    if precision not in PRECISIONS:
        raise ConfigError(f"clip.precision={precision!r}: expected one of {', '.join(PRECISIONS)}")
    if name == TINY:
        # Imported here: only this model needs it.
        from clipsae.clip import tiny

        tiny.register()
    build = _timm if name.startswith(TIMM) else _open_clip
    try:
        blocks, make = build(name, pretrained, precision, image_size)
    except FileNotFoundError as error:
        raise ConfigError(f"the weights {pretrained!r} of {name}: {error}") from error
    check_layer(name, layer, blocks)
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
            return make().eval()
        except ConfigError:
            raise
        except FileNotFoundError as error:
            raise ConfigError(f"the weights {pretrained!r} of {name}: {error}") from error
        except Exception as error:  # whatever a foreign file can raise
            raise ConfigError(_why_not_loaded(name, pretrained, error)) from error


def create_open_clip(
    name: str,
    source: Source | None,
    *,
    precision: str = "fp32",
    image_size: int | None = None,
    weights_decide: bool = False,
) -> nn.Module:
    """A model of open_clip with weights from `source`, or with random ones.

    Args:
        name: of open_clip, or "local-dir:FOLDER".
        weights_decide: the model computes the activation that the weights were trained with;
            otherwise another than the name says is refused.

    Raises:
        ConfigError: QuickGELU where the weights have plain GELU, or the other way.
        FileNotFoundError: the weights cannot be had.
        ValueError: they are not this model's.
    """
    config = open_clip.get_model_config(name)
    of_timm = bool(config["vision_cfg"].get("timm_model_name"))
    weights = path = None
    quick_gelu, preprocess = None, {}
    if source is not None:
        path, quick_gelu, preprocess = source.file(), source.quick_gelu, source.preprocess or {}
        if path.suffix not in (".npz", ".npy"):
            weights = read_weights(path)
            quick_gelu = weights.quick_gelu if quick_gelu is None else quick_gelu
            preprocess = {**preprocess, **weights.preprocess}
        if quick_gelu is not None and not weights_decide:
            require_gelu(name, config, source.given, quick_gelu)
        elif quick_gelu is None and weights is not None and has_other_gelu(name):
            log.warning(
                "%s does not say whether it was trained with QuickGELU, as OpenAI's weights were, "
                "or with plain GELU, as most others: clip.name=%s computes %s",
                *(source.given, name, GELU[config.get("quick_gelu", False)]),
            )
    with _unsaid():
        model = open_clip.create_model(
            name,
            load_weights=False,
            precision=precision,
            force_quick_gelu=bool(weights_decide and quick_gelu),
            pretrained_text=False,
            force_image_size=None if of_timm else image_size,
            force_preprocess_cfg=preprocess,
        )
    if weights is not None:
        put_weights(model, weights.tensors)
    elif path is not None:
        open_clip.load_checkpoint(model, str(path))  # big_vision's arrays
    if of_timm and image_size is not None:  # its positions are resized after they are loaded
        model.visual.set_input_size(image_size)
        model.visual.preprocess_cfg["size"] = model.visual.image_size
    return model


def source_of(name: str, pretrained: str) -> Source:
    """Where open_clip's model takes weights from.

    Args:
        pretrained: a tag of open_clip, the path of a file or a folder, a repository of the Hugging
            Face Hub, or "builtin".

    Raises:
        ConfigError: none of these, or a folder without weights.
    """
    pretrained = _own(name, pretrained)
    known = published.of_open_clip(name, pretrained)
    if known is not None:
        tag = get_pretrained_cfg(name, pretrained)
        return Source(pretrained, None, known, tag.get("quick_gelu", False), tag)
    preprocess = _of_all_tags(name)
    path = weights_file(name, pretrained)
    if path is not None:
        return Source(pretrained, path, preprocess=preprocess)
    repository = _repository(pretrained)
    if repository is not None:
        by_hand = (
            f"copy its files into a folder and give that, clip.pretrained=/path/to/{repository}"
        )
        path = published.fetch(repository, published.FILES, by_hand)
        if not (path.parent / "open_clip_config.json").is_file():
            for config in ("config.json", "open_clip_config.json"):
                _try_to_fetch(repository, config)
        return Source(pretrained, path, preprocess=preprocess)
    tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
    raise ConfigError(
        f"clip.pretrained={pretrained!r}: neither a file nor weights that open_clip knows "
        f"for {name} (those are: {tags})"
    )


def require_gelu(name: str, config: dict, pretrained: str, trained: bool) -> None:
    """Refuse weights of another activation: open_clip only warns, and computes with one that they
    never saw.

    Raises:
        ConfigError: as it says.
    """
    built = config.get("quick_gelu", False)
    if trained == built:
        return
    other = name.removesuffix("-quickgelu") + ("-quickgelu" if trained else "")
    use = f"use clip.name={other}" if other in open_clip.list_models() else "use other weights"
    raise ConfigError(
        f"clip.name={name!r} computes {GELU[built]}, but its weights {pretrained!r} were "
        f"trained with {GELU[trained]}: {use}"
    )


def has_other_gelu(name: str) -> bool:
    """Whether open_clip has a model in both forms: with QuickGELU and with plain GELU."""
    plain = name.removesuffix("-quickgelu")
    return {plain, f"{plain}-quickgelu"} <= set(open_clip.list_models())


def weights_file(name: str, pretrained: str | None) -> Path | None:
    """The local file that `pretrained` names, or None: random weights, or published ones.

    A file in a cache that is not the published one by its checksum is such a file, too: it is
    something else than its tag says.

    Raises:
        ConfigError: "builtin" where there is no such file, a folder without weights.
    """
    if pretrained is None:
        return None
    pretrained = _own(name, pretrained)
    known = published.of_open_clip(name, pretrained)
    if known is not None:
        return known.altered()
    if name == TINY and pretrained == BUILTIN:
        from clipsae.clip import tiny

        path = tiny.weights_path()
        if not path.is_file():
            raise ConfigError(
                f"{TINY} has no built-in weights at {path}: make them with "
                "`python -m clipsae.pretraining`, or use clip.pretrained=null (random weights)"
            )
        return path
    try:
        found = file_in(Path(pretrained.removeprefix(FOLDER)).expanduser())
    except ValueError as error:
        raise ConfigError(f"clip.pretrained={pretrained!r}: {error}") from error
    repository = _repository(pretrained)
    if found is None and repository is not None:
        return published.cached_file(repository, published.FILES)
    return found


def create_timm(model: str, file: Path | None, **options: Any) -> nn.Module:
    """A model of timm without a classifier, with weights from a file or with random ones."""
    if file is not None:
        # Of published arrays alone it has a reader of its own.
        overlay = {"file": str(file), "custom_load": file.suffix == ".npz"}
        options["pretrained_cfg_overlay"] = overlay
    return timm.create_model(model, pretrained=file is not None, num_classes=0, **options)


def _open_clip(
    name: str, pretrained: str | None, precision: str, image_size: int | None
) -> tuple[int, Callable[[], nn.Module]]:
    try:
        model = _as_folder(name)
        config = open_clip.get_model_config(model)
    except (OSError, ValueError) as error:
        raise ConfigError(f"clip.name={name!r}: {error}") from error
    if config is None:
        near = difflib.get_close_matches(name, [*open_clip.list_models(), TINY], n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see open_clip.list_models()"
        raise ConfigError(f"clip.name={name!r}: open_clip has no such model; {hint}")
    blocks = _require_plain_vit(name, config)
    source = None if pretrained is None else source_of(name, pretrained)
    if source is not None and source.quick_gelu is not None:
        require_gelu(name, config, source.given, source.quick_gelu)
    return blocks, lambda: create_open_clip(
        model, source, precision=precision, image_size=image_size
    )


def _timm(
    name: str, pretrained: str | None, precision: str, image_size: int | None
) -> tuple[int, Callable[[], nn.Module]]:
    model = name.removeprefix(TIMM)
    if not timm.is_model(model):
        near = difflib.get_close_matches(model, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models()"
        raise ConfigError(f"clip.name={name!r}: timm has no such model; {hint}")
    if not _is_timm_vit(model):
        raise ConfigError(f"clip.name={name!r}: expected a plain ViT, such as {EXAMPLES}")
    options = {} if image_size is None else {"img_size": image_size}
    known, path = None, weights_file(name, pretrained)
    if pretrained is not None:
        tags = [tagged.partition(".")[2] for tagged in timm.list_pretrained(f"{model}.*")]
        if pretrained in tags:
            model = f"{model}.{pretrained}"
            known = published.of_timm(model)
        elif path is None:
            raise ConfigError(
                f"clip.pretrained={pretrained!r}: neither a file nor weights that timm knows "
                f"for {model} (those are: {', '.join(tags) or 'none'})"
            )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return _timm_blocks(model), lambda: create_timm(
        model, path if known is None else known.get(), **options
    ).to(dtype)


def _own(name: str, pretrained: str) -> str:
    """A folder's or repository's model has its own weights there."""
    return name if pretrained == BUILTIN and name.startswith((HUB, FOLDER)) else pretrained


def _repository(pretrained: str) -> str | None:
    """The repository of the Hub that weights are given by; None: it is no name of one."""
    name = pretrained.removeprefix(HUB)
    known = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)
    return name if known and not name.endswith(WEIGHT_SUFFIXES) else None


def _as_folder(name: str) -> str:
    """A repository of the Hub as a local folder, for open_clip; other names as they are.

    Raises:
        FileNotFoundError: it cannot be had.
    """
    if not name.startswith(HUB):
        return name
    repository = name.removeprefix(HUB)
    by_hand = f"copy it here and give clip.name={FOLDER}/path/to/{repository.rpartition('/')[2]}"
    return f"{FOLDER}{published.fetch(repository, ('open_clip_config.json',), by_hand).parent}"


def _of_all_tags(name: str) -> dict[str, Any]:
    """How images are normalised for all published weights of a model, if that is one way: a file
    of weights does not say it."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    hows = [get_pretrained_cfg(name, tag) for tag in tags]
    ways = {(tuple(how["mean"]), tuple(how["std"])) for how in hows}
    return {"mean": hows[0]["mean"], "std": hows[0]["std"]} if len(ways) == 1 else {}


def _require_types(name: Any, pretrained: Any, layer: Any, seed: Any, image_size: Any) -> None:
    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    for option, value, right, expected in (
        ("name", name, isinstance(name, str), f"a model, such as {EXAMPLES}"),
        ("pretrained", pretrained, pretrained is None or isinstance(pretrained, str),
         "a tag, the path of a file of weights, or null"),
        ("layer", layer, whole(layer), "a whole number, such as -2"),
        ("seed", seed, whole(seed), "a whole number"),
        ("image_size", image_size, image_size is None or (whole(image_size) and image_size > 0),
         "a number of pixels, such as 224"),
    ):  # fmt: skip
        if not right:
            raise ConfigError(f"clip.{option}={value!r}: expected {expected}")


def _require_plain_vit(name: str, config: dict) -> int:
    """The number of its blocks."""
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
        return _timm_blocks(of_timm) if of_timm else vision["layers"]
    raise ConfigError(f"clip.name={name!r}: {reason}; expected a plain ViT, such as {EXAMPLES}")


def _is_timm_vit(model: str) -> bool:
    return timm.models.is_model_in_modules(model, ["vision_transformer"])


def _timm_blocks(model: str) -> int:
    with torch.device("meta"):
        return len(timm.create_model(model).blocks)


def _try_to_fetch(repository: str, file: str) -> None:
    try:
        published.fetch(repository, (file,), "")
    except FileNotFoundError as error:
        log.debug("%s", error)


@contextmanager
def _unsaid() -> Iterator[None]:
    """Without open_clip's warning on the root logger that no weights were loaded yet."""

    def unsaid(record: logging.LogRecord) -> bool:
        return False

    root = logging.getLogger()
    root.addFilter(unsaid)
    try:
        yield
    finally:
        root.removeFilter(unsaid)


def _why_not_loaded(name: str, weights: str | None, error: Exception) -> str:
    detail = " ".join(str(error).split())[:300]
    if weights is None:
        return f"clip.name={name!r} could not be built: {detail}"
    return f"clip.pretrained={weights!r} does not hold the weights of {name}: {detail}"
