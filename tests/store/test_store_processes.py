"""Several processes, real signals: one makes, the others wait, what dies is continued."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from worker import expected, stage_of

STEPS = 40


def checkpoint(root: Path) -> bool:
    return any(root.glob("sae/.*/*/scratch/last.ckpt"))


def builds(root: Path) -> list[list[str]]:
    """What the workers' builds noted: [pid, first step or "done"]."""
    return [line.split() for line in root.with_suffix(".log").read_text().splitlines()]


def result(root: Path) -> str:
    stage = stage_of(root)
    stage.verify()
    assert [p.name for p in (root / "sae").iterdir()] == [stage.path.name]
    return (stage.path / "state.txt").read_text()


def said(process: subprocess.Popen) -> str:
    return process.communicate(timeout=60)[0]


@pytest.mark.parametrize("hosts", [(), ("--host", "other")], ids=["one host", "two hosts"])
def test_two_that_ask_for_one_stage_one_makes_it_and_the_other_waits(root, start, until, hosts):
    first = start("--steps", STEPS)
    until(lambda: checkpoint(root))
    second = start("--steps", STEPS, *hosts)
    words = said(second)
    assert "waiting for fake-" in words
    assert f"process {first.pid}" in words
    assert f"of {STEPS}" in words or "since" in words
    assert words.count("waiting") == 1
    assert words.splitlines()[-1] == said(first).splitlines()[-1]
    assert builds(root) == [[str(first.pid), "0"], [str(first.pid), "done"]]
    assert result(root) == expected(0, STEPS)


@pytest.mark.parametrize("host", ["", "other"], ids=["same host", "other host"])
def test_a_killed_owner_is_taken_over_from_its_checkpoint(root, start, until, host):
    first = start("--steps", STEPS, *(("--host", host) if host else ()))
    until(lambda: checkpoint(root))
    # On the same host death is known at once, however long the time after which it is assumed.
    second = start("--steps", STEPS, "--dead-after", 4 if host else 10_000)
    until(lambda: "waiting" in second.stdout.readline())
    first.kill()
    assert said(second).splitlines()[-1] == str(stage_of(root).path)
    (pid, step), done = builds(root)[1:]
    assert (pid, done) == (str(second.pid), [str(second.pid), "done"])
    assert int(step) > 0
    assert result(root) == expected(0, STEPS)


def test_an_owner_that_stood_still_gives_up_and_uses_what_the_other_made(root, start, until):
    first = start("--steps", STEPS, "--host", "other")
    until(lambda: checkpoint(root))
    first.send_signal(signal.SIGSTOP)
    second = start("--steps", STEPS, "--dead-after", 0.5)
    said(second)
    finished = stage_of(root).path.stat().st_ino
    first.send_signal(signal.SIGCONT)
    words = said(first)
    assert first.returncode == 0
    assert "taken over by another process" in words
    assert [word for _, word in builds(root)].count("done") == 1
    assert stage_of(root).path.stat().st_ino == finished
    assert result(root) == expected(0, STEPS)


@pytest.mark.parametrize("left", [True, False], ids=["a dead owner", "nothing"])
def test_of_five_that_begin_at_once_one_makes_it(root, start, until, left):
    if left:
        first = start("--steps", STEPS)
        until(lambda: checkpoint(root))
        first.kill()
    gate = root.with_name("gate")
    five = [start("--steps", STEPS, "--pause", 0, "--gate", gate) for _ in range(5)]
    for process in five:
        assert process.stdout.readline() == "ready\n"
    gate.touch()
    assert {said(process).splitlines()[-1] for process in five} == {str(stage_of(root).path)}
    assert len(builds(root)) == 2 + left  # one's start and end, and the start of the dead one
    assert result(root) == expected(0, STEPS)


def test_clocks_that_jump_by_a_day_change_nothing(root, start, until):
    first = start("--steps", STEPS, "--clock", 86_400, "--dead-after", 10, "--host", "other")
    until(lambda: checkpoint(root))
    second = start("--steps", STEPS, "--clock", -86_400, "--dead-after", 10)
    said(first), said(second)
    assert len(builds(root)) == 2
    assert result(root) == expected(0, STEPS)


def test_who_does_not_wait_is_told_in_one_sentence(root, start, until):
    first = start("--steps", 1000, "--host", "other")
    until(lambda: checkpoint(root))
    words = said(start("--no-wait")).splitlines()[-1]
    assert words.startswith("clipsae.store.stage.Busy")
    assert f"is being made by other (process {first.pid}) since" in words
    # A dead one is no reason to skip.
    first.kill()
    said(start("--no-wait", "--dead-after", 0.5, "--steps", 1000, "--pause", 0))
    assert stage_of(root).finished


def test_ctrl_c_ends_the_owner_and_the_one_who_waits(root, start, until):
    first = start("--steps", 400)
    until(lambda: checkpoint(root))
    second = start("--steps", 400)
    until(lambda: "waiting" in second.stdout.readline())
    for process in (second, first):
        process.send_signal(signal.SIGINT)
        assert said(process).splitlines()[-1] == "KeyboardInterrupt"
    assert [folder.name for folder in stage_of(root).partial.iterdir()] == ["free"]
    third = start("--steps", 400, "--pause", 0)
    said(third)
    assert int(builds(root)[1][1]) > 0
    assert result(root) == expected(0, 400)


def test_the_ranks_of_one_run_make_it_together(root, start, until):
    env = {**os.environ, "TORCHELASTIC_RUN_ID": "x", "MASTER_PORT": "1234"}
    second = start("--rank", 1, env=env)
    first = start("--steps", STEPS, env=env)
    assert said(first).splitlines()[-1] == said(second).splitlines()[-1]
    notes = builds(root)
    assert [str(second.pid), "rank", "1"] in [note[:3] for note in notes]
    assert [word for pid, word, *_ in notes if pid == str(first.pid)] == ["0", "done"]


TORTURE = """
import os, random, signal, sys, time
from pathlib import Path
from clipsae.store import find_damage
from worker import expected, stage_of, train

root, kills, reader = Path(sys.argv[1]), int(sys.argv[2]), os.getpid()
choose = random.Random(int(sys.argv[3]))
log = root.with_suffix(".log")
make = lambda n: (lambda s: s.make(
    lambda folder: train(s, folder, number=n, steps=20, pause=0, log=log)))(stage_of(root, n))

def forked(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid

def read():  # whatever is in place is whole, at any time
    while True:
        for path in root.glob("sae/[!.]*"):
            if wrong := find_damage(path):
                print(path, wrong, flush=True)

watcher = forked(read)
number = done = 0
while done < kills:
    child = forked(lambda: make(number))
    time.sleep(choose.uniform(0, 0.15))
    os.kill(child, signal.SIGKILL)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    done += killed
    if stage_of(root, number).finished:
        number += 1
make(number)
os.kill(watcher, signal.SIGKILL)
for n in range(number + 1):
    stage_of(root, n).verify()
    if (stage_of(root, n).path / "state.txt").read_text() != expected(n, 20):
        print(n, "has another result")
print("stages", number + 1)
"""


def test_killed_fifty_times_at_random_moments_it_ends_with_the_same_result(root):
    done = subprocess.run(
        [sys.executable, "-c", TORTURE, str(root), "50", str(random.randrange(1000))],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([".", *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert not rest, done.stdout
    assert first.startswith("stages")
    began = [step for _, step in builds(root) if step != "done"]
    assert any(int(step) > 0 for step in began)  # some were continued
    assert len(list(root.glob("sae/[!.]*"))) == int(first.split()[1])
