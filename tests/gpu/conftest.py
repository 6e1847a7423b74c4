"""Tests that need a CUDA device: without one all are skipped. With one, they end with a page of
what they found, which is also written to outputs/gpu.md."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.benchmarks.setup import Setup, Sizes
from tests.gpu.page import Page, card

ROOT = Path(__file__).resolve().parents[2]
PAGE = pytest.StashKey[Page]()
NEEDED = 22.0  # GB, for the paper's sizes
if torch.cuda.is_available():
    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported


def pytest_configure(config: pytest.Config) -> None:
    config.stash[PAGE] = Page()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    page = terminalreporter.config.stash[PAGE]
    if not page.sections:
        return
    counts = ((kind, len(terminalreporter.getreports(kind))) for kind in ("passed", "failed"))
    outcome = ", ".join(f"{count} {kind}" for kind, count in counts)
    file = ROOT / "outputs" / "gpu.md"
    terminalreporter.write_line("")
    terminalreporter.write(page.write(file, card(), f"Tests: {outcome}."))
    terminalreporter.write_line(f"(also in {file})")


@pytest.fixture(scope="session")
def page(pytestconfig: pytest.Config) -> Page:
    return pytestconfig.stash[PAGE]


@pytest.fixture(autouse=True)
def compiled() -> None:
    """The kernels themselves, not Triton's interpreter."""
    from triton import JITFunction

    from clipsae.sae.engine import kernels

    if not isinstance(kernels.mix, JITFunction):
        pytest.fail("Triton was imported with TRITON_INTERPRET: run `python -m pytest tests/gpu`")


@pytest.fixture(autouse=True)
def own_state(few: Setup) -> Iterator[None]:
    """A test begins in float32, and what it leaves in memory is not counted in the next one's."""
    few.apply()
    yield
    torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def few() -> Setup:
    """The paper's width and M, and as many tokens as the CPU takes in float64."""
    return Setup(sizes=replace(Sizes(), tokens=48), threads=torch.get_num_threads(), device="cuda")


@pytest.fixture(scope="session")
def paper(page: Page) -> Setup:
    """The paper's step; on a small card, fewer tokens."""
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9
    tokens = int(Sizes().memory_tokens * min(1.0, memory / NEEDED))
    add = page.section("Sizes of what was timed")
    sizes = replace(Sizes(), tokens=tokens)
    add("d, M, tokens", f"{sizes.d}, {sizes.latents:,}, {sizes.tokens:,}", "768, 49,152, 6,304")
    return Setup(sizes=sizes, threads=torch.get_num_threads(), device="cuda", precision="tf32")
