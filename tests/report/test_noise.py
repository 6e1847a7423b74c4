"""Noise of the seeds, gaps between what is not learned and the most that could be reached, both
rankings: against scipy, the formulas, and stores with known answers."""

import re

import numpy as np
import pytest
from scipy import stats

from clipsae.evaluation.numbers import Number
from clipsae.report.noise import reliability, told_apart
from clipsae.report.rankings import order_kept, rankings_table, side_by_side
from clipsae.report.table import MINUS, Cell, Row, Table, to_frame, to_latex, to_markdown
from clipsae.report.tables import (
    BELOW,
    accuracy_tables,
    average_table,
    fidelity_table,
    noise_table,
    recovery_tables,
)


def spread(values):
    return np.mean(values), np.std(values, ddof=1), len(values)


# --- two means ---


def test_two_means_are_told_apart_as_by_welch_s_test():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        a = rng.normal(0, rng.uniform(0.1, 3), rng.integers(2, 6))
        b = rng.normal(rng.uniform(0, 4), rng.uniform(0.1, 3), rng.integers(2, 6))
        expected = stats.ttest_ind(a, b, equal_var=False).pvalue < 0.05
        assert told_apart(spread(a), spread(b)) == told_apart(spread(b), spread(a)) == expected
        seen.add(bool(expected))
    assert seen == {True, False}


def test_one_seed_says_nothing_and_seeds_that_do_not_vary_say_all():
    assert told_apart((1.0, None, 1), (2.0, 0.1, 3)) is None
    assert told_apart((1.0, 0.0, 2), (1.0, 0.0, 3)) is False
    assert told_apart((1.0, 0.0, 2), (1.1, 0.0, 3)) is True


def test_bold_is_the_best_and_what_is_not_told_apart_from_it_in_each_block():
    column = Number("x", "x")
    cells = {
        "best": Cell(9.0, 1.0, 3),
        "tied": Cell(8.5, 1.0, 3),
        "worse": Cell(1.0, 1.0, 3),
        "one seed": Cell(8.9),
    }
    rows = [Row((name,), {"x": cell}) for name, cell in cells.items()]
    rows += [Row((name,), {"x": Cell(v)}, block="below") for name, v in (("a", 2.0), ("b", 3.0))]
    table = Table("t", "t", "", (column,), tuple(rows))
    bold = [row.labels[0] for row in table.rows if table.is_best(row, column)]
    assert bold == ["best", "tied", "b"]


# --- a measure's variants against its seeds ---


def anova(groups):
    """Mean squares by loops."""
    everything = [x for g in groups for x in g]
    grand = sum(everything) / len(everything)
    between = sum(len(g) * (sum(g) / len(g) - grand) ** 2 for g in groups) / (len(groups) - 1)
    within = sum((x - sum(g) / len(g)) ** 2 for g in groups for x in g)
    return between, within / (len(everything) - len(groups))


@pytest.mark.parametrize("sizes", [(3, 3, 3, 3), (2, 3, 5)])
def test_reliability_is_the_intraclass_correlation(sizes):
    rng = np.random.default_rng(1)
    groups = [list(rng.normal(rng.normal(0, 1), 1, n)) for n in sizes]
    found = reliability([*groups, [7.0]])  # a variant with one seed says nothing
    msb, msw = anova(groups)
    n = sum(sizes)
    k = (n - sum(s * s for s in sizes) / n) / (len(sizes) - 1)
    assert found.icc == pytest.approx((msb - msw) / (msb + (k - 1) * msw))
    test = stats.f_oneway(*groups)
    assert found.tells == (test.pvalue < 0.05)
    # Shrout and Fleiss's limits.
    a = len(sizes)
    low = test.statistic / stats.f.ppf(0.975, a - 1, n - a)
    high = test.statistic * stats.f.ppf(0.975, n - a, a - 1)
    assert found.low == pytest.approx((low - 1) / (low + k - 1))
    assert found.high == pytest.approx((high - 1) / (high + k - 1))
    assert found.low < found.icc < found.high
    assert found.within == pytest.approx(msw**0.5)
    assert found.between == pytest.approx(np.std([np.mean(g) for g in groups], ddof=1))
    assert (found.variants, found.seeds) == (a, n)


