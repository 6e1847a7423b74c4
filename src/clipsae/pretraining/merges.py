"""The tokenizer's merges: the few of CLIP's own that a list of words needs.

CLIP's vocabulary of 49,408 tokens would add 12 MB of embeddings to a model that knows some 150
words. Byte pair encoding joins neighbouring pieces in a fixed order, so keeping, in that order,
the merges that a word uses splits the word exactly as CLIP does.
"""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Iterable
from pathlib import Path

from open_clip.tokenizer import SimpleTokenizer


def used_merges(words: Iterable[str], full: SimpleTokenizer) -> list[tuple[str, str]]:
    """The merges, in CLIP's order, that any of the words goes through."""
    used: set[tuple[str, str]] = set()
    for word in words:
        for token in full.pat.findall(word):
            piece = [full.byte_encoder[b] for b in token.encode("utf-8")]
            piece[-1] += "</w>"
            while len(piece) > 1:
                pairs = list(itertools.pairwise(piece))
                pair = min(pairs, key=lambda p: full.bpe_ranks.get(p, float("inf")))
                if pair not in full.bpe_ranks:
                    break
                used.add(pair)
                i, joined = 0, []
                while i < len(piece):
                    if tuple(piece[i : i + 2]) == pair:
                        joined.append("".join(pair))
                        i += 2
                    else:
                        joined.append(piece[i])
                        i += 1
                piece = joined
    return sorted(used, key=full.bpe_ranks.__getitem__)


def write_merges(words: Iterable[str], path: Path) -> int:
    """Write open_clip's bpe file for the words; return the size of the vocabulary."""
    merges = used_merges(words, SimpleTokenizer())
    lines = ["#version: 0.2, CLIP's merges reduced", *(" ".join(m) for m in merges)]
    # Neither a file name nor a time in the header: the same words, the same bytes.
    path.write_bytes(gzip.compress("\n".join(lines).encode("utf-8"), mtime=0))
    return len(SimpleTokenizer(bpe_path=str(path)).encoder)
