"""Each image once an epoch, the same order for everyone, and resumed at the very next batch."""

import os
import signal
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipsae.data import ImageList
from clipsae.data.images import BadImageError
from clipsae.data.loader import ResumableLoader, image_batches
from clipsae.data.reader import read_batches
from tests.data.counting import Numbers


def numbers(batches) -> list[tuple[int, ...]]:
    """The images of each batch."""
    return [tuple(images[:, 0, 0, 0].tolist()) for images in batches]


@pytest.mark.parametrize("shuffle", [0, 4, 12])
def test_each_image_once_an_epoch_over_all_ranks(shuffle):
    n, b, seeds = 101, 4, []

    def transform(parts, seed):
        seeds.append(seed)
        return torch.cat(parts)

    options = {"seed": 3, "shuffle_images": shuffle, "transform": transform}
    for world in (1, 2, 3):
        seeds.clear()
        loaders = [
            ResumableLoader(Numbers(n), b, rank=r, world_size=world, **options)
            for r in range(world)
        ]
        epochs = []
        for _ in range(2):
            seen = [numbers(loader) for loader in loaders]
            assert [len(s) for s in seen] == [len(loader) for loader in loaders]
            images = list(chain(*chain(*seen)))
            assert len(images) == len(set(images)) == n // (b * world) * b * world
            epochs.append(images)
        assert epochs[0] != epochs[1]
        assert len(seeds) == len(set(seeds))  # no two blocks are mixed alike
        assert sorted(loader.epoch for loader in loaders) == [1] * world


def test_the_order_depends_on_seed_and_epoch_alone():
    first = numbers(ResumableLoader(Numbers(50), 5, seed=1))
    assert numbers(ResumableLoader(Numbers(50), 5, seed=1)) == first
    several = ResumableLoader(Numbers(50), 5, seed=1, num_workers=2)
    assert numbers(several) == first
    once = ResumableLoader(Numbers(50), 5, seed=1)
    assert [numbers(once), numbers(once)][1] == numbers(several)  # the second epoch
    assert numbers(ResumableLoader(Numbers(50), 5, seed=2)) != first
    torch.manual_seed(99)
    assert numbers(ResumableLoader(Numbers(50), 5, seed=1)) == first


def test_what_a_used_loader_goes_on_with():
    expected = ResumableLoader(Numbers(20), 2, seed=4)
    epochs = [numbers(expected) for _ in range(3)]
    loader = ResumableLoader(Numbers(20), 2, seed=4)
    for _ in zip(range(3), loader, strict=False):
        pass
    assert numbers(loader) == epochs[1]  # an epoch that was left is not continued
    loader.load_state_dict({**loader.state_dict(), "epoch": 2, "position": 7})
    assert numbers(loader) == epochs[2][7:]


def test_workers_live_through_epochs_until_the_end():
    class Processes(Numbers):
        """Image i is filled with the worker's process."""

        def __getitem__(self, index: int):
            return torch.full((3, 1, 1), torch.utils.data.get_worker_info().seed), index

    loader = ResumableLoader(Processes(12), 4, num_workers=2)
    made = []
    original = loader._read_from
    loader._read_from = lambda *at: made.append(at) or original(*at)
    seeds = [batch for _ in range(3) for batch in numbers(loader)]
    assert made == [(0, 0)]
    assert len(seeds) == 9
    assert len(set(seeds)) == 2
    loader.close()
    assert len(list(loader)) == 3  # goes on all the same
    assert made == [(0, 0), (3, 0)]


def test_reading_leaves_the_global_random_state_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    list(ResumableLoader(Numbers(20), 5, num_workers=1))
    list(image_batches(Numbers(20), 5, num_workers=1))
    assert torch.equal(torch.get_rng_state(), before)


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(12, 40),
    b=st.integers(1, 4),
    parts=st.integers(0, 4),
    world=st.integers(1, 3),
    rank=st.integers(0, 2),
    stop=st.integers(0, 100),
    seed=st.integers(0, 5),
)
def test_resumed_at_the_very_next_batch(n, b, parts, world, rank, stop, seed):
    def fresh() -> ResumableLoader:
        return ResumableLoader(
            Numbers(n),
            b,
            seed=seed,
            shuffle_images=parts * b,
            rank=rank % world,
            world_size=world,
        )

    def stream(loader, count):
        """`count` batches over as many epochs as it takes, stopping as Lightning does: after the
        last batch that was asked for, within the loop."""
        out = []
        while len(out) < count:
            iterator = iter(loader)
            while loader.position < len(loader) and len(out) < count:
                out += numbers([next(iterator)])
        return out

    total = 2 * len(fresh()) + 3
    stop = min(stop, total)
    whole = stream(fresh(), total)
    first = fresh()
    beginning = stream(first, stop)
    second = fresh()
    second.load_state_dict(first.state_dict())
    assert beginning + stream(second, total - stop) == whole


