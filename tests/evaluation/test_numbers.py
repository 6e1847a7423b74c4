"""The record of each number, and the names that it once had."""

import subprocess
import sys
from pathlib import Path

from clipsae.evaluation.metrics import METRICS, NUMBERS
from clipsae.evaluation.numbers import Number, current_names


def test_keys_and_the_papers_columns_are_each_there_once():
    assert len({n.key for n in NUMBERS}) == len(NUMBERS)
    assert sorted(n.paper for n in NUMBERS if n.paper and not n.key.endswith("_dense")) == sorted(
        ("l0", "fvu", "cs", "cknna", "do", "mean_ms", "max_ms")
    )
    for n in NUMBERS:
        assert format(0.5, n.format)
        assert n.better in ("max", "min", "")


def test_results_of_0_1_are_read_with_the_right_meaning():
    old = {"l0": 0.99, "active": 32.0, "l0_dense": 0.5, "active_dense": 512.0, "fvu": 0.1}
    new = {"zero_fraction": 0.99, "l0": 32.0, "zero_fraction_dense": 0.5, "l0_dense": 512.0}
    assert current_names(old) == {**new, "fvu": 0.1}
    assert current_names(new) == new
    assert current_names({"patch_coverage": 0.5, "image_absorption": 0.25}) == {
        "patch_concepts_found": 0.5,
        "image_merging": 0.25,
    }
    now = {"patch_merging": 0.5, "patch_absorption": 0.25}
    assert current_names(now) == now


def test_a_number_is_shown_beside_what_others_reach():
    values = {"found": 0.58, "found_random": 0.0, "found_untrained": 0.004, "found_probe": 0.879}
    number = Number("found", "found", format=".1%", floor="found_untrained", ceiling="found_probe")
    assert number.shown(values) == "58.0% (random 0.0%, untrained 0.4%, probe 87.9%)"
    assert number.shown({"found": 0.58}) == "58.0%"
    assert Number("found", "found", format=".1%").shown(values) == "58.0%"


def test_floors_and_ceilings_are_numbers_of_the_same_metric():
    for metric in METRICS:
        keys = {number.key for number in METRICS[metric].numbers}
        for number in METRICS[metric].numbers:
            assert {number.floor, number.ceiling} - {""} <= keys


def test_the_documentation_defines_each_headline_number():
    page = (Path(__file__).parents[2] / "docs" / "explanation" / "numbers.md").read_text()
    assert [n.key for n in NUMBERS if n.headline and f"`{n.key}`" not in page] == []


def test_the_record_needs_no_torch():
    code = "import sys, clipsae.evaluation.numbers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
