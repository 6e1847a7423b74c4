"""One pass over images: pixels -> tokens -> codes -> reconstruction.

Each is computed when it is first asked for, and once: tokens, embeddings and ground truth for all
SAEs, codes and reconstruction for all who look at one SAE.

B images, T tokens of an image, P patches, d width, M latents, e embedding size, C classes, V
concepts, n latents kept.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from clipsae.clip import FrozenCLIP
from clipsae.data.loader import image_batches
from clipsae.evaluation.truth import image_concepts, patch_concepts
from clipsae.sae import SAE, SparseCodes

Encoder = Callable[[Tensor, Tensor], Tensor]
Progress = Callable[[int, int, str], None]
"""Called with (done, in all, of what)."""

POOLINGS = ("mean", "max", "cls")

# Dense codes are [images, T, M], at the paper's size 39 MB an image: images are encoded in groups
# of this many bytes, a few times of which is in use at the peak.
_DENSE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Stream:
    """What images are shown to, and how.

    Attributes:
        dataset: items (uint8 [3, S, S], label).
        indices: the images of the dataset that are looked at, ascending.
        encoder: of `embeddings`: (uint8 [B, 3, S, S], indices [B]) -> [B, e].
        classifier: of `predictions`: [C, e].
        pooling: of `pooled`.
        keep_scores: whether anyone needs `scores`: codes are then made from them.
    """

    clip: FrozenCLIP
    dataset: Any
    indices: Sequence[int]
    encoder: Encoder | None = None
    classifier: Tensor | None = None
    pooling: str = "mean"
    keep_scores: bool = False
    batch_size: int = 32
    num_workers: int = 0

    def read(self, order: Sequence[int] | None = None) -> Iterator["Images"]:
        """Batches of the images `order`, or of all `indices` in their order."""
        order = self.indices if order is None else order
        batches = image_batches(self.dataset, self.batch_size, self.num_workers, order)
        for pixels, labels, indices in batches:
            yield Images(self, pixels.to(self.clip.device), labels, indices)

    def show(
        self,
        saes: Mapping[str, SAE],
        update: Callable[[str, "Batch"], None],
        order: Sequence[int] | None = None,
        *,
        wanted: Mapping[str, Set[int]] | None = None,
        each: Callable[["Images"], None] = lambda images: None,
    ) -> None:
        """One pass over the images `order`, or all: `update` is called with each SAE's name and
        groups of images as it sees them.

        Args:
            wanted: the images that each SAE is shown; None: all.
            each: called with each batch of images, when all SAEs have seen it.
        """
        with in_eval_mode(saes.values()):
            for images in self.read(order):
                for name, sae in saes.items():
                    rows = None if wanted is None else images.rows(wanted[name])
                    for batch in images.through(sae, rows):
                        update(name, batch)
                each(images)

    @property
    def embed_dim(self) -> int:
        """e of the encoder; 0 without one."""
        if self.encoder is None:
            return 0
        size = self.clip.image_size
        blank = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=self.clip.device)
        return self.encoder(blank, torch.tensor(self.indices[:1])).shape[1]


class Images:
    """A batch of images.

    Attributes:
        pixels: uint8 [B, 3, S, S].
        labels, indices: LongTensor [B] on the CPU.
    """

    def __init__(self, stream: Stream, pixels: Tensor, labels: Tensor, indices: Tensor) -> None:
        self.stream = stream
        self.pixels = pixels
        self.labels = labels
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    @cached_property
    def tokens(self) -> Tensor:
        """[B, T, d] of CLIP's prefix, the patches last."""
        clip = self.stream.clip
        return clip.prefix(clip.normalize(self.pixels))

    @cached_property
    def embeddings(self) -> Tensor:
        """[B, e] of the separate image encoder."""
        assert self.stream.encoder is not None
        return self.stream.encoder(self.pixels, self.indices)

    @cached_property
    def patch_truth(self) -> Tensor:
        """Bool [B, P, V] of `concept_names(PATCH_ATTRIBUTES)`."""
        grid = self.stream.clip.grid[0]
        return patch_concepts(self.stream.dataset, self.indices, grid).to(self.pixels.device)

    @cached_property
    def image_truth(self) -> Tensor:
        """Bool [B, V] of `concept_names(IMAGE_ATTRIBUTES)`."""
        return image_concepts(self.stream.dataset, self.indices).to(self.pixels.device)

    @cached_property
    def predictions(self) -> Tensor:
        """CLIP's own predicted classes, LongTensor [B]."""
        return predict(self.stream, self.tokens)

    def rows(self, indices: Set[int]) -> list[int]:
        """Where images of the dataset are among these."""
        return [row for row, index in enumerate(self.indices.tolist()) if index in indices]

    def through(self, sae: SAE, rows: Sequence[int] | None = None) -> Iterator["Batch"]:
        """These images, or those at `rows`, in groups whose dense codes fit in memory."""
        size = self.tokens.shape[1] * sae.config["latents"] * self.tokens.element_size()
        group = max(1, _DENSE_BYTES // size)
        total = len(self) if rows is None else len(rows)
        for start in range(0, total, group):
            part = slice(start, start + group)
            yield Batch(self, sae, part if rows is None else list(rows[part]))


class Batch:
    """Images as one SAE sees them: what a `Measurement` is updated with."""

    def __init__(self, images: Images, sae: SAE, rows: slice | list[int]) -> None:
        self.images = images
        self.sae = sae
        self.rows = rows

    # --- of the images ---

    @cached_property
    def tokens(self) -> Tensor:
        """[B, T, d], the patches last."""
        return self.images.tokens[self.rows]

    @cached_property
    def labels(self) -> Tensor:
        """LongTensor [B] on the CPU."""
        return self.images.labels[self.rows]

    @cached_property
    def indices(self) -> Tensor:
        """LongTensor [B] on the CPU, in the dataset."""
        return self.images.indices[self.rows]

    @cached_property
    def positions(self) -> list[int]:
        """Of the images among all that are looked at, in the dataset's order: what samples are
        drawn by, whatever the order in which images come."""
        among = self.images.stream.indices
        return [bisect_left(among, index) for index in self.indices.tolist()]

    @cached_property
    def embeddings(self) -> Tensor:
        """[B, e] of the separate image encoder."""
        return self.images.embeddings[self.rows]

    @cached_property
    def patch_truth(self) -> Tensor:
        """Bool [B, P, V]."""
        return self.images.patch_truth[self.rows]

    @cached_property
    def image_truth(self) -> Tensor:
        """Bool [B, V']."""
        return self.images.image_truth[self.rows]

    # --- of the SAE ---

    @cached_property
    def scores(self) -> Tensor:
        """[B, T, M], before the activation."""
        return self.sae.scores(self.tokens)

    @cached_property
    def threshold(self) -> Tensor:
        """tau of the scores."""
        return self.sae.threshold(self.scores)

    @cached_property
    def codes(self) -> Tensor:
        """[B, T, M], dense."""
        if self.images.stream.keep_scores:
            return self.sae.apply_threshold(self.scores, self.threshold)
        return self.sparse.dense()

    @cached_property
    def sparse(self) -> SparseCodes:
        """Codes [B, T, M] without their zeros."""
        if self.images.stream.keep_scores:
            return SparseCodes.from_dense(self.codes)
        return self.sae.encode_sparse(self.tokens)

    @cached_property
    def scale(self) -> Tensor:
        """[B, T, 1], what the reconstruction is multiplied with."""
        return self.sae.input_scale(self.tokens)

    @cached_property
    def reconstruction(self) -> Tensor:
        """[B, T, d], by all latents."""
        return self.sae.decode(self.sparse, self.scale)

    @cached_property
    def predictions(self) -> Tensor:
        """Classes predicted from the reconstruction, LongTensor [B]."""
        return predict(self.images.stream, self.reconstruction)

    @cached_property
    def pooled(self) -> Tensor:
        """Codes of the images [B, M], by the stream's `pooling`."""
        return pool_codes(self.codes, self.images.stream.pooling)

    @cached_property
    def fired(self) -> Tensor:
        """On how many tokens each latent is active, LongTensor [M]."""
        return self.sparse.view(-1, self.sparse.latents).count()

    @cached_property
    def sums(self) -> Tensor:
        """Codes summed over an image's tokens, float64 [B, M]."""
        return self.sparse.totals()

    def counts(self, above: float) -> Tensor:
        """On how many tokens of an image a latent's code is larger, LongTensor [B, M]."""
        return self.sparse.count(self.sparse.values > above)

    def image_codes(self) -> list[SparseCodes]:
        """The codes of each image. Copies, so that they do not keep the batch's memory."""
        return [self.sparse[i].compact() for i in range(len(self.tokens))]


def pool_codes(codes: Tensor, pooling: str = "mean") -> Tensor:
    """Token codes [B, T, M] -> image codes [B, M].

    Args:
        pooling: "mean" or "max" over all T tokens, or "cls": the first token's alone (what Pach
            et al. use for MonoSemanticity).

    Raises:
        ValueError: another pooling.
    """
    if pooling == "mean":
        # In float32 at least: a sum of bfloat16 loses the small codes.
        return codes.mean(dim=1, dtype=torch.promote_types(codes.dtype, torch.float32))
    if pooling == "max":
        return codes.amax(dim=1)
    if pooling == "cls":
        return codes[:, 0]
    raise ValueError(f"pooling={pooling!r}: expected one of {', '.join(POOLINGS)}")


def predict(stream: Stream, tokens: Tensor) -> Tensor:
    """The classes that residual streams [B, T, d] are named after, LongTensor [B]."""
    assert stream.classifier is not None
    # Cosines with the classifier's rows, if those are of unit length.
    embeddings = nn.functional.normalize(stream.clip.tail(tokens), dim=-1)
    return (embeddings @ stream.classifier.T).argmax(dim=-1)


def evenly_spaced(labels: Any, limit: int | None) -> list[int]:
    """`limit` of the images, evenly spaced over them in the order of their classes, so that no
    order of a dataset's labels leaves classes out; all of them for None or a larger limit.

    Args:
        labels: of all images, LongTensor [N] or a sequence.

    Returns:
        Indices, ascending.

    Raises:
        ValueError: no images, or a limit below 1.
    """
    total = len(labels)
    if not total:
        raise ValueError("the dataset has no images: it must have at least one")
    if limit is None:
        return list(range(total))
    if limit < 1:
        raise ValueError(f"limit_images={limit}: must be at least 1, or None for all")
    limit = min(limit, total)
    by_class = torch.as_tensor(labels).argsort(stable=True)
    return sorted(by_class[[i * total // limit for i in range(limit)]].tolist())


@contextmanager
def in_eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Modules in eval mode within the block, each as it was after it."""
    training = [(module, module.training) for module in modules]
    try:
        for module, _ in training:
            module.eval()
        yield
    finally:
        for module, was in training:
            module.train(was)
