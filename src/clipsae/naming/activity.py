"""One pass over images: on which of them each latent is active, and what CLIP makes of them.

N images, M latents, e embedding size, B images of a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clipsae.clip import FrozenCLIP
from clipsae.evaluation.passes import Batch, Images, Stream, evenly_spaced, place_of
from clipsae.sae import SAE, SparseCodes


@dataclass(frozen=True, eq=False)
class Activity:
    """The images and the codes of a pass, on the CPU.

    Attributes:
        embeddings: float32 [N, e], CLIP's, of unit length.
        codes: [N, M], positive means of the codes over an image's tokens: "active on an image" as
            reference images have it.
        indices: LongTensor [N], the images in the dataset.
        labels: LongTensor [N].
    """

    embeddings: Tensor
    codes: SparseCodes
    indices: Tensor
    labels: Tensor

    def places(self, index: Tensor) -> Tensor:
        """Images by their index in the dataset (-1: none) -> their rows here, of the same shape; -1
        for those that are not among these."""
        size = 1 + max(int(self.indices.max()), int(index.max()))
        row = torch.full((size + 1,), -1)  # the last is that of -1
        row[self.indices] = torch.arange(len(self.indices))
        return row[index]


@torch.no_grad()
def collect_activity(
    clip: FrozenCLIP,
    sae: SAE,
    dataset: Any,
    *,
    limit_images: int | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Activity:
    """One pass over the images of a dataset; memory is that of the codes that are not zero.

    Args:
        sae: moved to the device of `clip`.
        dataset: `labels` LongTensor, items (uint8 [3, S, S], label).
        limit_images: that many images only, evenly spaced over the classes.
        progress: called with (images done, images in all).

    Raises:
        ValueError: no images.
    """
    wanted = evenly_spaced(dataset.labels, limit_images)
    stream = Stream(
        clip, dataset, wanted, batch_size=batch_size, num_workers=num_workers, **place_of({"": sae})
    )
    codes: list[SparseCodes] = []
    embeddings, labels, indices = [], [], []

    def update(_: str, batch: Batch) -> None:
        found = SparseCodes.from_dense(batch.pooled.clamp(min=0))
        codes.append(SparseCodes(found.values.cpu(), found.positions.cpu(), found.shape))

    def each(images: Images) -> None:
        found = stream.target.tail(images.streams, images.context)
        embeddings.append(nn.functional.normalize(found.float(), dim=-1).cpu())
        labels.append(images.labels)
        indices.append(images.indices)
        progress(sum(map(len, indices)), len(wanted))

    stream.run({"": sae.to(clip.device)}, update, each=each)
    if not codes:
        raise ValueError("none of the dataset's images could be read")
    return Activity(
        torch.cat(embeddings), SparseCodes.stack(codes), torch.cat(indices), torch.cat(labels)
    )
