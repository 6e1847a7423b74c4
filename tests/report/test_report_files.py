"""The report's files and what is said in them; `test_frozen_files.py` has their texts."""

import io
import json
import xml.etree.ElementTree as ET

from rich.console import Console

from clipsae.report import Commands, write_report
from clipsae.report.findings import findings
from clipsae.report.missing import missing_cells
from clipsae.report.plots import k_plot
from clipsae.report.table import MINUS, latex, number
from clipsae.report.tables import average_table
from clipsae.report.write import inline_svg
from clipsae.tasks.report import in_parts


def test_numbers_have_a_real_minus_and_zero_has_no_sign():
    assert number(-0.2501, 2, signed=True) == f"{MINUS}0.25"
    assert number(0.2, 2, signed=True) == "+0.20"
    assert number(-0.001, 2, signed=True) == "0.00"
    assert number(float("nan"), 2) == number(None, 2) == ""


def test_latex_is_escaped():
    assert latex("$5 #1 & {x}~^\\² 100 % of on_5") == (
        r"\$5 \#1 \& \{x\}\textasciitilde{}\textasciicircum{}\textbackslash{}\textsuperscript{2} "
        r"100 \% of on\_5"
    )


def test_a_narrow_terminal_cuts_no_figure(store):
    datasets = [f"dataset_{i}" for i in range(3)]
    for i, dataset in enumerate(datasets):
        accuracy = {f"on_{n}": 33.25 + n + i for n in (1, 5, 10, 20, 50)}
        store.evaluation("sparsemax", dataset, accuracy)
        store.evaluation("sparsemax", dataset, {"on_5": 1.25 + i}, max_steps=3)
    table = average_table(store.selection(), tuple(datasets), "average", "datasets")
    figures = [cell.ours for row in table.rows for cell in row.cells.values()]
    for width in (40, 60, 80, 200):
        console = Console(width=width, file=io.StringIO())
        for part in in_parts(table, console):
            console.print(part)
        said = console.file.getvalue()
        assert max(map(len, said.splitlines())) <= width
        assert all(f"{x:.2f}" in said for x in figures if x and x > 3)
        assert "…" not in said


def test_files_of_an_earlier_report_go_and_other_files_stay(store):
    """Also with names that need escaping, unlike settings above all, and an unreadable folder."""
    for k in (8, 16):
        store.evaluation("topk", "dtd", {"no_sae": 90.0, "on_5": 20.0 + k, "on_all": 80.0}, k=k)
    store.evaluation("sparsemax", "my <b>&_50%", {"no_sae": 90.0, "on_5": 50.0})
    store.evaluation("sparsemax", "my <b>&_50%", {"on_5": 1.25}, max_steps=3)
    broken = store.evaluation("relu", "dtd", {"on_5": 1.0})
    (broken / "results.csv").write_text("nothing")
    folder = store.root / "report"
    (folder / "tables").mkdir(parents=True)
    for name in ("accuracy_first.md", "notes.txt"):
        (folder / "tables" / name).write_text("earlier")
    (folder / "files.json").write_text(json.dumps(["tables/accuracy_first.md", "../evaluation"]))
    page = write_report(store.report(), folder).read_text()
    tables = {path.name for path in (folder / "tables").iterdir()}
    assert "accuracy_first.md" not in tables
    assert (store.root / "evaluation").is_dir()
    expected = {"notes.txt", "table_07_caltech101.csv", "table_08_dtd.md", "table_17_ucf101.tex"}
    assert expected | {"table_05_selected.tex", "table_06.md", "average.csv"} <= tables
    assert "rank.csv" not in tables  # one dataset is shared: no mean
    assert "my &lt;b&gt;&amp;_50%" in page
    assert "my <b>" not in page
    assert f"evaluation/{broken.name}: results.csv lacks the columns" in page
    assert "http" not in page.replace("https://", "http").split("<script>")[0].lower()
    said = "trainer.max_steps is 600 in 3 results (Sparsemax on my &lt;b&gt;"
    assert page.index(said) < page.index("<h2>Findings") < page.index("<table")
    assert (folder / "plots" / "accuracy_dtd.pdf").read_bytes().startswith(b"%PDF")
    assert (folder / "plots" / "k_dtd.pdf").is_file()
    assert not list(folder.rglob(".*"))


def sparsity(l0, fvu):
    return {"l0": l0, "zero_fraction": 1 - l0 / 128, "fvu": fvu}


def test_findings_follow_the_data(store):
    accuracies = {"a": (10.0, 30.0), "b": (20.0, 16.0), "c": (15.0, 23.0)}
    for dataset, (relu, sparse) in accuracies.items():
        metrics = sparsity(100.0, 0.1)
        store.evaluation("relu", dataset, {"on_5": relu, "on_10": 50.0}, metrics=metrics)
        metrics = sparsity(15, 0.2)
        store.evaluation("sparsemax", dataset, {"on_5": sparse, "on_10": 40.0}, metrics=metrics)
    for k, accuracy in ((8, 30.0), (16, 33.0), (32, 35.0)):
        store.evaluation("topk", "a", {"on_10": accuracy}, k=k, metrics=sparsity(k, 0.3))
    text = " ".join(findings(store.selection(), []))
    for said in (
        # TopK, which has one of the datasets, takes the other two away from nobody.
        "Highest mean accuracy over the 3 datasets that 2 models share: Sparsemax",
        "One seed each",
        "Sparsemax at on_5 (23.00 %)",
        "ReLU at on_10 (50.00 %)",
        "Sparsemax uses the fewest latents per token (15.0, FVU 0.200)",
        "ReLU reconstructs best (FVU 0.100, 100.0 latents)",
        # Mean support 15: the nearest k is 16, two points below the best of the sweep.
        "mean support is 15.0",
        "best by on_10 in 0 of 1 sweep ",
        "2.00 points below the best",
    ):
        assert said in text


def test_no_finding_is_drawn_from_too_few_cells(store):
    """Two datasets, two k, one column with a published figure."""
    for model, accuracy in (("relu", 10.0), ("sparsemax", 30.0)):
        for dataset in ("dtd", "eurosat"):
            store.evaluation(model, dataset, {"on_10": accuracy}, metrics={"l0": 12, "fvu": 0.1})
    for k in (8, 16):
        store.evaluation("topk", "dtd", {"on_10": float(k)}, k=k)
    selection = store.selection()
    (only,) = findings(selection, missing_cells(selection, Commands([])))
    assert only.startswith("5 of 66 pairs of a model and a dataset have results;")


def test_an_inline_plot_is_one_svg_element_in_the_readers_colours(store):
    for k in (8, 16, 32):
        store.evaluation("topk", "a", {"on_5": float(k), "on_all": 80.0}, k=k)
    store.evaluation("sparsemax", "a", {"on_5": 40.0, "on_all": 85.0})
    plot = k_plot(store.selection(), "a")
    text = inline_svg(plot.figure, plot.name, 'a "quoted" title')
    root = ET.fromstring(text)
    assert root.tag == "svg"
    assert root.get("aria-label") == 'a "quoted" title'
    assert root.get("width") is None
    assert "currentColor" in text
    assert "http" not in text
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert ids
    assert all(i.startswith("k_a-") for i in ids)
    used = [e.get("href") for e in root.iter() if e.get("href")]
    assert {u[1:] for u in used} <= set(ids)
    # The vertical line of the Sparsemax SAE stands at its mean support, 4 active latents.
    axes = plot.figure.axes[0]
    upright = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert [list(line.get_xdata()) for line in upright] == [[4.0, 4.0]]
