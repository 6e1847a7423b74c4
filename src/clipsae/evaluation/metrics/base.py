"""The base class of measurements of an SAE, and their registry.

A new one is a decorated class, in a file of this folder or in a plugin:

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

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torchmetrics import Metric

from clipsae.evaluation.numbers import Number
from clipsae.evaluation.passes import Batch, Progress
from clipsae.sae import SAE
from clipsae.sae.registry import Registry

METRICS = Registry("metric")

# What a measurement may need that is not always there, and where it comes from. "scores": they are
# there on demand, but cost memory.
NEEDS = {
    "embeddings": "an image_encoder, such as 'open_clip:ViT-B-32/openai'",
    "truth": "a dataset with ground truth, such as the built-in scenes",
    "captions": "clip.hook=towers, and a dataset whose images have captions of their own",
    "patches": "tokens that are patches: not clip.hook=embedding or towers, or features.tokens=cls",
    "patch_truth": "a dataset that knows what patches show, such as the scenes or one with masks",
    "predictions": "a classifier, the embeddings of the class names",
    "scores": "",
}


@dataclass(frozen=True)
class Options:
    """Sizes and options of all measurements.

    Attributes:
        images, tokens: how many images there are, and tokens of an image.
        embed_dim: of the image encoder; 0: there is none.
        k: neighbours of CKNNA.
        threshold: the AUROC from which a latent counts as good for a concept.
        seed: of the samples, which depend on it and on the number of images alone.
        sample_tokens: that CKNNA compares, at most; drawn from all.
        sample_images: whose patches and pooled codes recovery, localization, spatial coherence and
            probing compare, at most; drawn from all.
        concepts: names of the V columns of a batch's `patch_truth`; (): there is none.
        grid: rows and columns of patches.
        pooling: of token codes to image codes.
        judges: of each further image encoder the suffix of its numbers (`encoders.judge`) and its
            embed_dim.
    """

    images: int
    tokens: int
    embed_dim: int = 0
    k: int = 10
    threshold: float = 0.9
    seed: int = 0
    sample_tokens: int = 10_000
    sample_images: int = 2_000
    concepts: tuple[str, ...] = ()
    grid: tuple[int, int] = (1, 1)
    pooling: str = "mean"
    judges: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        for name in ("sample_tokens", "sample_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")


class Measurement(Metric):
    """One measurement of one SAE, a torchmetrics `Metric`: states, `update`, `compute`.

    Attributes:
        numbers: a record of each number that `compute` returns.
        needs: some of `NEEDS`. All other attributes of a `Batch` are always there.
        progress: of a slow `compute`: called with (done, total, what).
        per_latent, concepts: after `compute`, numbers [M] by name, for `latents.safetensors`, and
            rows for `concepts.csv`.
    """

    full_state_update = False
    numbers: ClassVar[tuple[Number, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    progress: Progress = staticmethod(lambda done, total, what: None)

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
