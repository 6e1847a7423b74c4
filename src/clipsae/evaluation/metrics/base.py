"""What a measurement of an SAE is, and the registry that all are found in.

A new one is one file with a decorated class; from a plugin, too:

    from clipsae.evaluation.metrics import METRICS, Measurement
    from clipsae.evaluation.numbers import Number

    @METRICS.register("largest_code")
    class LargestCode(Measurement):
        numbers = (Number("largest_code", "largest code"),)

        def __init__(self, sae, options):
            super().__init__(sae, options)
            self.add_state("largest", torch.zeros(()), dist_reduce_fx="max")

        def update(self, batch):
            self.largest = torch.maximum(self.largest, batch.codes.max())

        def compute(self):
            return {"largest_code": self.largest}
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torchmetrics import Metric

from clipsae.evaluation.numbers import Number
from clipsae.evaluation.passes import Batch
from clipsae.sae import SAE
from clipsae.sae.registry import Registry

METRICS = Registry("metric")

# What a dataset or a caller may not have, and who needs it says in `needs`; and "scores", which the
# pass keeps only where somebody needs them.
NEEDS = {
    "embeddings": "an image_encoder, such as 'open_clip:ViT-B-32/openai'",
    "truth": "a dataset with ground truth, such as the built-in scenes",
    "predictions": "a classifier, the embeddings of the class names",
    "scores": "",
}


@dataclass(frozen=True)
class Options:
    """What is measured, and how.

    Attributes:
        images, tokens: how many images there are, and tokens of an image.
        embed_dim: of the image encoder; 0: there is none.
        k: neighbours of CKNNA.
        threshold: the AUROC from which a latent counts as good for a concept.
        seed: of the samples, which depend on it and on the number of images alone.
        sample_tokens: that CKNNA compares, at most; drawn from all.
        sample_images: whose patches and pooled codes recovery compares, at most; drawn from all.
    """

    images: int
    tokens: int
    embed_dim: int = 0
    k: int = 10
    threshold: float = 0.9
    seed: int = 0
    sample_tokens: int = 10_000
    sample_images: int = 2_000


class Measurement(Metric):
    """One measurement of one SAE, in torchmetrics' manner: states, `update`, `compute`.

    Attributes:
        numbers: what is known of each number that it yields.
        needs: some of `NEEDS`. All else that a `Batch` has is always there.
        progress: of `compute`, where that takes long: called with (done, in all, of what).
        per_latent: after `compute`, numbers [M] by name, for `latents.safetensors`.
        concepts: after `compute`, rows for `concepts.csv`.
    """

    full_state_update = False
    numbers: ClassVar[tuple[Number, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    progress: Callable[[int, int, str], None] | None = None

    def __init__(self, sae: SAE, options: Options) -> None:
        super().__init__()
        self.d: int = sae.config["d"]
        self.latents: int = sae.config["latents"]
        self.options = options
        self.per_latent: dict[str, Tensor] = {}
        self.concepts: list[dict[str, Any]] = []

    def update(self, batch: Batch) -> None:
        """Add a group of images."""
        raise NotImplementedError

    def compute(self) -> dict[str, Tensor]:
        """The numbers by name, scalars; NaN where undefined."""
        raise NotImplementedError
