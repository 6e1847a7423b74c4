"""The benchmark as a user runs it, on toy data in the real layouts: one multirun, one report."""

import os

import pytest

from tests.data.published.toys import BUILDERS
from tests.warm import run_py


@pytest.mark.slow
def test_one_multirun_and_one_report_over_data_in_the_real_layouts(tmp_path):
    for name in ("imagenet", "dtd", "eurosat"):
        BUILDERS[name](tmp_path / "data", "coop")
    environment = {**os.environ, "CLIPSAE_DATA": str(tmp_path / "data")}

    def run(*overrides: str) -> str:
        options = [f"paths.output_dir={tmp_path / 'out'}", "logger=none", "model.latents=128"]
        done = run_py(*overrides, *options, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said = run(
        "sweeps=benchmark",
        "clip=tiny",
        "model=topk",
        "dataset=dtd,eurosat",
        "++train_dataset.templates=dataset",  # one for 1,000 classes: 80 take a minute
        "features.batch_size=4",
        "trainer.max_steps=6",
        "measurement.sample_tokens=200",
        "measurement.sample_images=4",
    )
    assert said.count("training topk-clipsae-tiny-imagenet") == 1
    said = run("task=report", "clip=tiny", "model=topk")
    assert "2 of 66 pairs of a model and a dataset have results" in " ".join(said.split())
    page = (tmp_path / "out" / "report" / "index.html").read_text()
    assert "Table 8" in page
    assert "15.372" in page  # the published on_5 of TopK on DTD
    missing = (tmp_path / "out" / "report" / "missing.md").read_text()
    assert "dataset=ucf101" in missing
