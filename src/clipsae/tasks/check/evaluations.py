"""What an evaluation costs, by that of a few images."""

import time
from collections import Counter
from dataclasses import dataclass

from torch import Tensor

from clipsae.sae import SAE
from clipsae.tasks.check.jobs import Job
from clipsae.tasks.stages import evaluation

FEW = 8  # images of a first pass, which shows how many can be afforded
AFFORDED = 4  # times `task.seconds` for the second


@dataclass(frozen=True)
class Evaluating:
    """Seconds of an evaluation of one SAE.

    Attributes:
        image: of each image in a pass.
        sampled: of each image whose codes are kept (`measurement.sample_images` at most).
        once: what does not depend on the images: CKNNA of its tokens.
        images: how many this was measured on.
    """

    image: float
    sampled: float
    once: float
    images: int

    def seconds(self, images: int, sample: int, counted: int = 0) -> float:
        """Of so many images, of whose codes `sample` are kept, after a pass that counts some."""
        return (images + counted) * self.image + min(images, sample) * self.sampled + self.once


def timed(job: Job, sae: SAE, classes: Tensor | None, seconds: float) -> Evaluating:
    """Evaluate and measure an SAE on a few images, as the job will do it.

    Args:
        classes: text embeddings [C, e].
        seconds: about a fourth of the time that this may take.
    """
    cfg, images = job.cfg, len(job.test_set)
    begun = time.perf_counter()
    _spent(job, sae, classes, min(FEW, images))
    affordable = AFFORDED * seconds * FEW / (time.perf_counter() - begun)
    compared = -(-cfg.measurement.sample_tokens // job.clip.tokens)  # images that CKNNA needs
    few = min(images, compared, max(FEW, int(affordable)))
    spent = _spent(job, sae, classes, few)
    passes = 2 if evaluation.counts_first(cfg) else 1
    # Each token is compared with each.
    once = spent.pop("CKNNA", 0.0) * (min(images, compared) / few) ** 2
    image = spent.pop("images", 0.0) / (passes * few)
    return Evaluating(image, sum(spent.values()) / few, once, few)


def _spent(job: Job, sae: SAE, classes: Tensor | None, images: int) -> Counter[str]:
    """Seconds by what they were spent on, as the evaluation reports it."""
    spent: Counter[str] = Counter()
    last = time.perf_counter()

    def progress(done: int, total: int, what: str) -> None:
        nonlocal last
        spent[what] += time.perf_counter() - last
        last = time.perf_counter()

    threshold = {"sae": job.cfg.evaluation.count_threshold}
    evaluation.compute(
        job.cfg, job.clip, {"sae": sae.eval()}, threshold, classes, job.test_set, images, progress
    )
    progress(0, 0, "rest")
    return spent
