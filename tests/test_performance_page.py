"""The command that makes docs/performance.md, at toy sizes: what it says, not how fast it was."""

import json

import pytest
import torch
from PIL import Image

from tests.benchmarks import performance, plain
from tests.benchmarks.crossing import equal_at
from tests.benchmarks.setup import Setup, Sizes, options_of, prepared

TITLES = {  # of what is measured on a CPU
    "steps": "A training step",
    "costs": "What each variant costs",
    "growth": "How it grows",
    "memory": "Memory",
    "evaluation": "Evaluation",
    "features": "Images a second of each source",
}


@pytest.fixture(autouse=True)
def own_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_part_is_measured_and_one_alone_leaves_the_others(tmp_path):
    performance.main(["--quick", "--threads", "1", "--out", str(tmp_path)])
    first = json.loads((tmp_path / "performance.json").read_text())["sections"]
    page = (tmp_path / "performance.md").read_text()
    assert list(first) == list(TITLES)
    assert all(f"\n## {title}\n" in page for title in TITLES.values())
    for row in first["steps"]["values"]:
        ours, plain = row["ours"]["rounds"], row["plain"]["rounds"]
        assert row["plain"]["ratio"] == pytest.approx(plain[0] / ours[0])
    dense, sparse = first["steps"]["values"]
    assert dense["active"] == pytest.approx(0.5, abs=0.1)
    assert sparse["active"] == pytest.approx(0.02, abs=0.01)
    for row in first["costs"]["values"]:
        assert row["l0"] == 32
        assert row["ours"]["ratio"] == pytest.approx(
            row["ours"]["seconds"] / row["topk"]["seconds"]
        )
    assert "| topk, `nested_k=[8, 16, 32]` | 32 | " in page
    assert first["memory"]["values"][0]["peak_gb"] > 0.05
    found = first["evaluation"]["values"]
    assert found["equal_settings"] == found["settings"] == 7

    performance.main(["--quick", "--threads", "1", "--out", str(tmp_path), "--only", "growth"])
    second = json.loads((tmp_path / "performance.json").read_text())["sections"]
    assert second["growth"] != first["growth"]
    assert {**second, "growth": None} == {**first, "growth": None}
    assert all(
        f"\n## {title}\n" in (tmp_path / "performance.md").read_text() for title in TITLES.values()
    )


def test_crossing_and_feeding_are_measured_and_a_gpu_has_a_page_of_its_own(tmp_path):
    words = ["--quick", "--threads", "1", "--out", str(tmp_path), "--only", "steps"]
    performance.main([*words, "crossing", "feeding"])
    content = json.loads((tmp_path / "performance.json").read_text())
    found = {name: part["values"] for name, part in content["sections"].items()}
    assert {row["precision"] for row in found["steps"]} == {"float32"}
    few, many = found["crossing"]["rows"]
    assert (few["active"], many["active"]) == pytest.approx((0.02, 0.3), rel=0.01)
    rates = found["feeding"]["rates"]
    assert set(rates) == {"tokens", "images"}
    assert min(rate for of in rates.values() for rate in of.values()) > 0
    assert found["feeding"]["minutes"] == pytest.approx(81920 * 32 / rates["tokens"]["step"] / 60)
    content["sections"]["steps"]["about"]["device"] = "cuda"
    page = performance.page(content, "performance-gpu")
    assert page.startswith("# Speed on a GPU\n")
    assert "](performance-gpu.json)" in page
    assert "| relu, as initialised | float32 |" in page
    assert " TFLOP/s in float32." in page
    assert "performance.py --device cuda --images PHOTOS" in page


def test_dense_and_sparse_steps_are_equal_between_two_shares():
    ratios = [(0.1, 1.5), (0.2, 1.25), (0.3, 0.75), (0.4, 0.5)]
    assert equal_at(ratios) == pytest.approx(0.25)
    assert equal_at(ratios[:2]) is None
    assert equal_at(ratios[2:]) is None


def test_what_more_cores_give_is_reckoned_from_one(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(64):
        Image.new("RGB", (70, 80), (i, 0, 0)).save(photos / f"{i}.png")
    words = ["--quick", "--only", "features", "--threads", "1", "--images", str(photos)]
    performance.main([*words, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "performance.json").read_text())
    rates = found["sections"]["features"]["values"]["rates"]
    assert set(rates) == {"photos, 0 workers", "scenes"} | {
        f"{kind} {where}" for kind in ("images", "tokens") for where in ("in memory", "on disk")
    }
    assert min(rates.values()) > 0
    page = (tmp_path / "performance.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    for name, factors in (("photos", (1, 8, 16, 64)), ("tokens in memory", (1, 1, 1, 1))):
        rate = rates["photos, 0 workers" if name == "photos" else name]
        (row,) = [row for row in rows if row[0] == f"| {name}"]
        assert row[1:5] == [f"{rate * factor:,.0f}" for factor in factors]


RECIPES = [name for name, _ in Sizes().step_rows]


@pytest.mark.parametrize("name", sorted(set(RECIPES)))
def test_the_plain_form_is_of_the_same_step(name):
    sizes = Sizes(d=16, latents=256, tokens=20)
    setup = Setup(sizes=sizes, threads=1)
    options = options_of(name, sizes.latents) | {"auxk": 0.0}
    sae, x = prepared(options, 0.05 if "k" not in options else None, setup)
    form = plain._FORMS[sae.config["activation"]]
    parameters = {n.rsplit(".")[-1]: p for n, p in sae.named_parameters()}
    expected = form(parameters, x[0], sae.config)
    assert expected.item() > 0
    torch.testing.assert_close(sae(x).loss, expected)


DOCS = performance.ROOT / "docs"


@pytest.mark.skipif(not (DOCS / "performance.json").exists(), reason="not measured yet")
def test_the_page_in_docs_is_made_from_the_numbers_beside_it():
    content = json.loads((DOCS / "performance.json").read_text())
    assert (DOCS / "performance.md").read_text() == performance.page(content)
