"""The next batch is enqueued before this one is handed out, on a stream that the step waits for.
CUDA's part is played by a stand-in that notes what is asked of it."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from clipsae.data.loader import ResumableLoader
from clipsae.data.prefetch import prefetched
from tests.data.counting import Numbers


class Gpu:
    """Streams whose operations are noted in `calls`, with the names of the streams."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.made = 0
        self.main = self.now = self.stream("main")

    def stream(self, name: str) -> SimpleNamespace:
        def record_event() -> str:
            self.made += 1
            return f"made {self.made}"

        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: self.calls.append((name, "waits for", other.name)),
            wait_event=lambda event: self.calls.append((name, "waits for", event)),
            record_event=record_event,
        )

    @contextmanager
    def inside(self, stream):
        before, self.now = self.now, stream
        yield
        self.now = before


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: gpu.stream("side"))
    monkeypatch.setattr(torch.cuda, "stream", gpu.inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpu.now)
    monkeypatch.setattr(
        torch.Tensor,
        "record_stream",
        lambda batch, stream: gpu.calls.append((int(batch.sum()), "is used by", stream.name)),
    )
    return gpu


def test_batches_are_made_beside_the_step_before(gpu):
    def batches():
        for i in range(1, 4):
            gpu.calls.append((gpu.now.name, "makes", i))
            yield torch.tensor(i)

    for batch in prefetched(batches(), torch.device("cuda")):
        gpu.calls.append((gpu.now.name, "steps on", int(batch)))
    expected = [("side", "waits for", "main"), ("side", "makes", 1)]
    for i in (1, 2, 3):
        expected += [("side", "makes", i + 1)] if i < 3 else []
        expected += [("main", "waits for", f"made {i}"), (i, "is used by", "main")]
        expected += [("main", "steps on", i)]
    assert gpu.calls == expected


def test_an_error_is_raised_when_its_batch_is_due(gpu):
    def batches():
        yield torch.tensor(1)
        raise OSError("no such file")

    found = prefetched(batches(), torch.device("cuda"))
    assert int(next(found)) == 1
    with pytest.raises(OSError, match="no such file"):
        next(found)


def test_the_position_counts_what_was_handed_out(gpu):
    """Wherever it is left, within an epoch or at its end, the next loader goes on exactly there."""

    def loader() -> ResumableLoader:
        return ResumableLoader(
            Numbers(14),
            2,
            seed=1,
            prefetch=lambda batches: prefetched(batches, torch.device("cuda")),
        )

    def images(batches) -> list[list[int]]:
        return [batch[:, 0, 0, 0].tolist() for batch in batches]

    plain, ahead = ResumableLoader(Numbers(14), 2, seed=1), loader()
    whole = [*images(plain), *images(plain)]
    assert whole == [*images(ahead), *images(ahead)]
    for stop in range(1, 14):
        first, found = loader(), []
        while len(found) < stop:
            for batch in first:
                found += images([batch])
                if len(found) == stop:
                    break
        rest = loader()
        rest.load_state_dict(first.state_dict())
        while len(found) < len(whole):
            found += images(rest)
        assert found == whole


def test_closing_ends_what_was_read_ahead(gpu):
    ended = []

    def batches(*_):
        try:
            while True:
                yield torch.tensor(0)
        finally:
            ended.append(True)

    loader = ResumableLoader(
        Numbers(8), 2, prefetch=lambda made: prefetched(made, torch.device("cuda"))
    )
    loader._read_from = batches
    iterator = iter(loader)
    next(iterator)
    assert not ended
    loader.close()
    assert ended
