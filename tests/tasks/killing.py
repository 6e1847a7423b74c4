"""Kills real runs at random moments of one stage, continues them, and compares what they end with.

killing.py FOLDER KILLS SEED: prints what differs from an undisturbed run, and in the end for each
kind of work how often it was killed and how often it went on from a checkpoint.

One process imports what a run needs; each run is `run.py` in a fork of it, which costs a fraction
of a second instead of eight.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import clipsae.tasks.cache
import clipsae.tasks.experiment  # noqa: F401
import run
from clipsae.store import MARK, find_damage

CACHE = [
    "features.num_workers=0",
    "+train_dataset.size=90",
    "features.cache.shard_gb=0.0004",  # five shards
    "features.block_images=4",
    "features.buffer_images=32",
]
ALL = [
    *CACHE,
    "features=cached",
    "features.batch_size=4",
    "model=batch_topk",  # thresholds, counters of dead latents, projected gradients: much to keep
    "model.latents=256",
    "model.threshold_start_step=5",
    "model.dead_after=3000",
    "trainer.max_steps=40",
    "trainer.log_every_n_steps=10",
    "trainer.val_check_interval=20",
    "trainer.limit_val_batches=1",
    "callbacks.progress_bar=false",
    "callbacks.checkpoint_every_n_steps=5",
    "dataset=scenes_colour",
    "dataset.size=60",
    "evaluation.settings=[no_sae,on]",
]
KINDS = ("features", "sae", "classifier", "evaluation")
# What is killed -> the kinds whose unfinished folder shows that it is being made, the overrides.
WORK = {
    "cache": (("shards", "features"), ["task=cache", *CACHE]),
    "training": (("sae",), ALL),
    "checkpoint": (("sae",), [*ALL, "callbacks.checkpoint_every_n_steps=1"]),
    "evaluation": (("evaluation",), ALL),
}


def start(folder: Path, overrides: list[str]) -> int:
    """`run.py` in a process of its own; its number."""
    if (pid := os.fork()) == 0:
        status = 1
        with contextlib.suppress(BaseException):
            log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.argv = ["run.py", f"paths.output_dir={folder}", "logger=none", *overrides]
            try:
                run.main()
                status = 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
        os._exit(status)
    return pid


def finished(folder: Path, kind: str) -> list[Path]:
    return [mark.parent for mark in folder.glob(f"{kind}/[!.]*/{MARK}")]


def being_made(folder: Path, kinds: tuple[str, ...]) -> bool:
    try:
        return any(any(folder.glob(f"{kind}/.*.partial/*/staging")) for kind in kinds)
    except FileNotFoundError:  # gone while it was looked at
        return False


def content(folder: Path) -> dict[str, bytes]:
    """What a finished stage holds, without its seal, its paths and its speed."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name == "training.json":
            numbers = json.loads(path.read_text())
            numbers.pop("train/tokens_per_second", None)
            found[path.name] = json.dumps(numbers, sort_keys=True).encode()
        elif path.name not in (MARK, "config.yaml"):
            found[path.name] = path.read_bytes()
    return found


def differences(folder: Path, whole: Path, kind: str) -> Iterator[str]:
    """What is damaged in a folder of finished stages, or not as in the undisturbed run."""
    for path in finished(folder, kind):
        if wrong := find_damage(path):
            yield f"{path}: {wrong}"
            continue
        expected = content(whole / kind / path.name)
        for name, value in content(path).items():
            if value != expected.pop(name, None):
                yield f"{path}/{name} differs"
        yield from (f"{path}/{name} is missing" for name in expected)


class Killer:
    """Kills one kind of work so many times.

    Args:
        folder: where all happens.
        seconds: what an undisturbed run took for each kind.
        choose: the moments.
    """

    def __init__(
        self, folder: Path, seconds: dict[tuple[str, ...], float], choose: random.Random
    ) -> None:
        self.folder = folder
        self.seconds = seconds
        self.choose = choose
        self.wrong: list[str] = []

    def kill(self, what: str, times: int) -> int:
        """How many of the killed were continued from a checkpoint."""
        kinds, overrides = WORK[what]
        folder, whole = self.folder / what, self.folder / "whole"
        for kind in KINDS:  # all is there but what is killed
            if kind not in kinds and what != "cache":
                shutil.copytree(whole / kind, folder / kind)
        killed = 0
        while killed < times:
            pid = start(folder, overrides)
            if self._strike(pid, what, folder, kinds):
                killed += 1
            else:  # too late
                self.seconds[kinds] *= 0.8
            for kind in KINDS:
                self.wrong += differences(folder, whole, kind)
            for path in finished(folder, kinds[-1]):  # once more
                shutil.rmtree(path)
        os.waitpid(start(folder, overrides), 0)
        self.wrong += differences(folder, whole, kinds[-1])
        said = Path(f"{folder}.log").read_text()
        if "Traceback" in said or not finished(folder, kinds[-1]):
            self.wrong.append(f"{what}: {said}")
        return said.count("continuing the training")

    def _strike(self, pid: int, what: str, folder: Path, kinds: tuple[str, ...]) -> bool:
        """Whether the process was killed while it made what it should be killed in."""
        writing = lambda: any(folder.glob("sae/.*/*/scratch/last.tmp"))  # noqa: E731
        moments = [(lambda: being_made(folder, kinds), self.seconds[kinds])]
        if what == "checkpoint":
            moments.append((writing, 0.006))
        for begun, seconds in moments:
            while not begun():
                if os.waitpid(pid, os.WNOHANG)[0]:
                    return False
                time.sleep(0.0005)
            time.sleep(self.choose.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return being_made(folder, kinds) and not finished(folder, kinds[-1])


def seconds_of(pid: int, folder: Path) -> dict[tuple[str, ...], float]:
    """For how long each kind of work is being made by an undisturbed run."""
    seen = {}
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        for kinds, _ in WORK.values():
            if being_made(folder, kinds):
                first, _ = seen.get(kinds, (time.monotonic(), 0))
                seen[kinds] = first, time.monotonic()
        time.sleep(0.002)
    assert ended[1] == 0, Path(f"{folder}.log").read_text()
    return {kinds: last - first for kinds, (first, last) in seen.items()}


def main(folder: Path, kills: int, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / "whole"
    killer = Killer(folder, seconds_of(start(whole, ALL), whole), random.Random(seed))
    for what in WORK:
        continued = killer.kill(what, kills // len(WORK))
        print(what, kills // len(WORK), continued, flush=True)
    for line in dict.fromkeys(killer.wrong):
        print("WRONG", line, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
