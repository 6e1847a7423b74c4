"""Support and content: does the number of active latents follow how much there is to see?

The paper says that sparsemax gives each token as many latents as its content asks for ("Improving
Sparse Autoencoder with Dynamic Attention", arXiv 2604.14925). Where ground truth exists the content
is known: the objects of an image, what is in a patch. Without it the size of the image's JPEG file
stands for it, as is usual for visual complexity (Machado et al., "Computerized measures of visual
complexity", Acta Psychologica 2015).

Correlations are Spearman's. TopK is the control: its number of active latents is constant.

N rows (images or patches), P patches of an image.
"""

import torch
from scipy.stats import rankdata
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from clipsae.evaluation.metrics.base import METRICS, Measurement, Options
from clipsae.evaluation.metrics.sample import Draw
from clipsae.evaluation.numbers import Number
from clipsae.evaluation.passes import Batch
from clipsae.evaluation.truth import IMAGE_ATTRIBUTES, PATCH_ATTRIBUTES, concept_names
from clipsae.sae import SAE

_FOLLOWS = "rank correlation of the number of active latents with"
_OF_IMAGES = f"{_FOLLOWS} the image's"

NUMBERS = tuple(
    Number(f"support_{key}", label, meaning, better="", table="")
    for key, label, meaning in (
        (
            "spread",
            "spread of L0",
            "standard deviation of the number of active latents over patches, divided by its mean; "
            "0: it is constant, and follows nothing",
        ),
        ("l0_background", "L0, background", "active latents of a patch without any object"),
        ("l0_object", "L0, object", "active latents of a patch that counts as an object's"),
        ("jpeg", "L0 ~ JPEG size", f"{_OF_IMAGES} size as JPEG; L0 is the mean of its patches"),
        ("objects", "L0 ~ objects", f"{_OF_IMAGES} number of objects"),
        (
            "objects_given_area",
            "L0 ~ objects, area fixed",
            "the same as a partial correlation, given the share of the image that objects cover",
        ),
        (
            "values",
            "L0 ~ values",
            f"{_OF_IMAGES} number of different shapes, colours, patterns, sizes and backgrounds",
        ),
        (
            "patch_object",
            "L0 ~ object patch",
            f"{_FOLLOWS} whether the patch shows an object rather than background alone",
        ),
        (
            "patch_concepts",
            "L0 ~ concepts in the patch",
            f"{_FOLLOWS} the number of concepts in the patch: the background's, where an object "
            "leaves it in sight, and the object's shape, colour, pattern and size: 1, 4 or 5",
        ),
        (
            "patch_boundary",
            "L0 ~ boundary",
            f"{_FOLLOWS} whether an object's patch shows background, too; over object patches",
        ),
        (
            "patch_pattern",
            "L0 ~ pattern",
            f"{_FOLLOWS} whether the object has a pattern; over patches that objects cover",
        ),
        (
            "background_objects",
            "L0 ~ objects, background",
            f"{_FOLLOWS} the image's number of objects, over patches that show background alone: "
            "what the backbone's attention brings there from elsewhere",
        ),
    )
)


def rank_correlation(active: Tensor, content: Tensor, given: Tensor | None = None) -> float:
    """Spearman's correlation of the number of active latents with content, ties by mean ranks.

    With `given`, the partial correlation (r_ac - r_ag r_cg) / sqrt((1 - r_ag²)(1 - r_cg²)).

    Args:
        active: [N], mean or number of active latents.
        content: [N].
        given: [N], what is held fixed; None: nothing.

    Returns:
        -1..1; 0 where `active` is constant, as it follows nothing; NaN where `content` is constant
        or determined by `given`, or there are fewer than 3 rows: there is nothing to follow.

    Raises:
        ValueError: lengths that differ.
    """
    columns = [active, content] + ([] if given is None else [given])
    if len({len(column) for column in columns}) > 1:
        raise ValueError(
            f"active latents of {len(active)} rows and content of "
            f"{', '.join(str(len(c)) for c in columns[1:])}: expected as many"
        )
    if len(active) < 3 or bool((content == content[0]).all()):
        return float("nan")
    if bool((active == active[0]).all()):
        return 0.0
    ranks = [torch.from_numpy(rankdata(column.double().numpy())) for column in columns]
    ranks = [rank - rank.mean() for rank in ranks]

    def pearson(a: Tensor, b: Tensor) -> float:
        norm = (a.square().sum() * b.square().sum()).sqrt()
        return float((a * b).sum() / norm) if norm > 0 else 0.0

    plain = pearson(ranks[0], ranks[1])
    if given is None:
        return plain
    with_active, with_content = pearson(ranks[0], ranks[2]), pearson(ranks[1], ranks[2])
    left = (1 - with_active**2) * (1 - with_content**2)
    return (plain - with_active * with_content) / left**0.5 if left > 1e-12 else float("nan")


