"""Real processes on one store."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def start(root: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a worker on the store; what still runs in the end is killed."""
    started = []

    def start(*options: object, **more) -> subprocess.Popen:
        command = [sys.executable, str(WORKER), str(root), *map(str, options)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def until() -> Callable[[Callable[[], object]], object]:
    """Waits for something to become true, and fails where it never does."""

    def until(happens: Callable[[], object]) -> object:
        end = time.monotonic() + 60
        while not (found := happens()):
            assert time.monotonic() < end, "it never happened"
            time.sleep(0.005)
        return found

    return until
