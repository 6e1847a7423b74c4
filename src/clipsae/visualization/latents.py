"""A trained dictionary in Python: find a latent by what it means, look at its images, see what CLIP
says without it.

M latents, K reference images, C texts, S image side, d width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clipsae.clip import FrozenCLIP
from clipsae.clip.text import text_classifier
from clipsae.evaluation.interventions import Interventions
from clipsae.evaluation.passes import in_eval_mode, whole_codes
from clipsae.naming import Names
from clipsae.naming.vocabulary import PROMPTS
from clipsae.sae import SAE
from clipsae.visualization.references import References


@dataclass(frozen=True)
class ReferenceImage:
    """An image that a latent is most active on.

    Attributes:
        index, label: in the dataset; the label's class name.
        pixels: uint8 [3, S, S].
        value: the latent's mean code over the image's tokens.
        heat: [rows, columns], its codes on the patches.
    """

    index: int
    label: str
    pixels: Tensor
    value: float
    heat: Tensor


class Dictionary:
    """An SAE with the names and reference images of its latents; `clipsae.load_dictionary` opens
    one that a run has made.

    Args:
        clip: on the device that is to be used; the SAE is moved there.
        names: of `task=name` or `task=explore`.
        references: collected on `dataset`.
    """

    def __init__(
        self, clip: FrozenCLIP, sae: SAE, names: Names, references: References, dataset: Any
    ) -> None:
        self.clip = clip
        self.sae = sae.to(clip.device)
        self.names = names
        self.references = references
        self.dataset = dataset

    def __len__(self) -> int:
        """M."""
        return self.references.latents

    def __getitem__(self, latent: int) -> "Latent":
        """A latent by its number.

        Raises:
            IndexError: there is none.
        """
        if not 0 <= latent < len(self):
            raise IndexError(f"latent {latent}: expected 0 to {len(self) - 1}")
        return Latent(self, latent)

    def __iter__(self) -> Iterator["Latent"]:
        return map(self.__getitem__, range(len(self)))

    def find(self, text: str, n: int = 10) -> list["Latent"]:
        """The latents nearest in meaning to any text, the nearest first (`Names.find`)."""
        query: Tensor | str = text
        if text not in self.names.vocabulary.words:
            query = text_classifier(self.clip, [text], PROMPTS)[0].cpu()
        return [self[latent] for latent, _ in self.names.find(query, n)]


@dataclass(frozen=True)
class Latent:
    """One latent of a dictionary, by its `number`."""

    dictionary: Dictionary = field(repr=False)
    number: int

    @property
    def name(self) -> str | None:
        """Its name; None where it has none that can be trusted (`Names.named`)."""
        names = self.dictionary.names
        return names.text[self.number] if names.named[self.number] else None

    @property
    def score(self) -> float:
        """The detection AUROC of its best name, trusted or not; NaN where it has none."""
        return float(self.dictionary.names.score[self.number])

    @property
    def words(self) -> list[str]:
        """The words that suit it best, best first."""
        return self.dictionary.names.words(self.number)

    @property
    def frequency(self) -> float:
        """The share of the images that it is active on."""
        return float(self.dictionary.references.frequency[self.number])

    @property
    def direction(self) -> Tensor:
        """Its decoder row [d]: what it adds to a token for a code of 1."""
        at = torch.tensor([self.number], device=self.dictionary.clip.device)
        return self.dictionary.sae.decoder_rows(at)[0].detach()

    @property
    def images(self) -> list[ReferenceImage]:
        """The up to K images that it is most active on, the strongest first."""
        references, dataset = self.dictionary.references, self.dictionary.dataset
        found = []
        for slot, index in enumerate(references.index[self.number].tolist()):
            if index < 0:
                break
            label = int(references.label[self.number, slot])
            heat = references.maps[self.number, slot].float() / 255
            found.append(
                ReferenceImage(
                    index,
                    references.source.classnames[label],
                    dataset[index][0],
                    float(references.values[self.number, slot]),
                    (heat * references.scale[self.number, slot]).view(references.source.grid),
                )
            )
        return found

    @torch.no_grad()
    def effect(self, texts: Sequence[str] | str) -> dict[str, float]:
        """What the latent does to CLIP's logits for some texts: the logit with the latent minus the
        logit without it, through the remaining blocks, the mean over its reference images.

        Args:
            texts: C class names or other texts; one may be given by itself.

        Returns:
            The change of each; all 0 for a latent without images.
        """
        texts = [texts] if isinstance(texts, str) else texts
        clip, sae = self.dictionary.clip, self.dictionary.sae
        classes = text_classifier(clip, list(texts), PROMPTS)
        interventions = Interventions(clip, sae, classes)
        latent = torch.tensor([self.number], device=clip.device)
        total, images = torch.zeros(len(texts), device=clip.device), self.images
        with in_eval_mode([sae]):
            for example in images:
                pixels = clip.normalize(example.pixels[None])
                stream, context = clip.prefix(pixels, with_context=True)
                codes = whole_codes(clip, sae, stream)[0]
                beside = None if context is None else context[0]
                without = interventions.logits_without(stream[0], codes, latent, beside)
                total += clip.logits(stream, classes, context)[0] - without[0]
        return dict(zip(texts, (total / max(1, len(images))).tolist(), strict=True))
