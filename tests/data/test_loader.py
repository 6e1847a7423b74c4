"""Each image once an epoch, the same order for everyone, and resumed at the very next batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipsae.data import ImageList
from clipsae.data.images import BadImageError
from clipsae.data.loader import ResumableLoader, image_batches


class Numbers(torch.utils.data.Dataset):
    """Image i is filled with the number i."""

    def __init__(self, n: int) -> None:
        self.labels = torch.arange(n)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return torch.full((3, 1, 1), index, dtype=torch.uint8), index


def numbers(batches) -> list[list[int]]:
    """What an epoch of batches shows, a list for each block's images."""
    return [images[:, 0, 0, 0].tolist() for images, _ in batches if images is not None]


def handed_out(batches) -> list[tuple[tuple[int, ...], int]]:
    """(images of the block, part) of each batch, whoever brought the images."""
    out, current = [], None
    for images, block in batches:
        current = current if images is None else tuple(images[:, 0, 0, 0].tolist())
        out.append((current, block.part, block.seed))
    return out


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [0, 4, 12])
def test_each_image_once_an_epoch_over_all_ranks(world, shuffle):
    n, b = 101, 4
    loaders = [
        ResumableLoader(Numbers(n), b, seed=3, shuffle_images=shuffle, rank=r, world_size=world)
        for r in range(world)
    ]
    epochs = []
    for _ in range(2):
        seen = [handed_out(loader) for loader in loaders]
        assert [len(s) for s in seen] == [len(loader) for loader in loaders]
        images = sum((sum(map(list, dict.fromkeys(x[0] for x in s)), []) for s in seen), [])
        assert len(images) == len(set(images)) == n // (b * world) * b * world
        epochs.append(images)
    assert epochs[0] != epochs[1]
    assert sorted(loader.epoch for loader in loaders) == [1] * world


def test_the_order_depends_on_seed_and_epoch_alone():
    first = numbers(ResumableLoader(Numbers(50), 5, seed=1))
    assert numbers(ResumableLoader(Numbers(50), 5, seed=1)) == first
    assert numbers(ResumableLoader(Numbers(50), 5, seed=1, num_workers=2)) == first
    assert numbers(ResumableLoader(Numbers(50), 5, seed=2)) != first
    torch.manual_seed(99)
    assert numbers(ResumableLoader(Numbers(50), 5, seed=1)) == first


def test_reading_leaves_the_global_random_state_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    list(ResumableLoader(Numbers(20), 5, num_workers=1))
    list(image_batches(Numbers(20), 5, num_workers=1))
    assert torch.equal(torch.get_rng_state(), before)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(12, 60),
    b=st.integers(1, 4),
    parts=st.integers(0, 4),
    world=st.integers(1, 3),
    stop=st.integers(0, 100),
    seed=st.integers(0, 5),
)
def test_resumed_at_the_very_next_batch(n, b, parts, world, stop, seed):
    def fresh() -> ResumableLoader:
        return ResumableLoader(
            Numbers(n), b, seed=seed, shuffle_images=parts * b, rank=world - 1, world_size=world
        )

    def stream(loader, count):
        """`count` batches over as many epochs as it takes, stopping as Lightning does: after the
        last batch that was asked for, within the loop."""
        out = []
        while len(out) < count:
            iterator, current = iter(loader), None
            while loader.position < len(loader) and len(out) < count:
                images, block = next(iterator)
                current = current if images is None else tuple(images[:, 0, 0, 0].tolist())
                out.append((current, block.part, block.seed))
        return out

    total = 2 * len(fresh()) + 3
    stop = min(stop, total)
    whole = stream(fresh(), total)
    first = fresh()
    beginning = stream(first, stop)
    second = fresh()
    second.load_state_dict(first.state_dict())
    assert beginning + stream(second, total - stop) == whole


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="fewer than one step's 8"):
        ResumableLoader(Numbers(7), 4, world_size=2)
    with pytest.raises(ValueError, match="a multiple of batch_size=4"):
        ResumableLoader(Numbers(70), 4, shuffle_images=6)
    with pytest.raises(ValueError, match="batch_size=0"):
        ResumableLoader(Numbers(7), 0)


def test_evaluation_reads_in_the_given_order_and_keeps_the_rest():
    found = list(image_batches(Numbers(10), 4, indices=[9, 1, 5, 3, 0, 2]))
    assert [len(i) for i, _, _ in found] == [4, 2]
    assert [x for _, _, indices in found for x in indices.tolist()] == [9, 1, 5, 3, 0, 2]
    assert [x for images, _, _ in found for x in images[:, 0, 0, 0].tolist()] == [9, 1, 5, 3, 0, 2]
    assert sum(len(i) for i, _, _ in image_batches(Numbers(10), 4, num_workers=2)) == 10


@pytest.fixture
def partly_bad(tmp_path):
    """Ten images; the third and the last cannot be read."""
    files = [f"{i}.png" for i in range(10)]
    for i, file in enumerate(files):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / file)
    (tmp_path / files[2]).write_bytes(b"")
    (tmp_path / files[9]).write_text("no image")

    def make(on_bad_image):
        labels = list(range(10))
        return ImageList(
            tmp_path, files, labels, files, image_size=4, on_bad_image=on_bad_image
        )

    return make


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_stops_and_is_named(partly_bad, workers):
    with pytest.raises(BadImageError, match=r"2\.png.*on_bad_image=skip"):
        list(image_batches(partly_bad("error"), 4, workers))
    with pytest.raises(BadImageError, match=r"\.png"):
        list(ResumableLoader(partly_bad("error"), 5, num_workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_are_left_out_of_an_evaluation_and_reported(partly_bad, workers, caplog):
    found = list(image_batches(partly_bad("skip"), 4, workers))
    assert [x for _, _, i in found for x in i.tolist()] == [0, 1, 3, 4, 5, 6, 7, 8]
    assert "2 images could not be read and were left out" in caplog.text
    assert "2.png" in caplog.text


def test_skipped_images_are_replaced_in_training(partly_bad, caplog):
    batches = numbers(ResumableLoader(partly_bad("skip"), 5))
    assert [len(b) for b in batches] == [5, 5]
    assert sorted(sum(batches, [])) == [0, 0, 1, 3, 3, 4, 5, 6, 7, 8]
    assert "2 images could not be read and were replaced by the next" in caplog.text
