"""Published weights: where they lie on this machine, and fetching what is not there.

What is in a cache is used without asking a server whether there is something newer: that would
take a minute on a machine without a network.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Thread

import huggingface_hub
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError
from open_clip.pretrained import get_pretrained_cfg

log = logging.getLogger(__name__)

SECONDS = 2.0  # that a server has to answer in
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
class Published:
    """Weights that a library knows by a tag.

    Attributes:
        repository, files: on the Hugging Face Hub, and the file there, of which the first that
            exists is taken.
        url: another address, or "".
        folder: where a file from `url` is kept.
        others: repositories that hold the same weights in transformers' format.
    """

    repository: str
    files: tuple[str, ...]
    url: str
    folder: Path
    others: tuple[str, ...] = ()

    def cached(self) -> Path | None:
        """The file on this machine, or None."""
        found = cached_file(self.repository, self.files) if self.repository else None
        if found is not None:
            return found
        if self.url and self._own.is_file():
            return self._own
        files = ("model.safetensors", "pytorch_model.bin")
        others = (cached_file(repository, files) for repository in self.others)
        return next((path for path in others if path is not None), None)

    def altered(self) -> Path | None:
        """The file that `cached` finds, where its checksum is not the published one."""
        path = self.cached()
        if path is None or path != self._own:
            return None
        expected = self.url.split("/")[-2] if "openaipublic" in self.url else ""
        same = _sha256(path, path.stat().st_mtime_ns).startswith(expected)
        return None if same else path

    def get(self) -> Path:
        """The file, fetched if it is not here.

        Raises:
            FileNotFoundError: it cannot be had; the sentence says what to copy and where to.
        """
        return self.cached() or fetch(self.repository, self.files, self._by_hand)

    @property
    def _own(self) -> Path:
        return self.folder / self.url.rpartition("/")[2]

    @property
    def _by_hand(self) -> str:
        also = f", or {self.url} to {self._own}" if self.url else ""
        return (
            f"copy {self.files[0]} of {constants.ENDPOINT}/{self.repository} here and give "
            f"clip.pretrained=/path/to/{self.files[0]}{also}"
        )


def of_open_clip(name: str, tag: str) -> Published | None:
    """The weights that open_clip knows by a tag; None: it does not."""
    known = get_pretrained_cfg(name, tag)
    if not known:
        return None
    repository, _, file = known["hf_hub"].rpartition("/")
    safe = f"{file.rpartition('.')[0]}.safetensors"
    model = name.removesuffix("-quickgelu")
    others = _OPENAI_IN_TRANSFORMERS.get(model) if tag == "openai" else None
    return Published(
        repository,
        tuple(dict.fromkeys((safe, file))) if file else (FILES[0], FILES[2]),
        known["url"],
        Path("~/.cache/clip").expanduser(),
        () if others is None else (others,),
    )


def of_timm(model: str) -> Published | None:
    """timm's weights of "MODEL" or "MODEL.TAG"; None: it knows none."""
    known = timm.models.get_pretrained_cfg(model)
    if known is None or not known.has_weights:
        return None
    file = known.hf_hub_filename
    return Published(
        known.hf_hub_id or "",
        (file,) if file else ("model.safetensors", "pytorch_model.bin"),
        known.url if isinstance(known.url, str) else "",
        Path(torch.hub.get_dir()) / "checkpoints",
    )


def cached_file(repository: str, files: Sequence[str]) -> Path | None:
    """The first of the files of a Hub repository that is in its cache (`HF_HOME`,
    `HF_HUB_CACHE`), or None."""
    for file in files:
        path = huggingface_hub.try_to_load_from_cache(repository, file)
        if isinstance(path, str):
            return Path(path)
    return None


def fetch(repository: str, files: Sequence[str], by_hand: str) -> Path:
    """The first of the files that a repository of the Hub holds, from its cache or downloaded.

    Args:
        by_hand: how to do without a network, as part of a sentence.

    Raises:
        FileNotFoundError: it cannot be had.
    """
    found = cached_file(repository, files)
    if found is not None:
        return found
    where = f"{repository} is not in {constants.HF_HUB_CACHE}"
    if not online():
        raise FileNotFoundError(f"{where}, and {constants.ENDPOINT} does not answer: {by_hand}")
    log.info("fetching %s of %s", files[0], repository)
    for file in files:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, file))
        except EntryNotFoundError:
            continue
        except Exception as error:  # whatever a network can raise
            detail = " ".join(str(error).split())[:200]
            raise FileNotFoundError(
                f"{where}, and cannot be fetched ({detail}): {by_hand}"
            ) from error
    raise FileNotFoundError(f"{repository} holds none of {', '.join(files)}")


def online() -> bool:
    """Whether the Hub may be asked, and answers within two seconds."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    answers: list[bool] = []

    def ask() -> None:
        try:
            huggingface_hub.utils.get_session().head(constants.ENDPOINT, timeout=SECONDS)
            answers.append(True)
        except Exception as error:  # whatever a network can raise
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