def support_values(
    active: Tensor,
    jpeg_bytes: Tensor,
    objects: Tensor | None = None,
    values: Tensor | None = None,
    coverage: Tensor | None = None,
    shown: Tensor | None = None,
    patterned: Tensor | None = None,
) -> dict[str, float]:
    """What `NUMBERS` says, without the prefix "support_"; without ground truth `spread` and `jpeg`.

    Args:
        active: [N, P], active latents of each patch of N images.
        jpeg_bytes: [N].
        objects: [N], how many objects an image has.
        values: [N], how many different values of attributes it has.
        coverage: [N, P], how much of a patch its foremost object covers, 0..1.
        shown: bool [N, P], whether the patch counts as an object's.
        patterned: bool [N, P], whether that object has a pattern.

    Returns:
        Numbers by name; NaN where undefined (`rank_correlation`, a mean over no patches).
    """
    active = active.double()
    of_image = active.mean(dim=1)
    found = {
        "spread": float(active.std(correction=0) / active.mean()),
        "jpeg": rank_correlation(of_image, jpeg_bytes),
    }
    if objects is None or values is None or coverage is None or shown is None or patterned is None:
        return found
    empty, covered = coverage == 0, shown & (coverage == 1)
    concepts = (coverage < 1).long() + 4 * (coverage > 0).long()
    number = objects[:, None].expand_as(active)
    either = empty | shown  # patches that show a little of an object are neither
    return found | {
        "l0_background": float(active[empty].mean()),
        "l0_object": float(active[shown].mean()),
        "objects": rank_correlation(of_image, objects),
        "objects_given_area": rank_correlation(of_image, objects, coverage.double().mean(dim=1)),
        "values": rank_correlation(of_image, values),
        "patch_object": rank_correlation(active[either], shown[either]),
        "patch_concepts": rank_correlation(active.flatten(), concepts.flatten()),
        "patch_boundary": rank_correlation(active[shown], (coverage < 1)[shown]),
        "patch_pattern": rank_correlation(active[covered], patterned[covered]),
        "background_objects": rank_correlation(active[empty], number[empty]),
    }


@METRICS.register("support")
class Support(Measurement):
    """`support_values` of a sample of images, those that recovery compares.

    Kept are 12 bytes of each patch: 5 MB of 2,000 images of 196 patches.
    """

    numbers = NUMBERS
    needs = ("patches",)
    rows: list[Tensor]
    patches: list[Tensor]

    def __init__(self, sae: SAE, options: Options) -> None:
        super().__init__(sae, options)
        self.draw = Draw(options.images, 1, options.sample_images, options.seed)
        # Of images: number, JPEG bytes, objects, values; the last two -1 without truth.
        self.add_state("rows", [], dist_reduce_fx="cat")
        # Of patches: active latents, coverage, and 0: background, 1: plain object, 2: patterned.
        self.add_state("patches", [], dist_reduce_fx="cat")
        self._start()

    def reset(self) -> None:
        super().reset()
        self._start()

    def _start(self) -> None:
        # A process without rows takes part in the gathering, with the right shapes.
        self.rows = [torch.empty(0, 4, dtype=torch.long, device=self.device)]
        self.patches = [torch.empty(0, 3, device=self.device)]

    def update(self, batch: Batch) -> None:
        drawn, numbers = self.draw.among(batch.positions)
        if not len(drawn):
            return
        active = batch.active[drawn].cpu().float()
        objects = values = torch.full_like(numbers, -1)
        coverage = kind = torch.zeros_like(active)
        if batch.has_truth:
            of_image = _by_attribute(batch.image_truth[drawn].cpu(), IMAGE_ATTRIBUTES)
            of_patch = _by_attribute(batch.patch_truth[drawn].cpu(), PATCH_ATTRIBUTES)
            objects = 1 + of_image["count"].int().argmax(dim=1)
            values = torch.cat([of_image[name] for name in PATCH_ATTRIBUTES], dim=1).sum(dim=1)
            pattern = of_patch["pattern"]  # the first of them is plain
            kind = pattern.any(dim=2).float() + pattern[:, :, 1:].any(dim=2).float()
            coverage = batch.coverage[drawn].float()
        rows = torch.stack((numbers, batch.jpeg_bytes[drawn], objects, values), dim=1)
        patches = torch.stack((active, coverage, kind), dim=2).flatten(0, 1)
        self.rows.append(rows.to(self.device))
        self.patches.append(patches.to(self.device))

    def compute(self) -> dict[str, Tensor]:
        rows, patches = dim_zero_cat(self.rows).cpu(), dim_zero_cat(self.patches).cpu()
        order = rows[:, 0].argsort()  # so that neither batches nor processes matter
        _, jpeg, objects, values = rows[order].unbind(dim=1)
        active, coverage, kind = patches.view(len(rows), -1, 3)[order].unbind(dim=2)
        truth = (objects, values, coverage, kind > 0, kind > 1) if bool((objects > 0).all()) else ()
        found = support_values(active, jpeg, *truth)
        return {f"support_{name}": torch.tensor(value) for name, value in found.items()}


def _by_attribute(truth: Tensor, attributes: tuple[str, ...]) -> dict[str, Tensor]:
    """Columns [..., V] of `concept_names(attributes)`, those of each attribute."""
    names = [name.partition("=")[0] for name in concept_names(attributes)]
    sizes = [names.count(attribute) for attribute in attributes]
    return dict(zip(attributes, truth.split(sizes, dim=-1), strict=True))