def test_the_published_example_of_shrout_and_fleiss():
    """Their Table 2, six targets by four judges: ICC(1, 1) is .17."""
    ratings = [
        *([9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8]),
        *([7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]),
    ]
    assert reliability(ratings).icc == pytest.approx(0.166, abs=0.001)


def test_reliability_at_its_ends():
    sure = reliability([[1.0, 1.0], [2.0, 2.0]])
    assert (sure.icc, sure.tells, sure.ratio) == (1.0, True, 0.0)
    noise = reliability([[1.0, 3.0], [3.0, 1.0]])
    assert (noise.icc, noise.tells, noise.ratio) == (-1.0, False, np.inf)
    assert reliability([[1.0, 1.0], [1.0, 1.0]]) is None
    assert reliability([[0.1 + 0.2] * 3, [0.3] * 3]) is None
    assert reliability([[1.0, 2.0], [3.0]]) is None


def test_the_noise_table_puts_first_what_tells_variants_apart(store):
    for rank, model in enumerate(("relu", "gated", "sparsemax")):
        for seed in (0, 1, 2):
            noise = (seed - 1) * (-1) ** rank
            accuracy = {"no_sae": 90.0, "on_1": 20.0 + noise, "on_5": 10.0 * rank + noise}
            metrics = {"fvu": 0.1 * rank + 0.01 * noise, "l0": 16.0, "cosine": 0.5 + 0.1 * noise}
            store.evaluation(model, "scenes", accuracy, seed=seed, metrics=metrics)
            if model == "relu":  # baselines are no variants
                store.evaluation(model, "scenes", {"on_1": 1.0}, seed=seed, max_steps=0, metrics={})
    table = noise_table(store.selection(), "scenes")
    labels = [row.labels for row in table.rows]
    assert set(labels[:2]) == {("on_5", "yes"), ("FVU", "yes")}
    assert {label for label, _ in labels[2:]} == {"on_1", "cosine similarity"} or len(labels) == 4
    assert all(tells == "no" for _, tells in labels[2:])
    assert table.rows[0].cells["variants"].ours == 3
    report = store.report()
    said = [line for line in report.findings if "tell the variants apart" in line]
    assert said[0].startswith("2 of 4 numbers on scenes tell")
    assert "on_1" in said[0]
    assert [section.title for section in report.sections if section.name == "noise"]


# --- what training closes of the gap ---


def with_baselines(store, dataset="scenes", untrained=("relu",)):
    alone = {"no_sae": 90.0}
    for model, value in (("relu", 50.0), ("sparsemax", 30.0)):
        for seed in (0, 1):
            accuracy = alone | {"on_5": value + seed, "off_5": 10.0, "self_5": 40.0, "on_all": 80.0}
            store.evaluation(model, dataset, accuracy, seed=seed)
    for model in untrained:
        store.evaluation(model, dataset, alone | {"on_5": 10.0, "on_all": 70.0}, max_steps=0)
    for fit, value in (("pca", 20.0), ("ica", 15.0)):
        more = {"latents": 256, "options": {"fit": fit}}
        store.evaluation(fit, dataset, alone | {"on_5": value, "on_all": 90.0}, **more)
    frozen = {"freeze": "decoder"}
    store.evaluation("relu", dataset, alone | {"on_5": 42.0, "on_all": 75.0}, options=frozen)


def rows_of(table):
    return {row.labels[0]: row for row in table.rows}


