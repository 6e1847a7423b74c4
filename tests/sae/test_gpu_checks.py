"""What the GPU tests check, here at toy sizes on the CPU with the kernels in Triton's interpreter:
that they pass, and that they would fail."""

from dataclasses import replace

import pytest
import torch

from clipsae.sae import SAE
from clipsae.sae.engine import gpu
from clipsae.sae.engine.gpu import GPU
from tests.benchmarks.setup import QUICK, Setup, Sizes
from tests.gpu import checks, speed, test_gpu_numbers, test_gpu_speed
from tests.gpu.page import Page
from tests.waits import hide_the_interpreter

if torch.cuda.is_available():
    pytest.skip("tests/gpu runs these there", allow_module_level=True)

ON_CUDA = pytest.mark.usefixtures("interpreted", "as_on_cuda")
TOY = Setup(sizes=Sizes(d=8, latents=20, tokens=3), threads=1)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(gpu, "BLOCK", 16)
    monkeypatch.setattr(gpu, "ROOM", 4)
    monkeypatch.setattr(checks, "SHARE", 0.1)
    topk = checks.CHANGES["topk"] | {"k": 3, "auxk_k": 2}
    monkeypatch.setitem(checks.CHANGES, "topk", topk)
    monkeypatch.setattr(speed, "WARM_UP", 1)
    monkeypatch.setattr(speed, "ROUNDS", 1)


def worst(recipe: str, sparse: bool, dtype: torch.dtype) -> float:
    found = checks.two_steps(recipe, TOY, sparse=sparse, dtype=dtype)
    errors = checks.errors(found, checks.right_steps(recipe, TOY))
    assert "gradient of architecture.W_dec" in errors or "gradient of architecture.C" in errors
    return max(errors.values())


@ON_CUDA
def test_steps_against_float64(monkeypatch):
    assert worst("sparsemax", True, torch.float64) < 1e-12
    assert 1e-12 < worst("topk", False, torch.float32) < 1e-5
    sample = GPU.sample
    monkeypatch.setattr(GPU, "sample", lambda *args: 1.001 * sample(*args))
    assert worst("topk", True, torch.float64) > 1e-4


@ON_CUDA
def test_pairs_and_products_against_the_formulas(monkeypatch):
    scores = checks.random_scores(3, 70, "cpu")
    assert set(checks.wrong_pairs(scores, 4).values()) == {0}
    assert max(checks.product_errors(scores.double(), 4, 5).values()) < 1e-13
    above, mix = GPU.above, GPU.mix
    monkeypatch.setattr(GPU, "above", lambda s, floor: above(s, floor + 0.5))
    assert checks.wrong_pairs(scores, 4)["above"] > 0
    monkeypatch.setattr(GPU, "mix", lambda codes, rows: mix(codes, rows.roll(1, dims=0)))
    assert checks.product_errors(scores, 4, 5)["mix"] > 0.1


@ON_CUDA
def test_two_runs():
    states = [checks.states("relu", TOY, steps=1, sparse=True) for _ in range(2)]
    assert checks.differing(*states) == []
    states[1]["architecture.W_enc"][0, 0].mul_(1 + 1e-6)
    assert checks.differing(*states) == ["architecture.W_enc"]
    more = checks.states("relu", TOY, steps=2, sparse=False)
    assert "architecture.W_dec" in checks.differing(states[0], more)


@ON_CUDA
def test_steps_without_a_wait(monkeypatch):
    hide_the_interpreter(monkeypatch)
    checks.steps_without_a_wait("sparsemax", TOY, steps=2, sparse=True)
    checks.steps_without_a_wait("topk", TOY, steps=2, sparse=False)
    monkeypatch.setattr(SAE, "after_step", lambda self: self.tokens_since_fired.max().item())
    with pytest.raises(RuntimeError, match="the host would wait for"):
        checks.steps_without_a_wait("relu", TOY, steps=1, sparse=False)


