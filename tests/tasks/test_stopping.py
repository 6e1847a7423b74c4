"""The jobs of `hydra/launcher=many_cores` end with the command that has started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")

LAUNCHER = """
import signal, sys, time
from pathlib import Path
from clipsae.tasks.sweep import Job
from hydra_plugins.clipsae_launchers import submitit as launchers

folder = Path(sys.argv[1])

def work(launcher, overrides, *rest):
    name = overrides[0][0]
    if name == "step":  # as Lightning does it; the step takes too long
        signal.signal(signal.SIGTERM, lambda *signalled: launcher._stop(*signalled))
    (folder / f"{name}.begun").touch()
    try:
        while True:
            time.sleep(60)
    finally:
        (folder / f"{name}.ended").touch()

class Launcher(launchers.ManyCores):
    def _work(self, *args):
        # The real one, but for what it runs.
        launchers._Awaited.__call__ = work
        launchers.STOP_SECONDS = 2
        return super().__call__(*args)

    def __call__(self, *args):
        return self._work(*args)

launcher = Launcher(submitit_folder=str(folder / "jobs" / "%j"), timeout_min=1)
jobs = [Job(name, [i], [i], [[name]]) for i, name in enumerate(("plain", "step"))]
with launcher._awaiting(jobs):
    launcher._submit(jobs, 0)
    while True:
        time.sleep(60)
"""


def alive(group: int) -> list[str]:
    """The processes of a group."""
    listed = subprocess.run(
        ["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True
    )
    found = [line.split(maxsplit=2) for line in listed.stdout.splitlines()]
    return [args for pgid, stat, args in found if int(pgid) == group and "Z" not in stat]


@pytest.mark.parametrize(("number", "to"), [("SIGTERM", "one"), ("SIGINT", "group")])
def test_a_signal_to_the_command_ends_its_jobs(tmp_path, number, to):
    """As `kill` sends it, to the command alone, and as a terminal does, to all of them."""
    script = tmp_path / "launch.py"
    script.write_text(LAUNCHER)
    command = subprocess.Popen([sys.executable, script, tmp_path], start_new_session=True)
    names = {"plain", "step"}
    try:
        end = time.monotonic() + 120
        while {path.stem for path in tmp_path.glob("*.begun")} != names:
            assert command.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)
        assert len(alive(command.pid)) == 5  # and submitit's process beside each job
        (os.kill if to == "one" else os.killpg)(command.pid, signal.Signals[number])
        assert command.wait(60) == 128 + signal.Signals[number]
        assert alive(command.pid) == []
        # The other one was ended by force.
        assert [path.stem for path in Path(tmp_path).glob("*.ended")] == ["plain"]
    finally:
        if alive(command.pid):
            os.killpg(command.pid, signal.SIGKILL)
        command.wait()
