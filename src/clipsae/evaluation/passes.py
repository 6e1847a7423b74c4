"""One pass over images: pixels -> tokens -> codes -> reconstruction.

Each is computed when it is first used, and once: tokens, embeddings and ground truth for all SAEs,
codes and reconstruction for everything that is computed of one SAE.

B images, T tokens of an image, P patches, d width, M latents, e embedding size, C classes, V
concepts.
"""

import io
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from clipsae.clip import FrozenCLIP
from clipsae.data.captions import Texts, texts_of
from clipsae.data.loader import image_batches
from clipsae.evaluation.floors import RandomDirections, untrained
from clipsae.evaluation.truth import (
    has_truth,
    image_concepts,
    patch_concepts,
    patch_coverage,
    patch_objects,
)
from clipsae.sae import SAE, SparseCodes

Encoder = Callable[[Tensor, Tensor], Tensor]
Progress = Callable[[int, int, str], None]
"""Called with (done, total, what)."""

POOLINGS = ("mean", "max", "cls")

# Dense codes are [images, T, M], at the paper's size 39 MB an image: images are encoded in groups
# of this many bytes, a few times of which is in use at the peak.
_DENSE_BYTES = 256 * 2**20


class Once(dict[Any, Any]):
    """Results that all SAEs share, by their keys: `once(key, make)` calls make() the first time."""

    def __call__(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self:
            self[key] = make()
        return self[key]


@dataclass(frozen=True)
class Stream:
    """The images of a pass, and the models that they go through.

    Attributes:
        dataset: items (uint8 [3, S, S], label).
        indices: the images of the dataset that are used, ascending.
        encoder: of `embeddings`: (uint8 [B, 3, S, S], indices [B]) -> [B, e].
        judges: of `judged`, further encoders.
        classifier: of `predictions`: [C, e].
        pooling: of `pooled`.
        keep_scores: whether `scores` are needed: codes are then made from them.
        seed: of `floors`.
        once: what is kept for the whole pass.
        of: which of an image's tokens the SAEs are of, all of them the same
            (`FrozenCLIP.token_slice`). What is said of tokens is said of these; in an image's
            stream the others stay as they are.
        target_layer: after which block their reconstructions are put back, all of them the same;
            None: where they read (see `SAE`).
    """

    clip: FrozenCLIP
    dataset: Any
    indices: Sequence[int]
    encoder: Encoder | None = None
    judges: Sequence[Encoder] = ()
    classifier: Tensor | None = None
    pooling: str = "mean"
    keep_scores: bool = False
    batch_size: int = 32
    num_workers: int = 0
    seed: int = 0
    of: str = "all"
    target_layer: int | None = None
    once: Once = field(default_factory=Once, init=False, repr=False, compare=False)

    def run(
        self,
        saes: Mapping[str, SAE],
        update: Callable[[str, "Batch"], None],
        order: Sequence[int] | None = None,
        *,
        each: Callable[["Images"], None] = lambda images: None,
    ) -> None:
        """One pass over the images `order` (None: `indices`). `update` is called with each SAE's
        name and groups of images; `each` with a batch that all SAEs are done with."""
        order = self.indices if order is None else order
        with in_eval_mode(saes.values()):
            for pixels, labels, indices in image_batches(
                self.dataset, self.batch_size, self.num_workers, order
            ):
                images = Images(self, pixels.to(self.clip.device), labels, indices)
                for name, sae in saes.items():
                    for batch in images.split(sae):
                        update(name, batch)
                each(images)

    @cached_property
    def target(self) -> FrozenCLIP:
        """The CLIP cut where reconstructions are put back."""
        return self.clip if self.target_layer is None else self.clip.at(self.target_layer)

    def predict(self, tokens: Tensor, context: Tensor | None) -> Tensor:
        """The predicted classes of whole streams of tokens [B, T, d] at `target`, with their
        context (`FrozenCLIP.tail`), LongTensor [B]."""
        assert self.classifier is not None
        # Cosines with the classifier's rows, if those are of unit length.
        embeddings = nn.functional.normalize(self.target.tail(tokens, context), dim=-1)
        return (embeddings @ self.classifier.T).argmax(dim=-1)

    @cached_property
    def some_tokens(self) -> Tensor:
        """Tokens [n, T, d], float32, of up to 32 images, evenly spaced among all: what `floors`
        are initialised from, the same in each batch and process."""
        step = -(-len(self.indices) // 32)
        parts = [
            self.clip.prefix(self.clip.normalize(pixels.to(self.clip.device)))
            for pixels, *_ in image_batches(
                self.dataset, self.batch_size, 0, list(self.indices[::step])
            )
        ]
        return torch.cat(parts).float()[:, self.clip.token_slice(self.of)]

    def floors(self, sae: SAE) -> dict[str, RandomDirections | SAE]:
        """What an SAE is compared with: "random" directions, the same for all, and an "untrained"
        SAE of the same config."""
        return {
            "random": self.once("random", lambda: RandomDirections(self.some_tokens, self.seed)),
            "untrained": self.once(sae, lambda: untrained(sae, self.some_tokens, self.seed)),
        }

    @cached_property
    def texts(self) -> Texts | None:
        """What gives the images' captions to `clip`."""
        return texts_of(self.clip, self.dataset)

    @cached_property
    def distinct(self) -> Tensor:
        """Which images have a caption that none before them has, BoolTensor [N] in the order of
        `indices`."""
        captions = self.dataset.captions(self.indices)
        first = {one: i for i, one in reversed(list(enumerate(captions)))}
        return torch.tensor([first[one] == i for i, one in enumerate(captions)])

    @property
    def embed_dim(self) -> int:
        """e of the encoder; 0 without one."""
        return 0 if self.encoder is None else self.width_of(self.encoder)

    def width_of(self, encoder: Encoder) -> int:
        """e of an encoder."""
        size = self.clip.image_size
        blank = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=self.clip.device)
        return encoder(blank, torch.tensor(self.indices[:1])).shape[1]


class Images:
    """A batch of images.

    Attributes:
        pixels: uint8 [B, 3, S, S].
        labels, indices: LongTensor [B] on the CPU.
        once: what is kept while the batch is there.
    """

    def __init__(self, stream: Stream, pixels: Tensor, labels: Tensor, indices: Tensor) -> None:
        self.stream = stream
        self.pixels = pixels
        self.labels = labels
        self.indices = indices
        self.once = Once()

    def __len__(self) -> int:
        return len(self.indices)

    @cached_property
    def _streams(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """[B, T, d], all tokens: those that are read and those that are reconstructed; and what
        CLIP's tail needs beside the latter."""
        clip, target = self.stream.clip, self.stream.target
        pixels = clip.normalize(self.pixels)
        if target.layer == clip.layer:
            tokens, context = clip.prefix(pixels, with_context=True)
            return tokens, tokens, context
        found = clip.prefixes(pixels, (clip.layer, target.layer), with_context=True)
        return found[clip.layer][0], *found[target.layer]

    @property
    def tokens(self) -> Tensor:
        """Those that the SAEs read."""
        return self._streams[0][:, self.stream.clip.token_slice(self.stream.of)]

    @property
    def targets(self) -> Tensor:
        """What they are to reconstruct."""
        return self.streams[:, self.stream.clip.token_slice(self.stream.of)]

    @property
    def streams(self) -> Tensor:
        """Whole streams in which reconstructions are put."""
        return self._streams[1]

    @property
    def context(self) -> Tensor | None:
        """What CLIP's tail needs beside the streams."""
        return self._streams[2]

    @cached_property
    def embeddings(self) -> Tensor:
        assert self.stream.encoder is not None
        return self.stream.encoder(self.pixels, self.indices)

    @cached_property
    def judged(self) -> tuple[Tensor, ...]:
        return tuple(judge(self.pixels, self.indices) for judge in self.stream.judges)

    @cached_property
    def patch_truth(self) -> Tensor:
        grid = self.stream.clip.grid[0]
        return patch_concepts(self.stream.dataset, self.indices, grid).to(self.pixels.device)

    @cached_property
    def patch_objects(self) -> Tensor:
        grid = self.stream.clip.grid[0]
        return patch_objects(self.stream.dataset, self.indices, grid).to(self.pixels.device)

    @cached_property
    def image_truth(self) -> Tensor:
        return image_concepts(self.stream.dataset, self.indices).to(self.pixels.device)

    @cached_property
    def coverage(self) -> Tensor:
        return patch_coverage(self.stream.dataset, self.indices, self.stream.clip.grid[0])

    @cached_property
    def jpeg_bytes(self) -> Tensor:
        return torch.tensor([_jpeg_bytes(one) for one in self.pixels.cpu()])

    @cached_property
    def predictions(self) -> Tensor:
        return self.stream.predict(self.streams, self.context)

    @cached_property
    def captions(self) -> Tensor:
        assert self.stream.texts is not None
        texts = self.stream.texts(self.indices)
        return self.stream.clip.encode_text(texts, normalize=True)

    def split(self, sae: SAE) -> Iterator["Batch"]:
        """Groups of images whose dense codes fit in memory."""
        size = self.tokens.shape[1] * sae.config["latents"] * self.tokens.element_size()
        group = max(1, _DENSE_BYTES // size)
        for start in range(0, len(self), group):
            yield Batch(self, sae, slice(start, start + group))


def _jpeg_bytes(pixels: Tensor) -> int:
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=75)
    return file.tell()


def _of_images(name: str) -> Any:
    return cached_property(lambda batch: getattr(batch.images, name)[batch.rows])


class Batch:
    """Images and their codes by one SAE: what a `Measurement` is updated with.

    Attributes:
        images: the whole batch, with CLIP's own `predictions`; this is its part `rows`.
        sae: the SAE.
        labels, indices: LongTensor [B] on the CPU; indices are those in the dataset.
        tokens: [B, T, d] of CLIP's prefix that the SAE reads, the patches last.
        targets: [B, T, d], what it is to reconstruct: the tokens, but of a transcoder.
        streams: [B, T, d] with all tokens, in which reconstructions are put.
        context: what CLIP's tail needs beside the streams, [B, T, d] or None.
        embeddings: [B, e] of the separate image encoder.
        captions: [B, e] of the images' captions by CLIP itself, of unit length.
        patch_truth: bool [B, P, V] of `patch_concept_names(dataset)`.
        patch_objects: LongTensor [B, P], which of the image's objects each patch shows; -1: none.
        image_truth: bool [B, V] of `concept_names(IMAGE_ATTRIBUTES)`.
        coverage: [B, P] on the CPU, how much of each patch its foremost object covers, 0..1.
        jpeg_bytes: LongTensor [B] on the CPU, the images' sizes as JPEG of quality 75.
    """

    labels: Tensor = _of_images("labels")
    indices: Tensor = _of_images("indices")
    tokens: Tensor = _of_images("tokens")
    targets: Tensor = _of_images("targets")
    streams: Tensor = _of_images("streams")
    embeddings: Tensor = _of_images("embeddings")
    captions: Tensor = _of_images("captions")
    patch_truth: Tensor = _of_images("patch_truth")
    patch_objects: Tensor = _of_images("patch_objects")
    image_truth: Tensor = _of_images("image_truth")
    coverage: Tensor = _of_images("coverage")
    jpeg_bytes: Tensor = _of_images("jpeg_bytes")

    def __init__(self, images: Images, sae: SAE, rows: slice) -> None:
        self.images = images
        self.sae = sae
        self.rows = rows

    @property
    def context(self) -> Tensor | None:
        context = self.images.context
        return None if context is None else context[self.rows]

    @cached_property
    def judged(self) -> tuple[Tensor, ...]:
        """Embeddings by each further encoder, [B, e] each."""
        return tuple(embeddings[self.rows] for embeddings in self.images.judged)

    @cached_property
    def positions(self) -> Tensor:
        """Places of the images among all of the pass, in the dataset's order: samples are drawn by
        them. LongTensor [B] on the CPU."""
        among = self.images.stream.indices
        return torch.tensor([bisect_left(among, index) for index in self.indices.tolist()])

    @property
    def floors(self) -> dict[str, RandomDirections | SAE]:
        """What the SAE is compared with, by name (`Stream.floors`)."""
        return self.images.stream.floors(self.sae)

    @cached_property
    def has_truth(self) -> bool:
        """Whether the dataset knows what its images show."""
        return has_truth(self.images.stream.dataset)

    @cached_property
    def kept(self) -> Tensor | None:
        """Which tokens have codes, BoolTensor [B, T]; None: all (`SAE.kept`). Where a token has
        none its codes are 0, and its reconstruction it itself."""
        return self.sae.kept(self.tokens)

    def of_kept(self, values: Tensor) -> Tensor:
        """Of values [B, T, ...] those of the tokens that have codes, [n, ...]; as they are where
        all have."""
        return values if self.kept is None else values[self.kept]

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
            codes = self.sae.apply_threshold(self.scores, self.threshold)
            return codes if self.kept is None else codes * self.kept[..., None]
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
        found = self.sae.decode(self.sparse, self.scale)
        if self.kept is None:
            return found
        return torch.where(self.kept[..., None], found, self.targets)

    @cached_property
    def predictions(self) -> Tensor:
        """Classes predicted from the reconstruction, LongTensor [B]."""
        stream = self.images.stream
        replaced = stream.clip.with_tokens(self.streams, self.reconstruction, stream.of)
        return stream.predict(replaced, self.context)

    @cached_property
    def pooled(self) -> Tensor:
        """Codes of the images [B, M], by the pass's `pooling`."""
        return pool_codes(self.codes, self.images.stream.pooling)

    def patch_codes(self, rows: Tensor, patches: int) -> SparseCodes:
        """Codes [n, P, M] of the P patches, which are the last tokens, of images `rows` [n]."""
        drawn = torch.zeros(self.tokens.shape[:2], dtype=torch.bool)
        drawn[rows, -patches:] = True
        codes = self.sparse.view(-1, self.sparse.latents)[drawn.flatten().to(self.tokens.device)]
        return codes.view(len(rows), patches, codes.latents)

    def object_labels(self, attributes: Sequence[str]) -> Tensor | None:
        """Values of the attributes of images with one object, LongTensor [B, attributes] on the
        CPU, -1 for other images; None where the dataset does not know objects."""
        if not has_truth(self.images.stream.dataset):
            return None
        truth = self.images.stream.dataset.attributes(self.indices.cpu())
        values = torch.stack([truth[name].view(len(self.indices), -1)[:, 0] for name in attributes])
        return values.T.masked_fill((truth["count"] != 1)[:, None], -1)

    @cached_property
    def active(self) -> Tensor:
        """How many latents are active on each patch, LongTensor [B, P]."""
        codes = self.sparse
        counts = codes.token.new_zeros(codes.tokens, dtype=torch.long)
        counts.index_add_(0, codes.token.long(), (codes.values != 0).long())
        return counts.view(codes.shape[:-1])[:, -prod(self.images.stream.clip.grid) :]

    @cached_property
    def fired(self) -> Tensor:
        """On how many tokens each latent is active, LongTensor [M]."""
        return self.sparse.view(-1, self.sparse.latents).count()


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


def evenly_spaced(labels: Any, limit: int | None) -> list[int]:
    """Indices of `limit` images, ascending, evenly spaced in the order of their classes, so that no
    class is left out, however labels are ordered; of all images for None or a larger limit.

    Args:
        labels: of all images, LongTensor [N] or a sequence.

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


def place_of(saes: Mapping[str, SAE]) -> dict[str, Any]:
    """Which of an image's tokens SAEs are of, and where reconstructions go: `of` and `target_layer`
    of a `Stream`.

    Raises:
        ValueError: not all of the same.
    """
    place: dict[str, Any] = {}
    for ours, option in (("of", "tokens"), ("target_layer", "target_layer")):
        found = list(dict.fromkeys(sae.config[option] for sae in saes.values()))
        if len(found) > 1:
            raise ValueError(
                f"SAEs of {option}={found[0]} and of {option}={found[1]}: evaluate those of each "
                "by themselves"
            )
        if found:
            place[ours] = found[0]
    return place


def covered(clip: FrozenCLIP, sae: SAE, streams: Tensor) -> Tensor | None:
    """Which tokens of whole streams [B, T, d] an SAE has codes for, BoolTensor [B, T]; None:
    all."""
    kept = sae.kept(streams)
    if sae.config["tokens"] == "all":
        return kept
    chosen = torch.zeros(streams.shape[:2], dtype=torch.bool, device=streams.device)
    chosen[:, clip.token_slice(sae.config["tokens"])] = True
    return chosen if kept is None else chosen & kept


def whole_codes(clip: FrozenCLIP, sae: SAE, streams: Tensor) -> Tensor:
    """Codes [B, T, M] of whole streams [B, T, d], 0 where the SAE has none (`covered`)."""
    chosen = clip.token_slice(sae.config["tokens"])
    codes = sae.encode(streams[:, chosen])
    whole = codes.new_zeros(*streams.shape[:2], codes.shape[-1])
    whole[:, chosen] = codes
    return whole


@contextmanager
def in_eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Modules in eval mode within the block; each mode is restored after it."""
    training = [(module, module.training) for module in modules]
    try:
        for module, _ in training:
            module.eval()
        yield
    finally:
        for module, was in training:
            module.train(was)
