"""W&B lost in the middle: the work goes on, and what is missing lies on disk."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("wandb_server.py")


@pytest.mark.slow
def test_a_lost_server_or_process_of_wandb_stops_nothing(tmp_path):
    runs = {}
    for case in ("server", "core"):
        command = [sys.executable, str(SCRIPT), str(tmp_path / case), case]
        runs[case] = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    for case, process in runs.items():
        said, _ = process.communicate(timeout=200)
        assert process.returncode == 0, said
        assert "online" in said.splitlines(), said
        assert "done" in said.splitlines(), said
        assert "the work goes on" in said or "sends what is missing" in said
        assert list((tmp_path / case).glob("wandb/run-*-r1/*.wandb"))
