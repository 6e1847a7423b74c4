"""What latents are most active on, as CLIP sees it: whole images, or the regions in which they act.

M latents, K images of each, P patches of a grid, E examples, S image side, e embedding size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from clipsae.clip import FrozenCLIP
from clipsae.data.loader import image_batches

STRONG = 128  # of 255: patches that are at least half as active as the strongest are the region
MARGIN = 1  # patches around it that are shown, too


def regions(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """The part of an image in which a latent acts: a box around the patches on which its code is at
    least half its largest, a patch of margin around it, square where the grid allows.

    Args:
        maps: uint8 [n, P], as `References.maps`: 255 is the largest code.
        grid: (rows, columns) of patches.

    Returns:
        LongTensor [n, 4]: first row, first column, and behind the last row and column; the whole
        grid for a map without activity.
    """
    strong = maps.unflatten(1, grid) >= STRONG
    sides = []
    for of_patches, length in ((strong.any(dim=2), grid[0]), (strong.any(dim=1), grid[1])):
        place = torch.arange(length)
        first = torch.where(of_patches, place, length).amin(dim=1) - MARGIN
        last = torch.where(of_patches, place, -1).amax(dim=1) + MARGIN
        sides.append((first, last + 1))
    (top, bottom), (left, right) = sides
    side = torch.maximum(bottom - top, right - left)
    box = []
    for first, last, length in ((top, bottom, grid[0]), (left, right, grid[1])):
        size = side.clamp(max=length)
        first = (first - (size - (last - first)).div(2, rounding_mode="floor")).clamp(min=0)
        first = torch.minimum(first, length - size)
        box.append((first, first + size))
    found = torch.stack([box[0][0], box[1][0], box[0][1], box[1][1]], dim=1)
    nowhere = ~strong.flatten(1).any(dim=1)
    return torch.where(nowhere[:, None], torch.tensor([0, 0, *grid]), found)


@torch.no_grad()
def embed_examples(
    clip: FrozenCLIP,
    dataset: Any,
    index: Tensor,
    maps: Tensor | None,
    *,
    batch_size: int = 32,
    num_workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Tensor, Tensor]:
    """Embed each example once, however many latents share it; each image is read once.

    Args:
        index: LongTensor [M, K], images of the dataset, -1: none.
        maps: uint8 [M, K, P], where in them a latent acts: its region, enlarged to the whole
            (bicubic), is the example. None: the whole image is.
        progress: called with (images done, images in all).

    Returns:
        Unit embeddings float32 [E, e] on the CPU, and for each latent its examples among them,
        LongTensor [M, K], -1: none.
    """
    flat = index.flatten()
    grid = clip.grid
    box = torch.tensor([0, 0, *grid]).expand(len(flat), 4)
    if maps is not None:
        box = regions(maps.flatten(0, 1), grid)
    there = flat >= 0
    distinct, place = torch.cat((flat[:, None], box), dim=1)[there].unique(
        dim=0, return_inverse=True
    )
    found = torch.full_like(flat, -1)
    found[there] = place
    images, first = distinct[:, 0].unique_consecutive(return_counts=True)
    edges = torch.cat((first.new_zeros(1), first.cumsum(0)))
    start = dict(zip(images.tolist(), edges.tolist(), strict=False))
    embeddings = torch.zeros(len(distinct), clip.embed_dim)
    pixels_of_patch = [clip.image_size // n for n in grid]
    pending: list[tuple[int, Tensor]] = []

    def flush() -> None:
        rows, pixels = zip(*pending, strict=True)
        pending.clear()
        embedded = clip.encode_image(clip.normalize(torch.stack(pixels)))
        unit = nn.functional.normalize(embedded.float(), dim=-1)
        embeddings[torch.tensor(rows)] = unit.cpu()

    done = 0
    for pixels, _, at in image_batches(dataset, batch_size, num_workers, images.tolist()):
        for image, number in zip(pixels, at.tolist(), strict=True):
            row = start[number]
            while row < len(distinct) and int(distinct[row, 0]) == number:
                pending.append((row, crop(image, distinct[row, 1:], pixels_of_patch)))
                row += 1
                if len(pending) == batch_size:
                    flush()
            done += 1
        progress(done, len(images))
    if pending:
        flush()
    return embeddings, found.view_as(index)


def crop(image: Tensor, box: Tensor, pixels: list[int]) -> Tensor:
    """A part of an image, enlarged to its size.

    Args:
        image: uint8 [3, S, S].
        box: LongTensor [4] in patches, as `regions` has it.
        pixels: height and width of a patch.

    Returns:
        uint8 [3, S, S]; the image itself where the box is all of it.
    """
    top, left, bottom, right = box.tolist()
    part = image[:, top * pixels[0] : bottom * pixels[0], left * pixels[1] : right * pixels[1]]
    if part.shape == image.shape:
        return image
    return nn.functional.interpolate(
        part[None], size=image.shape[1:], mode="bicubic", antialias=True
    )[0]
