"""Where a model's weights are: a file or folder, a cache of this machine, or the network.

What is in a cache is used without asking a server whether there is something newer: that would
take a minute on a machine without a network.
"""

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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


def find_weights(name: str, pretrained: str, download: bool = True) -> tuple[Path | None, bool]:
    """The file of a model's weights, and whether it is what a library publishes under a tag.

    Args:
        name: "timm:MODEL" or a model of open_clip.
        pretrained: a tag of the library, the path of a file or a folder, a repository of the
            Hugging Face Hub, or "builtin".
        download: otherwise the file is None if it is not on this machine.

    Raises:
        ConfigError: none of these, or a folder without weights.
        FileNotFoundError: not available; the message says what to copy and where to.
    """
    if pretrained == BUILTIN and name == tiny.NAME:
        return tiny.weights_path(), False
    if pretrained == BUILTIN and name.startswith((HUB, FOLDER)):
        pretrained = name
    library, model = "open_clip", name
    if name.startswith(TIMM):
        library, model = "timm", name.removeprefix(TIMM)
        tags = [tagged.partition(".")[2] for tagged in timm.list_pretrained(f"{model}.*")]
        if pretrained in tags:
            return published_by_timm(f"{model}.{pretrained}", download)
    else:
        tags = open_clip.list_pretrained_tags_by_model(name)
        if known := get_pretrained_cfg(name, pretrained):
            return _published_by_open_clip(name, pretrained, known, download)
    try:
        path = file_in(Path(pretrained.removeprefix(FOLDER)).expanduser())
    except ValueError as error:
        raise ConfigError(f"clip.pretrained={pretrained!r}: {error}") from error
    repository = pretrained.removeprefix(HUB)
    if path is not None:
        return path, False
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository) or repository.endswith(SUFFIXES):
        known_tags = f"those are: {', '.join(tags)}" if tags else "it has none"
        raise ConfigError(
            f"clip.pretrained={pretrained!r}: neither a file nor weights that {library} knows "
            f"for {model} ({known_tags})"
        )
    if not download:
        return cached_file(repository, FILES), False
    by_hand = f"copy its files into a folder and give that, clip.pretrained=/path/to/{repository}"
    path = fetch(repository, FILES, by_hand)
    for config in ("config.json", "open_clip_config.json"):  # activation, normalisation
        with suppress(FileNotFoundError):
            fetch(repository, (config,))
    return path, False


def _published_by_open_clip(
    name: str, tag: str, known: dict[str, Any], download: bool
) -> tuple[Path | None, bool]:
    repository, _, file = known["hf_hub"].rpartition("/")
    safe = f"{file.rpartition('.')[0]}.safetensors"
    files = tuple(dict.fromkeys((safe, file))) if file else (FILES[0], FILES[2])
    folder = Path("~/.cache/clip").expanduser()
    model = name.removesuffix("-quickgelu") if tag == "openai" else ""
    in_transformers = _OPENAI_IN_TRANSFORMERS.get(model, "")
    return _published(repository, files, known["url"], folder, download, in_transformers)


def published_by_timm(model: str, download: bool = True) -> tuple[Path | None, bool]:
    """As `find_weights`, of "MODEL" or "MODEL.TAG".

    Raises:
        ValueError: timm knows no weights.
    """
    known = timm.models.get_pretrained_cfg(model)
    if known is None or not known.has_weights:
        raise ValueError(f"timm knows no weights of {model!r}")
    files = (known.hf_hub_filename,) if known.hf_hub_filename else FILES[3:]
    url = known.url if isinstance(known.url, str) else ""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return _published(known.hf_hub_id or "", files, url, folder, download)


def _published(
    repository: str,
    files: tuple[str, ...],
    url: str,
    folder: Path,
    download: bool,
    in_transformers: str = "",
) -> tuple[Path | None, bool]:
    """In the Hub's cache; in the folder where files from `url` are kept; in the cache as a
    repository in transformers' format; or from the Hub."""
    by_hand = (
        f"copy {files[0]} of {constants.ENDPOINT}/{repository} here and give "
        f"clip.pretrained=/path/to/{files[0]}"
    )
    path = cached_file(repository, files)
    if url:
        kept = folder / url.rpartition("/")[2]
        by_hand += f", or {url} to {kept}"
        if path is None and kept.is_file():
            checksum = url.split("/")[-2] if "openaipublic" in url else ""
            unaltered = _sha256(kept, kept.stat().st_mtime_ns).startswith(checksum)
            if download and not unaltered:
                log.warning(
                    "%s is not the published file by its checksum: it is used under another key; "
                    "remove it to download the published one",
                    kept,
                )
            return kept, unaltered
    path = path or cached_file(in_transformers, FILES[3:])
    return path or (fetch(repository, files, by_hand) if download else None), True


def weights_file(name: str, pretrained: str | None) -> Path | None:
    """The local file that `pretrained` names, or None: random weights, or published ones.

    That is also a cached file that differs from the published one by its checksum. Unknown names
    give None: `FrozenCLIP.load` refuses them.
    """
    try:
        path, published = find_weights(name, pretrained, False) if pretrained else (None, False)
    except ConfigError:
        return None
    return None if published else path


def usual_preprocess(name: str) -> dict[str, Any]:
    """Mean and std of the published weights of open_clip's model, if they agree: a file of weights
    does not say it."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    ways = [get_pretrained_cfg(name, tag) for tag in tags]
    found = {(tuple(way["mean"]), tuple(way["std"])) for way in ways}
    return dict(zip(("mean", "std"), *found, strict=True)) if len(found) == 1 else {}


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
