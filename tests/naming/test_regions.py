"""Where latents act in images, and what CLIP sees of it."""

import torch
from torch.nn.functional import normalize

from clipsae.clip import FrozenCLIP
from clipsae.data.scenes import ScenesDataset
from clipsae.naming.regions import crop, embed_examples, regions


def maps(*patches: tuple[int, int], value: int = 255) -> torch.Tensor:
    found = torch.zeros(8, 8, dtype=torch.uint8)
    for row, column in patches:
        found[row, column] = value
    return found.flatten()


def test_regions_are_square_boxes_with_a_margin_within_the_grid():
    found = regions(
        torch.stack(
            [
                maps((3, 3)),
                maps((2, 1), (2, 5)),  # wider than high: 7 x 7
                maps((0, 0), (1, 1)),  # at the edge: moved inwards
                maps((7, 0), (0, 7)),  # all of it
                maps(),
                maps((5, 5), value=100),  # (as after rounding: no patch is the strongest)
                maps((3, 3)) + maps((7, 7), value=127),  # a weak patch is no part of it
            ]
        ),
        (8, 8),
    )
    assert found.tolist() == [
        [2, 2, 5, 5],
        [0, 0, 7, 7],
        [0, 0, 4, 4],
        *[[0, 0, 8, 8]] * 3,
        [2, 2, 5, 5],
    ]


def test_examples_are_embedded_once_each_from_their_parts():
    clip, dataset = FrozenCLIP.load("clipsae-tiny", "builtin"), ScenesDataset("all", "test", 9)
    index = torch.tensor([[4, 2], [4, -1], [2, 4]])
    shown = torch.stack(
        [maps((3, 3)), maps((1, 2)), maps((3, 3)), maps(), maps((5, 5)), maps((3, 3))]
    )
    embeddings, place = embed_examples(clip, dataset, index, shown.view(3, 2, 64), batch_size=2)
    assert (len(embeddings), int(place[1, 1])) == (3, -1)
    assert place[0, 0] == place[1, 0] == place[2, 1]
    image = dataset[4][0]
    part = crop(image, torch.tensor([2, 2, 5, 5]), [8, 8])
    by_hand = torch.nn.functional.interpolate(
        image[None, :, 16:40, 16:40], size=(64, 64), mode="bicubic", antialias=True
    )
    assert torch.equal(part, by_hand[0])
    expected = normalize(clip.encode_image(clip.normalize(by_hand)), dim=-1)[0]
    torch.testing.assert_close(embeddings[place[0, 0]], expected, atol=1e-5, rtol=0)
    whole, place = embed_examples(clip, dataset, index, None)
    assert len(whole) == 2
    both = normalize(clip.encode_image(clip.normalize(dataset.images([2, 4])[0])), dim=-1)
    torch.testing.assert_close(whole[place[2]], both, atol=1e-5, rtol=0)
