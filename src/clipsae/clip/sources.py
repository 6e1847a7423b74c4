"""Where a model's weights are: a file or folder, a cache of this machine, or the network.

What is in a cache is used without asking a server whether there is something newer: that would
take a minute on a machine without a network.
"""

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import open_clip
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError
from open_clip.pretrained import get_pretrained_cfg

from clipsae.clip import tiny
from clipsae.errors import ConfigError

log = logging.getLogger(__name__)

SECONDS = 2.0  # that a server has to answer in
TIMM = "timm:"
HUB, FOLDER = "hf-hub:", "local-dir:"  # as open_clip has them
BUILTIN = "builtin"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz")
# What open_clip and transformers name a model's weights, the preferred first.
FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)
# OpenAI's own weights in transformers' format.
_OPENAI_IN_TRANSFORMERS = {
    "ViT-B-32": "openai/clip-vit-base-patch32",
    "ViT-B-16": "openai/clip-vit-base-patch16",
    "ViT-L-14": "openai/clip-vit-large-patch14",
    "ViT-L-14-336": "openai/clip-vit-large-patch14-336",
}


@dataclass(frozen=True)
class Source:
    """Where weights come from.

    Attributes:
        given: as in `clip.pretrained`.
        path: their file on this machine; None: not here.
        repository, files: of the Hugging Face Hub, and the names there, of which the first that
            exists is taken.
        by_hand: how to do without a network, as part of a sentence.
        published: known to a library by the tag `given`.
        altered: `path` is not the published file, by its checksum.
        quick_gelu: whether they were trained with QuickGELU; None: not known.
        preprocess: mean and std that images are normalised with, where they are known.
    """

    given: str
    path: Path | None = None
    repository: str = ""
    files: tuple[str, ...] = FILES
    by_hand: str = ""
    published: bool = False
    altered: bool = False
    quick_gelu: bool | None = None
    preprocess: Mapping[str, Any] = field(default_factory=dict)

    def file(self) -> Path:
        """The file, fetched if it is not here.

        Raises:
            FileNotFoundError: not available; the message says what to copy and where to.
        """
        if self.altered:
            log.warning(
                "%s is not the published file by its checksum: it is used under another key; "
                "remove it to download the published one",
                self.path,
            )
        path = self.path or fetch(self.repository, self.files, self.by_hand)
        if self.repository and not self.published:
            for config in ("config.json", "open_clip_config.json"):  # activation, normalisation
                try:
                    fetch(self.repository, (config,))
                except FileNotFoundError as error:
                    log.debug("%s", error)
        return path


def find_source(name: str, pretrained: str) -> Source:
    """Where the weights of a model are; nothing is fetched.

    Args:
        name: "timm:MODEL" or a model of open_clip.
        pretrained: a tag of the library, the path of a file or a folder, a repository of the
            Hugging Face Hub, or "builtin".

    Raises:
        ConfigError: none of these, or a folder without weights.
    """
    if pretrained == BUILTIN and name == tiny.NAME:
        return Source(pretrained, tiny.weights_path())
    if pretrained == BUILTIN and name.startswith((HUB, FOLDER)):
        pretrained = name
    if name.startswith(TIMM):
        library, model = "timm", name.removeprefix(TIMM)
        tags = [tagged.partition(".")[2] for tagged in timm.list_pretrained(f"{model}.*")]
        known = of_timm(f"{model}.{pretrained}") if pretrained in tags else None
    else:
        library, model = "open_clip", name
        tags = open_clip.list_pretrained_tags_by_model(name)
        known = _of_open_clip(name, pretrained)
    if known is not None:
        return known
    try:
        path = file_in(Path(pretrained.removeprefix(FOLDER)).expanduser())
    except ValueError as error:
        raise ConfigError(f"clip.pretrained={pretrained!r}: {error}") from error
    # A file of weights does not say how images are normalised: like the published ones of this
    # model, if they agree.
    ways = {} if library == "timm" else {tag: get_pretrained_cfg(name, tag) for tag in tags}
    means = {(tuple(way["mean"]), tuple(way["std"])) for way in ways.values()}
    preprocess = dict(zip(("mean", "std"), *means, strict=True)) if len(means) == 1 else {}
    if path is not None:
        return Source(pretrained, path, preprocess=preprocess)
    repository = pretrained.removeprefix(HUB)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository) and not repository.endswith(SUFFIXES):
        by_hand = (
            f"copy its files into a folder and give that, clip.pretrained=/path/to/{repository}"
        )
        path = cached_file(repository, FILES)
        return Source(pretrained, path, repository, FILES, by_hand, preprocess=preprocess)
    raise ConfigError(
        f"clip.pretrained={pretrained!r}: neither a file nor weights that {library} knows "
        f"for {model} (those are: {', '.join(tags) or 'none'})"
    )


