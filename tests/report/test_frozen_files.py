"""The files of a report over a made-up store, text for text as they were.

`frozen/` holds them: of the page without the plots, and one of its tables; of the cells the first.
To write them again, after a change that is meant to show:
python -m tests.report.test_frozen_files
"""

import re
import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
from matplotlib.figure import Figure

from clipsae.report import write_report
from tests.report.conftest import METRICS, FakeStore

FROZEN = Path(__file__).with_name("frozen")
FILES = (
    "index.html",
    "tables.md",
    "missing.md",
    "cells.csv",
    "tables/table_08_dtd.tex",
    "tables/table_08_dtd.csv",
)
PAPER = ("no_sae", "on_1", "on_5", "on_10", "on_50", "on_all")
DATASETS = ("dtd", "imagenet", "scenes", "my <b>&_50%")
RECOVERY = ("concepts_found", "auroc", "f1", "purity", "splitting", "merging")
MODELS = ("relu", "topk", "sparsemax", "attention_relu", "mine")


def written(root: Path) -> dict[str, str]:
    """A report with everything that it can have: seeds, k, settings that differ, gaps, metrics."""
    store = FakeStore(root)
    for at, dataset in enumerate(DATASETS):
        for rank, model in enumerate(MODELS):
            if (rank + at) % 5 == 4:
                continue
            for seed in (0, 1) if at % 2 else (0,):
                for k in (8, 16, 32) if model == "topk" else (None,):
                    low = 10.0 * rank + at + 2 * seed + (k or 0) / 8
                    accuracy = {c: min(99.0, low + 9 * i) for i, c in enumerate(PAPER)}
                    accuracy |= {"no_sae": 70.0 + at, "off_5": 30.0 - rank, "self_5": 4.0 + rank}
                    l0 = float(k or 12 + rank)
                    metrics = METRICS | {
                        "l0": l0,
                        "zero_fraction": 1 - l0 / 128,
                        "fvu": 0.3 - 0.02 * rank - (k or 0) / 400,
                    }
                    more = {"k": k, "seed": seed, "metrics": metrics}
                    store.evaluation(model, dataset, accuracy, **more)
    for model, k in (("relu", None), ("topk", 8), ("sparsemax", None)):
        values = dict(METRICS) | {
            f"{name}_dense": 0.5 + value / 10 for name, value in METRICS.items()
        }
        values |= {
            "cknna": 0.25,
            "decoder_orthogonality": 0.0013,
            "monosemanticity_mean": 0.35,
            "monosemanticity_max": 0.7,
            "monosemanticity_live": 100.0,
        }
        store.measurement(model, "imagenet", values, k=k)
    recovered = {
        f"{level}_{name}": 0.1 + at / 7
        for level in ("patch", "image")
        for at, name in enumerate(RECOVERY)
    }
    store.measurement("sparsemax", "scenes", {"cknna": 0.5, **recovered}, image_encoder=None)
    ms = {"monosemanticity_mean": 0.3, "monosemanticity_max": 0.6}
    for pooling in ("mean", "max"):
        store.measurement("relu", "scenes", ms, pooling=pooling)
    store.evaluation("relu", "dtd", {"no_sae": 70.0, "on_5": 12.5, "on_all": 51.0}, max_steps=3)
    # What is measured depends on no protocol: it would count.
    heldout = {"no_sae": 1.0, "on_5": 1.0}
    store.evaluation("relu", "dtd", heldout, protocol="heldout", metrics={})
    store.evaluation("relu", "imagenet", {"on_5": 33.0}, finished=900)
    broken = store.evaluation("gated", "dtd", {"on_5": 1.0})
    (broken / "results.csv").write_text("nothing")
    with patch.object(Figure, "draw_without_rendering", lambda _: None):
        report = store.report(datasets=DATASETS)
    with patch.object(Figure, "savefig", drawn):
        folder = write_report(report, store.root / "report").parent
    texts = {name: (folder / name).read_text() for name in FILES}
    page = texts["index.html"]
    page = re.sub(r"<style>.*?</style>|<script>.*?</script>", "", page, flags=re.DOTALL)
    page = re.sub(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC", "now", page).replace(str(root), "root")
    first, figure, rest = page.partition('<figure class="table" id="table_08_dtd">')
    rest = re.sub(r'<figure class="table".*?</figure>', "<figure></figure>", rest, flags=re.DOTALL)
    first = re.sub(
        r'<figure class="table".*?</figure>', "<figure></figure>", first, flags=re.DOTALL
    )
    texts["index.html"] = first + figure + rest
    texts["cells.csv"] = "".join(texts["cells.csv"].splitlines(keepends=True)[:60])
    return texts


def drawn(figure: Figure, file, format: str, **options) -> None:
    if format == "svg":
        file.write("<svg></svg>")
    else:
        file.touch()


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_the_report_is_as_it_was(files, name):
    assert files[name] == (FROZEN / name).read_text()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    return written(tmp_path_factory.mktemp("store"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        for file, text in written(Path(root)).items():
            (FROZEN / file).parent.mkdir(parents=True, exist_ok=True)
            (FROZEN / file).write_text(text)
