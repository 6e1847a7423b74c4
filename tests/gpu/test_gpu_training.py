"""Training on a GPU: the same bits again, no wait of the host, after a kill, and with NCCL."""

from pathlib import Path

import pytest

from tests.gpu import checks
from tests.gpu.checks import RECIPES
from tests.training.test_no_waits import train_without_waits
from tests.training.test_resume import job, kill_and_continue, weights
from tests.warm import run_py

WAYS = pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
STEPS = 20
# So many latents that products are sparse.
ON_GPU = ["trainer.accelerator=gpu", "model.latents=8192"]


@WAYS
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_runs_are_equal_bit_for_bit(recipe, sparse, paper, page):
    first, second = (checks.states(recipe, paper, steps=5, sparse=sparse) for _ in range(2))
    different = checks.differing(first, second)
    add = page.section("Two runs of five steps: tensors that differ in a bit")
    add(f"{recipe}, {'sparse' if sparse else 'dense'}", ", ".join(different) or "none", "none")
    assert not different


@WAYS
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_host_waits_in_no_step(recipe, sparse, paper, page):
    checks.steps_without_a_wait(recipe, paper, steps=STEPS, sparse=sparse)
    add = page.section(f"{STEPS} steps under set_sync_debug_mode('error')")
    add(f"{recipe}, {'sparse' if sparse else 'dense'}", "no wait", "no wait")


@WAYS
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_host_waits_in_no_step_of_a_trainer(recipe, sparse, tmp_path, page):
    train_without_waits(recipe, tmp_path, "cuda", 1.0 if sparse else 0.0)
    add = page.section("Lightning's steps under set_sync_debug_mode('error')")
    add(f"{recipe}, {'sparse' if sparse else 'dense'}", "no wait", "no wait")


def test_killed_and_continued_equals_undisturbed(tmp_path, page):
    kill_and_continue(tmp_path, *ON_GPU, "model.k=8")
    page.section("Whole runs")("BatchTopK, killed twice and continued", "same bytes", "same bytes")


def whole_run(folder: Path, model: str, *more: str) -> None:
    words = [word for word in job(folder, *more) if not word.startswith(("model=", "model.thr"))]
    run_py(*words, f"model={model}", check=True)


@pytest.mark.parametrize("model", ["batch_topk", "sparsemax"])
def test_one_process_of_nccl_is_none(model, tmp_path, page):
    for name, more in (("alone", []), ("nccl", ["trainer=ddp", "trainer.devices=1"])):
        whole_run(tmp_path / name, model, *ON_GPU, *more)
    assert weights(tmp_path / "nccl") == weights(tmp_path / "alone")
    page.section("Whole runs")(f"{model}, one process of NCCL", "same bytes", "same bytes")
