"""How fast a GPU is; nothing is asserted of it. The page has each figure beside its goal."""

from dataclasses import replace

import pytest
import torch

from tests.benchmarks.feeding import measure_feeding
from tests.benchmarks.passes import measure_evaluation
from tests.gpu import speed

GOALS_MS = {"sparsemax": 5, "topk": 4, "batch_topk": 4}
TIMES_SAELENS = 10
GOAL_MINUTES = 8
STEPS = [
    *(("relu", 0.004), ("jumprelu", 0.004), ("gated", 0.004), ("topk", None)),
    *(("batch_topk", None), ("sparsemax", 0.0016), ("sparsemax", 0.007), ("sparsemax", 0.021)),
    *(("attention_relu", 0.004), ("linear_sparsemax", 0.007)),
]


@pytest.fixture(scope="module")
def gb_s(page, paper):
    found = speed.bandwidth(paper.device)
    page.section("The card")("memory, by a copy of 1 GB", f"{found:,.0f} GB/s")
    return found


@pytest.fixture(scope="module")
def tflop_s(page, paper):
    add, found = page.section("The card"), {}
    for precision in ("float32", "tf32", "bf16"):
        setup = replace(paper, precision=precision)
        setup.apply()
        found[precision] = speed.product_rate(setup)
        add(f"scores of all tokens, {precision}", f"{found[precision]:,.0f} TFLOP/s")
    return found


@pytest.mark.parametrize("share", [0.0016, 0.007])
def test_the_share_of_the_roofline_of_each_operation(share, paper, page, gb_s):
    add = page.section(
        f"Operations at {100 * share:.2f} % active, predicted from the bytes that they move (rows "
        "that stay in the L2 cache can make one faster)"
    )
    for one in speed.operations(paper, share):
        least = 1e3 * one.gigabytes / gb_s
        add(
            f"{one.name}, {one.pairs:,} pairs",
            f"{one.ms:.3f} ms, {one.rate:,.0f} GB/s, {100 * one.rate / gb_s:.0f} % of the copy's",
            f"{least:.3f} ms",
        )


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize(("recipe", "density"), STEPS)
def test_steps(recipe, density, precision, paper, page, gb_s, tflop_s):
    setup = replace(paper, precision=precision)
    setup.apply()
    try:
        found = speed.steps(recipe, density, setup)
    except torch.cuda.OutOfMemoryError as error:
        pytest.skip(str(error).splitlines()[0])
    pairs = found["active"] * setup.sizes.tokens * setup.sizes.latents
    least = speed.least_ms(setup, pairs, int(found["parameters"]), gb_s, tflop_s[precision])
    goal = f"goal on an H100 {GOALS_MS[recipe]} ms; " if recipe in GOALS_MS else ""
    add = page.section(f"Steps of {setup.sizes.tokens:,} tokens in {precision}")
    name = f"{recipe}, {100 * found['active']:.2f} % active"
    kinds = ", ".join(f"{kind} {found[kind]:.2f}" for kind in ("sparse", "dense"))
    add(
        name,
        f"{found['as shipped']:.2f} ms ({kinds}), {found['peak GB']:.1f} GB",
        f"{goal}at least {least:.2f} ms, by its bytes and one product",
    )
    if "SAELens" in found:
        ratio = found["SAELens"] / found["as shipped"]
        goal = f"{TIMES_SAELENS} x" if recipe == "topk" else ""
        add(f"{name}: SAELens", f"{found['SAELens']:.2f} ms, {ratio:.1f} x ours", goal)


def test_a_training_is_fed_from_a_cache(paper, page):
    setup = replace(paper, sizes=replace(paper.sizes, rounds=3, workers=()))
    setup.apply()
    found = measure_feeding(setup, print)
    add = page.section("Feeding: images a second, 197 tokens each")
    for source, rates in found["rates"].items():
        add(source, f"{rates['alone']:,.0f} read alone, {rates['step']:,.0f} with TopK's step")
    goal = f"< {GOAL_MINUTES} on an H100"
    add(f"minutes for {found['steps']:,} steps from tokens", f"{found['minutes']:.1f}", goal)


def test_evaluations(paper, page):
    setup = replace(paper, sizes=replace(paper.sizes, images=64, rounds=2))
    setup.apply()
    found = measure_evaluation(setup, print)
    add = page.section("Evaluation on ViT-B/16 with random weights, milliseconds an image")
    add("top-n classification", f"{1e3 * found['ours']:.2f}")
    add("the plain protocol", f"{1e3 * found['plain']:.2f}, {found['ratio']:.1f} x ours")
    add("equal settings", f"{found['equal_settings']} of {found['settings']}")