def test_evaluations_agree():
    first, second = checks.evaluations("cpu", latents=24, images=8)
    assert checks.agreement(first, second) == {"equal predictions": 1.0, "metrics": 0.0}
    key = next(iter(second.predictions))
    second.predictions[key] = second.predictions[key] + 1
    second.metrics[0]["value"] *= 1.5
    found = checks.agreement(first, second)
    assert found["equal predictions"] == pytest.approx(1 - 1 / len(first.predictions))
    assert found["metrics"] == pytest.approx(0.5)


@ON_CUDA
def test_operations_are_timed_and_their_bytes_counted():
    found = {one.name: one for one in speed.operations(TOY, 0.1)}
    n, m, d = 3, 20, 8
    assert len(found) == 11
    assert min(one.ms for one in found.values()) > 0
    largest = found["find the k largest of each"]
    assert (largest.pairs, largest.gigabytes) == (6, (2 * 4 * n * m + 28 * 6) / 1e9)
    mix = found["mix"]
    assert 0 < mix.pairs < n * m / 4
    assert mix.gigabytes == (mix.pairs * (4 * d + 12) + 4 * n * d) / 1e9
    assert mix.rate == pytest.approx(1e3 * mix.gigabytes / mix.ms)
    assert 0 < found["find above sparsemax's threshold"].pairs < n * m / 4


def test_what_a_step_takes_at_least():
    setup = replace(TOY, sizes=replace(TOY.sizes, tokens=6304, latents=49152, d=768))
    # 6,304 x 49,152 scores three times at 1,000 GB/s, and 476 GFLOP at 100 TFLOP/s.
    assert speed.least_ms(setup, 0, 0, 1000, 100) == pytest.approx(3.718 + 4.759, rel=1e-3)
    assert speed.bandwidth("cpu", megabytes=1) > 0


@ON_CUDA
def test_what_the_gpu_tests_say(monkeypatch):
    page = Page()
    monkeypatch.setattr(test_gpu_numbers, "K", 4)
    monkeypatch.setattr(test_gpu_numbers, "DTYPES", [torch.float32])
    test_gpu_numbers.test_the_kernels_choose_the_formulas_pairs(torch.float64, TOY, page)
    test_gpu_numbers.test_the_kernels_products_are_dense_ones(torch.float32, TOY, page)
    test_gpu_numbers.test_steps_are_those_of_float64_on_the_cpu("relu", TOY, page)
    rates = {"tf32": 1.0}
    test_gpu_speed.test_the_share_of_the_roofline_of_each_operation(0.1, TOY, page, 100.0)
    test_gpu_speed.test_steps("sparsemax", 0.1, "tf32", TOY, page, 100.0, rates)
    rows = [row for rows in page.sections.values() for row in rows]
    assert len(rows) == 5 + 5 + 4 + 11 + 1
    assert all(len(row) == 3 and row[1] for row in rows)
    (step,) = page.sections["Steps of 3 tokens in tf32"]
    assert "goal on an H100 5 ms" in step[2]


def test_what_the_gpu_tests_say_of_feeding_and_evaluation():
    page = Page()
    setup = Setup(sizes=replace(QUICK, latents=64, cache_images=32, images=2), threads=1)
    test_gpu_speed.test_a_training_is_fed_from_a_cache(setup, page)
    test_gpu_speed.test_evaluations(setup, page)
    assert [len(rows) for rows in page.sections.values()] == [3, 3]


def test_the_page(tmp_path):
    page = Page()
    page.section("Steps")("topk", "3.10 ms", "4 ms")
    page.section("The card")("memory", "2,500 GB/s")
    page.section("Steps")("relu", "5.00 ms")
    text = page.write(tmp_path / "outputs" / "gpu.md", "A card.", "1 passed")
    assert (tmp_path / "outputs" / "gpu.md").read_text() == text
    assert "## Steps\n\n|  | found | goal or prediction |\n| --- | --- | --- |\n" in text
    assert "| topk | 3.10 ms | 4 ms |\n| relu | 5.00 ms |  |\n\n## The card" in text
