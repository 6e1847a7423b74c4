"""Whatever real runs are doing when they are killed, the same command ends with the same bytes."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from run import ROOT


@pytest.mark.slow
def test_killed_fifty_times_at_random_moments_it_ends_with_the_same_bytes(tmp_path):
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    script, seed = Path(__file__).with_name("killing.py"), str(random.randrange(1000))
    done = subprocess.run(
        [sys.executable, script, tmp_path / "all", "52", seed],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert "WRONG" not in done.stdout, f"{done.args}: {done.stdout}"
    told = {
        what: (int(kills), int(on)) for what, kills, on in map(str.split, done.stdout.splitlines())
    }
    assert set(told) == {"cache", "training", "checkpoint", "evaluation"}
    assert sum(kills for kills, _ in told.values()) == 52
    # Some went on from a checkpoint.
    assert told["checkpoint"][1] + told["training"][1] > 0
