"""Names of a dictionary's latents, each with a score that says whether to trust it.

M latents, W words, n words of a latent, e embedding size.
"""

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clipsae.evaluation.ranking import top_latents
from clipsae.naming.vocabulary import Vocabulary

DISSECT = "clip-dissect"
WORDS = 5  # that are kept of each latent
COLUMNS = ("score", "low", "high", "control")


@dataclass(frozen=True, eq=False)
class Names:
    """What latents are called, all on the CPU.

    Attributes:
        vocabulary: the words.
        best: LongTensor [M, n], the best words of each latent, best first; -1 where it has no
            examples.
        best_scores: float32 [M, n], their soft-WPMI in nats; NaN where there are none.
        text: M names: the best word, or what an explainer said; "" without examples.
        score: float32 [M], how well the name tells held-out images that the latent is active on
            from those that it is not (AUROC, `clipsae.naming.detection`); NaN where it has no
            name, or is active on none or all of them.
        low, high: float32 [M], the score's 95 % interval.
        control: float32 [M], the mean score of some other latents' names in the name's place.
        threshold: the 95th percentile of these scores, each by itself, over the dictionary.
        judge: who told the images: "clip", "truth" or "explainer".
        source: who named: "clip-dissect", "oracle", "openai:MODEL", ...
        explained: BoolTensor [M], the latents that `source` has named, where it is an explainer;
            the others have the best word. None: all.
        examples: float32 [M, e], the mean of the embeddings of what a latent is most active on,
            of unit length; 0 without examples.
        numbers: of the names as a whole, such as the share that is right where the truth is known.
    """

    vocabulary: Vocabulary
    best: Tensor
    best_scores: Tensor
    text: list[str]
    score: Tensor
    low: Tensor
    high: Tensor
    control: Tensor
    threshold: float
    judge: str
    source: str
    examples: Tensor
    explained: Tensor | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.text)

    @property
    def named(self) -> Tensor:
        """BoolTensor [M]: the name tells more than another latent's, by chance, would: the low end
        of its interval is above `threshold`. All others are to be shown as "no name"."""
        return self.low > self.threshold

    def words(self, latent: int) -> list[str]:
        """The best words of a latent, best first; none without examples."""
        return [self.vocabulary.words[i] for i in self.best[latent].tolist() if i >= 0]

    def find(self, query: Tensor | str, n: int = 10) -> list[tuple[int, float]]:
        """The latents nearest in meaning to a text.

        By the cosine of the text's embedding with the mean embedding of a latent's examples. All
        texts have a large part in common, and all images another: the mean of the vocabulary and
        that of all latents are taken away first.

        Args:
            query: a word of the vocabulary, or the embedding [e] of any text.
            n: how many.

        Returns:
            (latent, cosine), the largest first; latents without examples are left out.

        Raises:
            ValueError: a word that the vocabulary does not have.
        """
        words = nn.functional.normalize(self.vocabulary.embeddings, dim=-1)
        if isinstance(query, str):
            if query not in self.vocabulary.words:
                raise ValueError(
                    f"{query!r} is not among the {len(words):,} words of the vocabulary: give the "
                    "text's embedding"
                )
            query = words[self.vocabulary.words.index(query)]
        there = self.examples.any(dim=1)
        kept = there.nonzero().squeeze(1)
        if not len(kept):
            return []
        text = nn.functional.normalize(query.float().cpu(), dim=-1) - words.mean(dim=0)
        shown = self.examples[kept] - self.examples[kept].mean(dim=0)
        cosine = nn.functional.cosine_similarity(shown, text[None], dim=-1)
        best = top_latents(cosine[None], min(n, len(kept)))[0]
        return list(zip(kept[best].tolist(), cosine[best].tolist(), strict=True))

    def save(self, folder: Path) -> None:
        """Write `names.safetensors`, `names.json` and, to read, `names.csv` into a folder."""
        tensors = {
            one.name: getattr(self, one.name).contiguous()
            for one in fields(self)
            if isinstance(getattr(self, one.name), Tensor)
        }
        save_file(
            {**tensors, "vocabulary": self.vocabulary.embeddings}, folder / "names.safetensors"
        )
        about = {
            "format": "clipsae.names",
            "version": 1,
            "judge": self.judge,
            "source": self.source,
            "threshold": self.threshold,
            "numbers": dict(self.numbers),
            "words": self.vocabulary.words,
            "text": self.text,
        }
        text = json.dumps(about, indent=1, ensure_ascii=False)
        (folder / "names.json").write_text(text + "\n", encoding="utf-8")
        with (folder / "names.csv").open("w", newline="", encoding="utf-8") as file:
            rows = self.rows()
            writer = csv.DictWriter(file, list(rows[0]) if rows else ["latent"])
            writer.writeheader()
            writer.writerows(rows)

    @classmethod
    def load(cls, folder: Path) -> "Names":
        """Read what `save` wrote."""
        about: dict[str, Any] = json.loads((folder / "names.json").read_text(encoding="utf-8"))
        tensors: dict[str, Any] = load_file(folder / "names.safetensors")
        vocabulary = Vocabulary(about["words"], tensors.pop("vocabulary"))
        kept = {name: about[name] for name in ("text", "threshold", "judge", "source", "numbers")}
        return cls(vocabulary, **tensors, **kept)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each latent, as in `names.csv`: latent, name, score, low, high, control, named,
        judge, source, and its n best words with their soft-WPMI. What is not defined is None."""
        named, by = self.named.tolist(), [self.source] * len(self)
        if self.explained is not None:
            by = [self.source if one else DISSECT for one in self.explained.tolist()]
        columns = {name: getattr(self, name).tolist() for name in COLUMNS}
        best, scores = self.best.tolist(), self.best_scores.tolist()
        return [
            {
                "latent": latent,
                "name": text,
                **{name: _rounded(values[latent]) for name, values in columns.items()},
                "named": named[latent],
                "judge": self.judge,
                "source": by[latent],
                **{
                    f"word_{i + 1}": f"{self.vocabulary.words[word]} {value:.3f}"
                    if word >= 0
                    else ""
                    for i, (word, value) in enumerate(
                        zip(best[latent], scores[latent], strict=True)
                    )
                },
            }
            for latent, text in enumerate(self.text)
        ]


def _rounded(value: float) -> float | None:
    return None if value != value else round(value, 4)
