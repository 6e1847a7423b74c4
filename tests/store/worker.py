"""A process that makes one stage of a store: a small training whose every step depends on the one
before, with checkpoints. Prints what it logs, and in the end the folder.

It runs without pytest: `python worker.py ROOT [options]`.
"""

import argparse
import hashlib
import json
import logging
import os
import platform
import sys
import time
from pathlib import Path

from clipsae.store import Stage, Store, put_checkpoint, whole_checkpoint

EVERY = 4  # steps between checkpoints


def stage_of(root: Path, number: int = 0, **options) -> Stage:
    about = {"model": "fake", "dataset": "none", "k": None, "seed": number}
    return Store(root, **options).stage("sae", ["fake"], {"n": number}, about)


def expected(number: int, steps: int) -> str:
    """What an undisturbed training ends with."""
    state = hashlib.sha256(str(number).encode()).hexdigest()
    for step in range(steps):
        state = advance(state, step)
    return state


def advance(state: str, step: int) -> str:
    return hashlib.sha256(f"{state} {step}".encode()).hexdigest()


def train(stage: Stage, folder: Path, *, number: int, steps: int, pause: float, log: Path) -> None:
    """The build. Appends "pid first-step" to `log` when it begins and "pid done" when it ends."""
    checkpoint = whole_checkpoint(stage.scratch / "last.ckpt")
    step, state = 0, hashlib.sha256(str(number).encode()).hexdigest()
    if checkpoint:
        step, state = json.loads(checkpoint.read_text())
    note(log, step)
    for at in range(step, steps):
        state = advance(state, at)
        stage.progress(at + 1, steps)
        if (at + 1) % EVERY == 0:
            aside = stage.scratch / "last.tmp"
            aside.write_text(json.dumps([at + 1, state]))
            put_checkpoint(aside, stage.scratch / "last.ckpt", at + 1)
        time.sleep(pause)
    (folder / "plots").mkdir()
    (folder / "plots" / "curve.txt").write_text(state[::-1])
    (folder / "state.txt").write_text(state)
    note(log, "done")


def note(log: Path, word: object) -> None:
    with log.open("a") as file:
        file.write(f"{os.getpid()} {word}\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--pause", type=float, default=0.01)
    parser.add_argument("--beat", type=float, default=0.1)
    parser.add_argument("--dead-after", type=float, default=30.0)
    parser.add_argument("--no-wait", action="store_true")
    parser.add_argument("--host")
    parser.add_argument("--gate", type=Path, help="begin when this file appears")
    parser.add_argument("--clock", type=float, default=0.0, help="jumps by so many seconds, often")
    parser.add_argument("--rank", type=int, default=0)
    args = parser.parse_args()
    if args.host:
        platform.node = lambda: args.host
    if args.clock:
        real, began = time.time, time.monotonic()
        time.time = lambda: real() + args.clock * (int((time.monotonic() - began) * 10) % 2)
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    stage = stage_of(args.root, beat=args.beat, dead_after=args.dead_after)
    print("ready", flush=True)
    while args.gate and not args.gate.exists():
        time.sleep(0.001)
    log = args.root.with_suffix(".log")

    def build(folder: Path) -> None:
        if args.rank == 0:
            options = {"steps": args.steps, "pause": args.pause}
            train(stage, folder, number=0, log=log, **options)
        else:
            note(log, f"rank {args.rank} in {folder.parent.name}")

    print(stage.make(build, wait=not args.no_wait, rank=args.rank), flush=True)


if __name__ == "__main__":
    main()
