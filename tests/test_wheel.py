"""The wheel, built and installed as a user has it: its command works from any folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from run import ROOT

TINY = [
    "model.latents=64",
    "trainer.max_steps=2",
    "trainer.limit_val_batches=1",
    "features.batch_size=4",
    "dataset.size=16",
    "measurement=none",
    "logger=none",
]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with the wheel in it, and nothing of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    for command in (build, [*install, "--target", folder / "site"]):
        wheels = [] if command is build else list(folder.glob("*.whl"))
        done = subprocess.run(
            [sys.executable, *command, *wheels], capture_output=True, text=True, cwd=folder
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


@pytest.fixture
def clipsae(site, tmp_path):
    """Runs the command in an empty folder; returns what it printed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CLIPSAE_")}
    environment["PYTHONPATH"] = str(site)

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, site / "bin" / "clipsae", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert str(ROOT) not in done.stdout
        return done.stdout

    return run


def test_it_holds_the_package_with_all_its_files_and_every_config(site):
    def files(folder: Path) -> set[str]:
        found = (p for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc")
        return {str(p.relative_to(folder)) for p in found}

    configs = {f"{name}/{file}" for name in ("conf", "sweeps") for file in files(ROOT / name)}
    assert files(site / "clipsae") == files(ROOT / "src" / "clipsae") | configs
    assert files(site / "hydra_plugins") == files(ROOT / "src" / "hydra_plugins")
    (licence,) = site.glob("clipsae-*.dist-info/licenses/LICENSE")
    assert licence.read_text() == (ROOT / "LICENSE").read_text()


def test_help_lists_the_choices_and_writes_nothing(clipsae, tmp_path):
    assert "batch_topk" in clipsae("--help")
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_composes(clipsae):
    said = clipsae("sweeps=demo", "--cfg", "all", "--package", "hydra.sweeper")
    assert "relu,jumprelu,gated,topk,batch_topk,sparsemax" in said


@pytest.mark.slow
def test_a_run_keeps_its_work_in_the_current_folder_and_status_finds_it(clipsae, tmp_path):
    said = clipsae("model=topk", "model.k=4", *TINY)
    assert "all 64" in said
    (sae,) = (tmp_path / "outputs" / "sae").iterdir()
    assert str(sae) in said
    assert [p.name for p in tmp_path.iterdir()] == ["outputs"]
    said = clipsae("task=status")
    assert "topk" in said
    assert "done" in said
