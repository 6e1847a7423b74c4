"""What looks at a latent's examples and says what they have in common.

A new one is a decorated class, in a file of this folder or in a plugin:

    from clipsae.naming.explainers import EXPLAINERS, Explainer

    @EXPLAINERS.register("shouting")
    class Shouting(Explainer):
        source = "shouting"

        def describe(self, evidence):
            return "SOMETHING"

        def detect(self, name, examples):
            return [True for _ in examples]

S image side.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from clipsae.sae.registry import Registry

EXPLAINERS = Registry("explainer")


@dataclass(frozen=True)
class Example:
    """An image, and where a latent acts in it.

    Attributes:
        index: of the image in the dataset.
        image: uint8 [3, S, S].
        crop: uint8 [3, h, w], the part of it where the latent acts.
        heat: float [rows, columns], its codes on the patches by the largest, 0..1.
        strength: its mean code over the image's tokens; 0: it does not act.
    """

    index: int
    image: Tensor = field(repr=False)
    crop: Tensor = field(repr=False)
    heat: Tensor = field(repr=False)
    strength: float = 0.0


@dataclass(frozen=True)
class Evidence:
    """What an explainer is shown of a latent.

    Attributes:
        latent: its number.
        top: the images that activate it most, strongest first.
        sample: images drawn from all that it acts on, strongest first: a top-n alone hides what a
            latent mostly does.
    """

    latent: int
    top: Sequence[Example]
    sample: Sequence[Example] = ()


class Explainer(ABC):
    """Names latents, and says on which images a name is true.

    Attributes:
        source: who names, for the record.
        requests: how many answers it asks a server for: per description, per detection. (0, 0):
            it costs nothing.
    """

    source: str
    requests: ClassVar[tuple[int, int]] = (0, 0)

    def requests_of_a_latent(self, judge: str) -> int:
        """For its name, and where the explainer judges a detection with it and one with another
        latent's name."""
        describing, detecting = self.requests
        return describing + (2 * detecting if judge == "explainer" else 0)

    @abstractmethod
    def describe(self, evidence: Evidence) -> str:
        """A short text: what a latent's examples have in common; "" for nothing."""

    @abstractmethod
    def detect(self, name: str, examples: Sequence[Example]) -> list[bool]:
        """On which images the name is true of something."""