def test_the_gap_is_from_the_untrained_sae_or_else_the_best_that_has_not_learned(store):
    with_baselines(store)
    table, others = accuracy_tables(store.selection(), "scenes")
    rows = rows_of(table)
    relu, sparsemax = rows["ReLU"].cells, rows["Sparsemax"].cells
    assert relu["on_5"].gap == pytest.approx((50.5 - 10) / (90 - 10))
    assert sparsemax["on_5"].gap == pytest.approx((30.5 - 20) / (90 - 20))
    assert rows["ReLU, decoder frozen"].cells["on_5"].gap == pytest.approx((42 - 10) / 80)
    assert relu["on_all"].gap == pytest.approx((80 - 70) / 20)
    assert sparsemax["on_all"].gap is None  # the best that has not learned is at the ceiling
    assert relu["no_sae"].gap is None
    below = [row.labels[0] for row in table.rows if row.block == BELOW]
    assert below == ["ReLU, decoder frozen", "ReLU, untrained", "PCA", "ICA"]
    assert all(rows[x].cells["on_5"].gap is None for x in below[1:])
    assert table.caption.endswith(
        "Gap closed: (value - floor) / (no_sae - floor); the floor is the untrained SAE of the "
        "same variant, where there is none the best that has not learned (PCA at on_5)."
    )
    assert rows_of(others)["ReLU"].cells["off_5"].gap is None
    assert "Gap" not in others.caption  # nothing that has not learned has self_5
    fidelity = rows_of(fidelity_table(store.selection()))["ReLU"].cells["scenes"]
    assert fidelity.gap == pytest.approx((80 - 70) / (90 - 70))
    # As text: below ours, and the block under a heading of its own.
    text = to_markdown(table)
    assert "| ReLU | ours | 90.00 | 50.50 ± 0.71 | 80.00 ± 0.00 |" in text
    assert "|  | gap closed |  | 51 % | 50 % |" in text
    assert "|  | floor to ceiling |  | 10.00 to 90.00 | 70.00 to 90.00 |" in text
    assert f"| *{BELOW}* |" in text
    assert r"\multicolumn{5}{l}{\emph{Not learned, or only in part}}" in to_latex(table)
    frame = to_frame(table).set_index("model")
    assert frame.loc["ReLU", "on_5_gap"] == pytest.approx(40.5 / 80)
    assert frame.loc["PCA", "block"] == BELOW


def test_averages_have_gaps_and_ranks_leave_out_what_has_not_learned(store):
    for dataset in ("a", "b"):
        with_baselines(store, dataset, untrained=("relu", "sparsemax"))
    selection = store.selection()
    table = average_table(selection, ("a", "b"), "average", "two")
    assert rows_of(table)["Sparsemax"].cells["on_5"].gap == pytest.approx((30.5 - 10) / 80)
    assert table.rows[-1].block == BELOW
    assert "where there is none" not in table.caption
    report = store.report()
    (ranks,) = [t for t in report.tables if t.name == "rank"]
    assert [row.labels[0] for row in ranks.rows] == ["ReLU", "Sparsemax"]
    assert ranks.rows[0].cells["on_5"].std == 0.0
    assert ranks.rows[0].cells["on_5"].seeds == 2
    assert not [line for line in report.findings if "sweeps=baselines" in line]


def test_without_baselines_one_line_has_the_command_that_makes_them(store):
    store.evaluation("relu", "scenes", {"on_5": 1.0})
    store.evaluation("relu", "scenes", {"on_5": 0.5}, options={"freeze": "decoder"})
    said = [line for line in store.report().findings if "sweeps=baselines" in line]
    assert len(said) == 1
    assert "python run.py sweeps=baselines clip=tiny" in said[0]


def test_recovery_has_floor_and_ceiling_of_the_same_result(store, monkeypatch):
    from clipsae.report import tables

    def of(key, **more):
        return Number(key, f"{key}, patch", table="recovery", **more)

    ends = {"floor": "patch_auroc_untrained", "ceiling": "patch_auroc_probe"}
    numbers = [of("patch_auroc", **ends), of("patch_auroc_untrained"), of("patch_auroc_random")]
    numbers += [of("patch_auroc_probe"), of("patch_purity")]
    monkeypatch.setattr(tables, "NUMBERS", numbers)
    for model, value in (("relu", 0.8), ("topk", 0.7)):
        known = {"patch_auroc": value, "patch_auroc_untrained": 0.6, "patch_auroc_probe": 0.9}
        known |= {"patch_auroc_random": 0.55, "patch_purity": 0.5}
        store.measurement(model, "scenes", known, k=4 if model == "topk" else None)
    store.measurement("pca", "scenes", known, options={"fit": "pca"})
    (table,) = recovery_tables(store.selection(), "scenes")
    assert table.title == "Concepts recovered on scenes: patch level"
    assert [c.key for c in table.columns] == ["patch_auroc", "patch_purity"]
    rows = rows_of(table)
    assert rows["ReLU"].cells["patch_auroc"].gap == pytest.approx(2 / 3)
    assert rows["TopK (k = 4)"].cells["patch_auroc"].gap == pytest.approx(1 / 3)
    assert rows["ReLU"].cells["patch_purity"].gap is None
    assert rows["PCA"].cells["patch_auroc"].ours == 0.7
    assert rows["PCA"].cells["patch_auroc"].gap is None
    assert rows["Random directions (same rows)"].cells["patch_auroc"].ours == pytest.approx(0.55)
    assert rows["Supervised probe"].cells["patch_auroc"].ours == pytest.approx(0.9)
    assert [name for name, _ in table.blocks] == ["", BELOW, "Ceiling"]


