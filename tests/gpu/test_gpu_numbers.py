"""The GPU's numbers are those of float64 on the CPU, at the paper's width and M."""

from dataclasses import replace

import pytest
import torch

from tests.gpu import checks
from tests.gpu.checks import RECIPES

DTYPES = [torch.float32, torch.float64]
# In float32 a rounded score may pass another threshold: one of some thousand pairs.
ALLOWED = {torch.float32: 2e-2, torch.float64: 1e-9}
K = 32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernels_choose_the_formulas_pairs(dtype, few, page):
    add = page.section(f"Pairs that are chosen otherwise than by the formula, scores in {dtype}")
    scores = checks.random_scores(few.sizes.tokens, few.sizes.latents, few.device).to(dtype)
    found = checks.wrong_pairs(scores, K)
    for name, wrong in found.items():
        add(name, str(wrong), "0")
    assert not any(found.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernels_products_are_dense_ones(dtype, few, page):
    add = page.section(f"Products in {dtype}: relative difference from float64 on the CPU")
    scores = checks.random_scores(few.sizes.tokens, few.sizes.latents, few.device).to(dtype)
    found = checks.product_errors(scores, K, few.sizes.d)
    allowed = 1e-5 if dtype == torch.float32 else 1e-13
    for name, error in found.items():
        add(name, f"{error:.1e}", f"< {allowed:.0e}")
    assert max(found.values()) < allowed


@pytest.mark.parametrize("recipe", RECIPES)
def test_steps_are_those_of_float64_on_the_cpu(recipe, few, page):
    add = page.section("Forward, losses, gradients, statistics of two steps: the largest error")
    right = checks.right_steps(recipe, few)
    wrong = []
    for dtype in DTYPES:
        for sparse in (True, False):
            found = checks.errors(checks.two_steps(recipe, few, sparse=sparse, dtype=dtype), right)
            worst = max(found, key=lambda name: found[name])
            way = f"{recipe}, {'sparse' if sparse else 'dense'}, {dtype}"
            add(way, f"{found[worst]:.1e} ({worst})", f"< {ALLOWED[dtype]:.0e}")
            wrong += [f"{way}: {n} {e:.1e}" for n, e in found.items() if not e < ALLOWED[dtype]]
    for precision in ("tf32", "bf16"):
        setup = replace(few, precision=precision)
        setup.apply()
        found = checks.errors(checks.two_steps(recipe, setup, sparse=True), right)
        shown = ", ".join(f"{found[name]:.1e} ({name})" for name in ("reconstruction", "codes"))
        add(f"{recipe}, sparse, {precision}", shown)
        wrong += [f"{recipe}, {precision}: {n} {e}" for n, e in found.items() if not e < torch.inf]
    assert not wrong


def test_an_evaluation_is_the_cpus(page):
    add = page.section("Evaluation against the CPU's")
    found = checks.agreement(*checks.evaluations("cuda", latents=2048, images=400))
    add("equal predictions", f"{100 * found['equal predictions']:.2f} %", "99.5 % or more")
    add("metrics, largest relative difference", f"{found['metrics']:.1e}", "< 1e-02")
    assert found["equal predictions"] >= 0.995
    assert found["metrics"] < 1e-2