def _of_open_clip(name: str, tag: str) -> Source | None:
    known = get_pretrained_cfg(name, tag)
    if not known:
        return None
    repository, _, file = known["hf_hub"].rpartition("/")
    safe = f"{file.rpartition('.')[0]}.safetensors"
    model = name.removesuffix("-quickgelu")
    return _of_tag(
        tag,
        repository,
        tuple(dict.fromkeys((safe, file))) if file else (FILES[0], FILES[2]),
        known["url"],
        Path("~/.cache/clip").expanduser(),
        _OPENAI_IN_TRANSFORMERS.get(model, "") if tag == "openai" else "",
        quick_gelu=known.get("quick_gelu", False),
        preprocess=known,
    )


def of_timm(model: str) -> Source | None:
    """timm's weights of "MODEL" or "MODEL.TAG"; None: it knows none."""
    known = timm.models.get_pretrained_cfg(model)
    if known is None or not known.has_weights:
        return None
    file = known.hf_hub_filename
    return _of_tag(
        model.partition(".")[2],
        known.hf_hub_id or "",
        (file,) if file else FILES[3:],
        known.url if isinstance(known.url, str) else "",
        Path(torch.hub.get_dir()) / "checkpoints",
    )


def _of_tag(
    tag: str,
    repository: str,
    files: tuple[str, ...],
    url: str,
    folder: Path,
    in_transformers: str = "",
    **known: Any,
) -> Source:
    """Published weights: in the Hub's cache, in the folder where files from `url` are kept, or in
    the cache as a repository in transformers' format."""
    by_hand = (
        f"copy {files[0]} of {constants.ENDPOINT}/{repository} here and give "
        f"clip.pretrained=/path/to/{files[0]}"
    )
    path, altered = cached_file(repository, files), False
    if url:
        downloaded = folder / url.rpartition("/")[2]
        by_hand += f", or {url} to {downloaded}"
        if path is None and downloaded.is_file():
            path = downloaded
            checksum = url.split("/")[-2] if "openaipublic" in url else ""
            altered = not _sha256(path, path.stat().st_mtime_ns).startswith(checksum)
    path = path or cached_file(in_transformers, FILES[3:])
    return Source(tag, path, repository, files, by_hand, True, altered, **known)


def weights_file(name: str, pretrained: str | None) -> Path | None:
    """The local file that `pretrained` names, or None: random weights, or published ones.

    That is also a cached file that differs from the published one by its checksum. Unknown names
    give None: `FrozenCLIP.load` refuses them.
    """
    try:
        source = None if pretrained is None else find_source(name, pretrained)
    except ConfigError:
        return None
    return None if source is None or (source.published and not source.altered) else source.path


def file_in(path: Path) -> Path | None:
    """A file of weights by its path or that of its folder: a plain one, or a repository's in the
    cache of the Hugging Face Hub (`models--openai--clip-vit-base-patch16`); None: neither.

    Raises:
        ValueError: a folder without a file of weights, or with several.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        return None
    folder = path
    if revisions := sorted(path.glob("snapshots/*"), key=lambda r: r.stat().st_mtime):
        main = path / "refs" / "main"
        folder = path / "snapshots" / main.read_text().strip() if main.is_file() else revisions[-1]
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    if len(found) != 1:
        what = f"{len(found)} files of weights ({found[0].name}, ...)" if found else "no weights"
        raise ValueError(f"{path} holds {what}: expected {FILES[0]}, {FILES[3]} or {FILES[4]}")
    return found[0]


def cached_file(repository: str, files: Sequence[str]) -> Path | None:
    """The first of the files of a Hub repository that is in its cache (`HF_HOME`,
    `HF_HUB_CACHE`), or None."""
    for file in files if repository else ():
        path = huggingface_hub.try_to_load_from_cache(repository, file)
        if isinstance(path, str):
            return Path(path)
    return None


def fetch(repository: str, files: Sequence[str], by_hand: str = "") -> Path:
    """The first of the files that a repository of the Hub holds, from its cache or downloaded.

    Raises:
        FileNotFoundError: not available; the message ends with `by_hand`.
    """
    found = cached_file(repository, files)
    if found is not None:
        return found
    where = f"{repository} is not in {constants.HF_HUB_CACHE}"
    if not online():
        raise FileNotFoundError(f"{where}, and {constants.ENDPOINT} does not answer: {by_hand}")
    log.info("downloading %s of %s", files[0], repository)
    for file in files:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, file))
        except EntryNotFoundError:
            continue
        except Exception as error:  # a network can raise anything
            detail = " ".join(str(error).split())[:200]
            raise FileNotFoundError(f"{where}: {detail}: {by_hand}") from error
    raise FileNotFoundError(f"{repository} holds none of {', '.join(files)}")


def online() -> bool:
    """Whether the Hub may be asked, and answers within two seconds."""
    if constants.HF_HUB_OFFLINE:
        return False
    answers: list[bool] = []

    def ask() -> None:
        try:
            huggingface_hub.utils.get_session().head(constants.ENDPOINT, timeout=SECONDS)
            answers.append(True)
        except Exception as error:  # a network can raise anything
            log.debug("%s: %s", constants.ENDPOINT, error)

    # A name server that does not answer is not bounded by the timeout.
    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(SECONDS)
    return bool(answers)


@contextmanager
def cache_alone_if_offline() -> Iterator[None]:
    """Other libraries look in the Hub's cache alone where the Hub does not answer."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = not online()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@cache
def _sha256(path: Path, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