def test_concepts_are_drawn_for_each_level_beside_what_is_no_variant(store):
    for model, value in (("relu", 0.95), ("gated", 0.6)):
        concepts = [
            {
                "level": level,
                "concept": name,
                "auroc": value if "colour" in name else 0.5,
                "f1": 0.5,
            }
            | {"auroc_untrained": 0.55, "auroc_random": 0.91, "auroc_probe": 0.92}
            for level in ("patch", "object")
            for name in ("colour=red", "colour=blue", "shape=ring")
        ]
        store.evaluation(model, "scenes", {"on_5": 1.0}, concepts=concepts)
    report = store.report()
    (said,) = [line for line in report.findings if "Concepts that" in line]
    assert "2 of 2 of colour, 0 of 1 of shape" in said
    assert said.endswith("; a probe tells some of shape (best 0.50), and no variant does.")
    drawn = {plot.name: plot.figure for plot in report.plots if "concepts" in plot.name}
    assert set(drawn) == {"concepts_patch_scenes", "concepts_object_scenes"}
    axes = drawn["concepts_patch_scenes"].axes[0]
    (image,) = axes.get_images()
    expected = [*[[0.95, 0.6, 0.55, 0.91, 0.92]] * 2, [0.5, 0.5, 0.55, 0.91, 0.92]]
    assert np.allclose(np.asarray(image.get_array()), expected)
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert shown == ["ReLU", "Gated", "untrained", "random", "probe"]


# --- rankings ---


def test_both_rankings_stand_side_by_side_and_the_order_that_turns_is_counted(store):
    models = ("relu", "gated", "jumprelu")
    for dataset in ("a", "b"):
        for seed in (0, 1, 2):
            for rank, model in enumerate(models):
                value = 10.0 * rank + 0.1 * seed
                store.evaluation(model, dataset, {"on_1": value, "on_5": value}, seed=seed)
                turned = {"on_1": value, "on_5": 20.0 - value}
                more = {"seed": seed, "metrics": {}, "ranking": "contrast"}
                store.evaluation(model, dataset, turned, **more)
    more = {"metrics": {}, "protocol": "heldout"}
    store.evaluation("relu", "a", {"on_1": 1.0, "on_5": 1.0}, **more)
    store.evaluation("sparsemax", "a", {"on_1": 1.0, "on_5": 1.0}, metrics={}, ranking="contrast")
    selection = store.selection()
    found = side_by_side(selection)
    table = rankings_table(selection, found)
    assert [c.label for c in table.columns][:2] == ["frequency, paper", "contrast, paper"]
    assert [name for name, _ in table.blocks] == ["on_1", "on_5"]
    sentence = next(iter(order_kept(selection, found)), "")
    assert found.datasets == ("a", "b")
    assert len(found.lines) == 3
    cell = found.cells[("paper", "contrast"), "on_5"][selection.main("gated")]
    assert cell.ours == pytest.approx(20 - 10.1)
    assert cell.std == pytest.approx(0.1)
    assert "With a class's latents ranked by contrast" in sentence
    assert "stays so at on_1; Kendall's tau" in sentence
    assert f"1.00 at on_1 and {MINUS}1.00 at on_5" in sentence
    assert "3 of 6 pairs that the seeds tell apart before and after turn round" in sentence
    assert re.search("Rankings of latents", " ".join(s.title for s in store.report().sections))
