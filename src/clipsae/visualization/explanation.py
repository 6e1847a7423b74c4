"""Why CLIP says what it says of one image, by latents: as text, JSON and a figure.

T tokens of an image, P patches, M latents, C classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from clipsae.visualization.figures import ImageCodes, Panel, draw_image
from clipsae.visualization.page.images import ImageActivations
from clipsae.visualization.references import References

OF_A_PATCH = 3  # latents
_SHOWN = 8  # latents in the text
_DRAWN = 5  # and in the figure
_LETTERS = 60  # of a name in the figure, at most


@dataclass(frozen=True)
class Effect:
    """What a latent does to CLIP's prediction: how much larger each is with it than without.

    Attributes:
        latent, name: its number, and its name; "" where it has none.
        mean: its mean code over the tokens.
        margin: of the predicted class's logit over the runner-up's.
        logit: of the predicted class.
        probability: of the predicted class, -1..1.
        instead: the class that would be predicted without it.
    """

    latent: int
    name: str
    mean: float
    margin: float
    logit: float
    probability: float
    instead: str


@dataclass(frozen=True)
class Explanation:
    """An image through CLIP and the SAE.

    Attributes:
        title: what the image is called.
        clip, sae: (class, probability), the likeliest first: by CLIP, and by CLIP from the SAE's
            reconstruction.
        effects: the latents that decide, those with the largest margin (by size) first.
        patches: for each of P patches, row by row, its largest codes: (latent, name, code).
        grid: (rows, columns).
        codes: [M, P], of the latents of `effects` alone; others are 0.
        means: [M], mean codes over all tokens, of the largest alone.
    """

    title: str
    clip: list[tuple[str, float]]
    sae: list[tuple[str, float]]
    effects: list[Effect]
    patches: list[list[tuple[int, str, float]]]
    grid: tuple[int, int]
    codes: Tensor
    means: Tensor

    @classmethod
    def of(
        cls,
        seen: ImageActivations,
        references: References,
        title: str,
        name_of: Callable[[int], str] = lambda latent: "",
    ) -> "Explanation":
        """From `image_activations`.

        Args:
            references: of the SAE, whose classes they are.
            name_of: a latent's name.
        """
        grid, classes = references.source.grid, references.source.classnames
        patches = seen.tokens[len(seen.tokens) - grid[0] * grid[1] :]
        codes = torch.zeros(references.latents, len(patches))
        for place, (latents, values) in enumerate(patches):
            codes[latents, place] = torch.tensor(values)
        means = torch.zeros(references.latents)
        means[seen.latents] = torch.tensor(seen.means)
        why = seen.why
        effects = []
        if why is not None:
            before = exp(why.logits[0] - why.normaliser)
            rival = 1 if len(why.classes) > 1 else 0
            for n, latent in enumerate(why.latents):
                without = why.without[n]
                change = [a - b for a, b in zip(why.logits, without, strict=True)]
                after = exp(without[0] - why.normalisers[n])
                effects.append(
                    Effect(
                        latent,
                        name_of(latent),
                        why.means[n],
                        change[0] - change[rival],
                        change[0],
                        before - after,
                        classes[why.instead[n]],
                    )
                )
                means[latent] = why.means[n]
            effects.sort(key=lambda effect: -abs(effect.margin))
        return cls(
            title=title,
            clip=[(classes[k], p) for k, p in seen.clip],
            sae=[(classes[k], p) for k, p in seen.sae],
            effects=effects,
            patches=[
                [
                    (m, name_of(m), v)
                    for m, v in zip(latents[:OF_A_PATCH], values[:OF_A_PATCH], strict=True)
                ]
                for latents, values in patches
            ],
            grid=grid,
            codes=codes,
            means=means,
        )

    def text(self) -> str:
        """A few lines for a terminal."""
        said = ", ".join(f"{name} {100 * p:.0f} %" for name, p in self.clip[:3])
        lines = [f"{self.title}: {said}"]
        if self.effects:
            rival = self.clip[1][0] if len(self.clip) > 1 else self.clip[0][0]
            lines.append(f"margin over {rival} with each latent minus without it:")
        for effect in self.effects[:_SHOWN]:
            flips = f"; without it {effect.instead}" if effect.instead != self.clip[0][0] else ""
            lines.append(
                f"  {effect.margin:+7.2f}  {effect.latent:>6}  {effect.name or 'no name'}{flips}"
            )
        return "\n".join(lines)

    def json(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        columns = self.grid[1]
        patches = [
            [{"latent": m, "name": name, "code": code} for m, name, code in patch]
            for patch in self.patches
        ]
        return {
            "image": self.title,
            "clip": [{"class": name, "probability": p} for name, p in self.clip],
            "reconstruction": [{"class": name, "probability": p} for name, p in self.sae],
            "latents": [
                {
                    "latent": effect.latent,
                    "name": effect.name or None,
                    "mean": effect.mean,
                    "margin": effect.margin,
                    "logit": effect.logit,
                    "probability": effect.probability,
                    "without_it": effect.instead,
                }
                for effect in self.effects
            ],
            "patches": [
                patches[start : start + columns] for start in range(0, len(patches), columns)
            ],
        }

    def draw(
        self,
        image: Tensor,
        references: References,
        image_of: Callable[[int], Tensor],
        names: Sequence[str] | None = None,
    ) -> Figure:
        """The latents that decide most, on the image and on their reference images.

        Args:
            image: uint8 [3, S, S].
            image_of: a reference image, uint8 [3, S, S], by its index.
            names: of the reference images; None: they have none.
        """
        drawn = self.effects[:_DRAWN]
        marked = [effect.latent for effect in drawn]
        shown = torch.ones(len(self.means), dtype=torch.bool)
        codes = ImageCodes(self.means, shown, marked, self.codes[marked])
        said = f"CLIP: {self.clip[0][0]}, {100 * self.clip[0][1]:.0f} %"
        facts = {
            effect.latent: f"{(effect.name or 'no name')[:_LETTERS]}, margin {effect.margin:+.2f}"
            for effect in drawn
        }
        panel = Panel(codes, references, image_of, names, facts)
        return draw_image(image, self.title, {said: panel})