def test_another_streams_position_is_refused():
    state = ResumableLoader(Numbers(30), 4).state_dict()
    for other in (
        ResumableLoader(Numbers(31), 4),
        ResumableLoader(Numbers(30), 5),
        ResumableLoader(Numbers(30), 4, seed=1),
        ResumableLoader(Numbers(30), 4, world_size=2),
        ResumableLoader(Numbers(30), 4, shuffle_images=8),
    ):
        with pytest.raises(ValueError, match="the checkpoint's stream of images has"):
            other.load_state_dict(state)
    ResumableLoader(Numbers(30), 4, num_workers=2, shuffle_images=4).load_state_dict(state)


@pytest.mark.parametrize(
    ("n", "batch_size", "options", "message"),
    [
        (7, 4, {"world_size": 2}, "fewer than one step's 8"),
        (70, 4, {"shuffle_images": 6}, "a multiple of batch_size=4"),
        (7, 0, {}, "batch_size=0"),
        (7, 1, {"num_workers": -1}, "num_workers=-1"),
    ],
)
def test_invalid_sizes_are_refused(n, batch_size, options, message):
    with pytest.raises(ValueError, match=message):
        ResumableLoader(Numbers(n), batch_size, **options)


def test_evaluation_reads_in_the_given_order_and_keeps_the_rest():
    found = list(image_batches(Numbers(10), 4, indices=[9, 1, 5, 3, 0, 2]))
    assert [len(i) for i, _, _ in found] == [4, 2]
    assert [x for _, _, indices in found for x in indices.tolist()] == [9, 1, 5, 3, 0, 2]
    assert [x for images, _, _ in found for x in images[:, 0, 0, 0].tolist()] == [9, 1, 5, 3, 0, 2]
    assert sum(len(i) for i, _, _ in image_batches(Numbers(10), 4, num_workers=2)) == 10
    (_, labels, indices), *_ = image_batches(Numbers(10), 2, indices=torch.tensor([7, 3]))
    assert labels.tolist() == indices.tolist() == [7, 3]
    assert list(image_batches(Numbers(10), 4, indices=[])) == []


def test_a_dataset_that_reads_many_at_once_is_asked_so():
    class Many(Numbers):
        def __getitem__(self, index: int):
            raise AssertionError("asked for one")

        def __getitems__(self, indices: list[int]):
            return [Numbers.__getitem__(self, index) for index in indices]

    found = [indices.tolist() for _, _, indices in image_batches(Many(6), 4)]
    assert found == [[0, 1, 2, 3], [4, 5]]


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
        return ImageList(tmp_path, files, labels, files, image_size=4, on_bad_image=on_bad_image)

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


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_are_replaced_in_training(partly_bad, caplog, workers):
    loader = ResumableLoader(partly_bad("skip"), 5, num_workers=workers)
    iterator = iter(loader)  # asked for as many as there are, and no further, as Lightning does
    batches = numbers(next(iterator) for _ in range(len(loader)))
    assert [len(b) for b in batches] == [5, 5]
    assert sorted(chain(*batches)) == [0, 0, 1, 3, 3, 4, 5, 6, 7, 8]
    assert "2 images could not be read and were replaced by the next" in caplog.text
    caplog.clear()
    loader.close()
    assert not caplog.text  # said once


def test_skipped_images_are_reported_when_a_training_ends_within_an_epoch(partly_bad, caplog):
    loader = ResumableLoader(partly_bad("skip"), 1)
    for _ in zip(range(9), loader, strict=False):
        pass
    assert not caplog.text
    loader.close()
    assert "could not be read and were replaced by the next" in caplog.text


def test_resumed_where_images_are_skipped(partly_bad):
    whole = numbers(ResumableLoader(partly_bad("skip"), 2))
    for stop in range(1, 5):
        first = ResumableLoader(partly_bad("skip"), 2)
        beginning = numbers(images for images, _ in zip(first, range(stop), strict=False))
        second = ResumableLoader(partly_bad("skip"), 2)
        state = first.state_dict()
        # `zip` asks for one more than it gives.
        second.load_state_dict({**state, "position": stop})
        assert beginning + numbers(second) == whole


def test_a_training_set_of_bad_images_only_is_refused(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    dataset = ImageList(tmp_path, ["a.png"], [0], ["a"], image_size=4, on_bad_image="skip")
    with pytest.raises(BadImageError, match="no image that can be read"):
        list(ResumableLoader(dataset, 1))
    assert list(image_batches(dataset, 1)) == []


class TellsToLeave(Numbers):
    """Its workers are sent what a cluster sends to each process of a job."""

    def __getitem__(self, index: int):
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR2)
        return super().__getitem__(index)


def test_workers_leave_signals_to_a_parent_that_answers():
    numbers = (signal.SIGTERM, signal.SIGUSR2)
    before = [signal.signal(number, lambda *_: os._exit(3)) for number in numbers]
    try:
        batches = read_batches(TellsToLeave(6), [[0, 1, 2], [3, 4, 5]], num_workers=1)
        assert [labels.tolist() for _, labels, *_ in batches] == [[0, 1, 2], [3, 4, 5]]
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
