"""The words that latents may be named with, as CLIP embeds them.

W words, e embedding size.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clipsae.clip import FrozenCLIP
from clipsae.clip.text import Template, text_classifier
from clipsae.data.scenes import KINDS

PROMPTS = ("{}", "a photo of {}")
_WORDS_AT_A_TIME = 256


@dataclass(frozen=True)
class Words:
    """Words that share their prompts.

    Attributes:
        words: single words or phrases.
        prompts: over whose embeddings a word's is the mean: strings with one "{}", or callables
            word -> prompt.
    """

    words: Sequence[str]
    prompts: Sequence[Template] = PROMPTS


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Words and their text embeddings.

    Attributes:
        words: W of them, each once.
        embeddings: float32 [W, e], of unit length, on the CPU.
    """

    words: list[str]
    embeddings: Tensor

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def embed(
        cls,
        clip: FrozenCLIP,
        groups: Sequence[Words],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> "Vocabulary":
        """Embed words in their prompts (`clipsae.clip.text.text_classifier`).

        Args:
            groups: no word is in two of them.
            progress: called with (words done, W).

        Raises:
            ConfigError: `clip` has no text tower.
            ValueError: a word that comes twice.
        """
        words = [word for group in groups for word in group.words]
        if len(set(words)) < len(words):
            twice = next(word for word in words if words.count(word) > 1)
            raise ValueError(f"the word {twice!r} comes twice: each must be there once")
        rows: list[Tensor] = []
        for group in groups:
            for start in range(0, len(group.words), _WORDS_AT_A_TIME):
                part = group.words[start : start + _WORDS_AT_A_TIME]
                rows.append(text_classifier(clip, part, group.prompts))
                progress(sum(map(len, rows)), len(words))
        return cls(words, torch.cat(rows).float().cpu())


def read_words(file: Path | str) -> list[str]:
    """The lines of a text file, each once, in their order; blank ones are left out.

    Raises:
        ValueError: no such file, not UTF-8 text, or fewer than two lines that differ.
    """
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ValueError(f"{file}: {reason}; expected a text file, one word a line") from error
    found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(found) < 2:
        raise ValueError(f"{file}: expected at least two lines that differ, one word a line")
    return found


def scenes_words() -> dict[str, Words]:
    """The grammar of the built-in scenes: the words of each attribute, in the order of its values,
    in the prompts that the attribute's class names have ("a photo of a red object")."""
    return {
        name: Words(kind.classnames, kind.templates)
        for name, kind in KINDS.items()
        if name != "shape_colour"  # its words are those of both
    }


def digest(groups: Sequence[Words]) -> str:
    """SHA-256 of all prompts: what decides the embeddings beside the CLIP."""
    hashed = hashlib.sha256()
    for group in groups:
        for word in group.words:
            for template in group.prompts:
                prompt = template.format(word) if isinstance(template, str) else template(word)
                hashed.update(f"{word}\0{prompt}\0".encode())
    return hashed.hexdigest()
