"""Runs that are killed at random moments of one stage and continued end with the same bytes as an
undisturbed run.

Configs are composed once; each run is `run_task` in a fork.
"""

import contextlib
import json
import logging
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from clipsae.store import MARK, find_damage
from clipsae.tasks import run_task
from run import ROOT
from tests.warm import fork

CACHE = [
    "logger=none",
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
    "measurement.sample_images=4",
]
KINDS = ("features", "sae", "classifier", "evaluation")
# What is killed -> the kinds of stages in which, the last of them in the end; overrides.
WORK = {
    "cache": (("shards", "features"), ["task=cache", *CACHE]),
    "training": (("sae",), ALL),
    "checkpoint": (("sae",), [*ALL, "callbacks.checkpoint_every_n_steps=1"]),
    "evaluation": (("evaluation",), ALL),
}


def composed(folder: Path, overrides: list[str]) -> DictConfig:
    places = [f"paths.output_dir={folder}", f"hydra.runtime.output_dir={folder}"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", [*places, *overrides], return_hydra_config=True)


def start(folder: Path, cfg: DictConfig) -> int:
    """Run a config in a process of its own; returns its number."""
    if (pid := os.fork()) == 0:
        status = 1
        with contextlib.suppress(BaseException):
            log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            logging.basicConfig(level=logging.INFO)
            HydraConfig.instance().set_config(cfg)
            with open_dict(cfg):
                del cfg["hydra"]
            run_task(cfg)
            status = 0
        os._exit(status)
    return pid


def finished(folder: Path, kind: str) -> list[Path]:
    return [mark.parent for mark in folder.glob(f"{kind}/[!.]*/{MARK}")]


def is_made(folder: Path, kinds: tuple[str, ...]) -> bool:
    """Whether a stage is in the making."""
    with contextlib.suppress(FileNotFoundError):  # gone in the meantime
        return any(any(folder.glob(f"{kind}/.*.partial/*/staging")) for kind in kinds)
    return False


def content(folder: Path) -> dict[str, bytes]:
    """The files of a finished stage, without its seal, its paths and its speed."""
    found = {file.name: file.read_bytes() for file in folder.iterdir()}
    for name in (MARK, "config.yaml"):
        found.pop(name, None)
    if "training.json" in found:
        numbers = json.loads(found["training.json"])
        numbers.pop("train/tokens_per_second", None)
        found["training.json"] = json.dumps(numbers, sort_keys=True).encode()
    return found


def differences(folder: Path, whole: Path, kind: str) -> Iterator[str]:
    """What is damaged in a folder of finished stages, or not as in the undisturbed run."""
    for path in finished(folder, kind):
        if wrong := find_damage(path):
            yield f"{path}: {wrong}"
            continue
        found, expected = content(path), content(whole / kind / path.name)
        for name in found.keys() | expected.keys():
            if found.get(name) != expected.get(name):
                yield f"{path}/{name} differs"


class Killer:
    """Kills one kind of work several times.

    Args:
        folder: of everything.
        choose: the moments.
    """

    def __init__(self, folder: Path, choose: random.Random) -> None:
        self.folder = folder
        self.choose = choose
        self.whole = folder / "whole"
        self.wrong: list[str] = []
        self.seconds = self._measure()

    def _measure(self) -> dict[tuple[str, ...], float]:
        """How long each kind of work takes in an undisturbed run."""
        pid, seen = start(self.whole, composed(self.whole, ALL)), {}
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            for kinds, _ in WORK.values():
                if is_made(self.whole, kinds):
                    first, _ = seen.get(kinds, (time.monotonic(), 0))
                    seen[kinds] = first, time.monotonic()
            time.sleep(0.002)
        assert ended[1] == 0, Path(f"{self.whole}.log").read_text()
        return {kinds: last - first for kinds, (first, last) in seen.items()}

    def kill(self, what: str, times: int) -> int:
        """Returns how many of the killed runs were continued from a checkpoint."""
        kinds, overrides = WORK[what]
        folder = self.folder / what
        cfg = composed(folder, overrides)
        for kind in KINDS:  # all is there but what is killed
            if kind not in kinds and what != "cache":
                shutil.copytree(self.whole / kind, folder / kind)
        killed = 0
        while killed < times:
            pid = start(folder, cfg)
            if self._strike(pid, what, folder, kinds):
                killed += 1
            else:  # too late
                self.seconds[kinds] *= 0.8
            for kind in KINDS:
                self.wrong += differences(folder, self.whole, kind)
            for path in finished(folder, kinds[-1]):  # once more
                shutil.rmtree(path)
        os.waitpid(start(folder, cfg), 0)
        self.wrong += differences(folder, self.whole, kinds[-1])
        printed = Path(f"{folder}.log").read_text()
        if "Traceback" in printed or not finished(folder, kinds[-1]):
            self.wrong.append(f"{what}: {printed}")
        return printed.count("continuing the training")

    def _strike(self, pid: int, what: str, folder: Path, kinds: tuple[str, ...]) -> bool:
        """Whether the process was killed in the work it should be killed in."""
        moments: list[tuple[Callable[[], bool], float]]
        moments = [(lambda: is_made(folder, kinds), self.seconds[kinds])]
        if what == "checkpoint":  # while one is written
            moments.append((lambda: any(folder.glob("sae/.*/*/scratch/last.tmp")), 0.006))
        for begun, seconds in moments:
            while not begun():
                if os.waitpid(pid, os.WNOHANG)[0]:
                    return False
                time.sleep(0.0005)
            time.sleep(self.choose.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return is_made(folder, kinds) and not finished(folder, kinds[-1])


def kill_all(folder: str, times: str, seed: str) -> None:
    """Print, for each kind of work, how many killed runs went on from a checkpoint; then what is
    wrong."""
    killer = Killer(Path(folder), random.Random(seed))
    for what in WORK:
        print(what, killer.kill(what, int(times)))
    for line in dict.fromkeys(killer.wrong):
        print("WRONG", line)


@pytest.mark.slow
def test_killed_many_times_at_random_moments_it_ends_with_the_same_bytes(tmp_path):
    times, seed = 26 // len(WORK), random.randrange(1000)
    done = fork(kill_all, str(tmp_path), str(times), str(seed))
    assert done.returncode == 0, done.stderr
    assert "WRONG" not in done.stdout, f"seed {seed}: {done.stdout}"
    continued = dict(line.split() for line in done.stdout.splitlines())
    assert set(continued) == set(WORK)
    assert int(continued["checkpoint"]) + int(continued["training"]) > 0
