"""The page of findings from a store whose answers are known, and its statistics against scipy."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from clipsae.report.questions import QUESTIONS, Result, ask, content, read, trust, write_page
from clipsae.report.questions import statistics as ours
from clipsae.report.questions.concepts import _along
from clipsae.report.questions.evidence import correlation_of, recipe_title
from clipsae.report.questions.page import PAGE
from clipsae.report.questions.question import bounds

A, B = [1.0, 2.0, 4.0, 4.5], [0.5, 1.5, 1.0]


def test_intervals_are_scipys():
    found, theirs = ours.mean(A), stats.t.interval(0.95, 3, np.mean(A), stats.sem(A))
    assert (found.low, found.high) == pytest.approx(theirs)
    assert (found.value, found.n) == (np.mean(A), 4)
    apart = ours.difference(A, B)
    theirs = stats.ttest_ind(A, B, equal_var=False).confidence_interval()
    assert (apart.low, apart.high) == pytest.approx((theirs.low, theirs.high))
    assert apart.value == pytest.approx(np.mean(A) - np.mean(B))
    x, y = np.random.default_rng(0).normal(size=(2, 12))
    y += x
    found, theirs = ours.correlation(x, y), stats.pearsonr(x, y)
    assert found.value == pytest.approx(theirs.statistic)
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval()))
    assert ours.agreement([1, 2, 3, 3], [2, 1, 3, 4]) == pytest.approx(
        stats.kendalltau([1, 2, 3, 3], [2, 1, 3, 4]).statistic
    )
    z = np.arctanh([0.2, 0.5, 0.4])
    low, high = np.tanh(stats.t.interval(0.95, 2, z.mean(), stats.sem(z)))
    found = ours.mean_correlation([0.2, math.nan, 0.5, 0.4])
    assert (found.low, found.high, found.n) == (pytest.approx(low), pytest.approx(high), 3)


def test_what_is_not_known_has_no_interval():
    assert math.isnan(ours.mean([]).value)
    assert ours.mean([2.0, math.nan]).value == 2
    for one in (
        ours.mean([2.0]),
        ours.difference([2.0], B),
        ours.correlation([1, 2, 3], [1, 3, 2]),
    ):
        assert math.isnan(one.low)
        assert one.sign == 0  # never beyond noise
    assert ours.difference([2.0, 2.0], [1.0, 1.0]).sign == 1  # neither varies
    assert ours.difference([1.0, 1.0], [1.0, 1.0]).sign == 0
    assert math.isnan(ours.correlation([1, 1, 1, 1], [1, 2, 3, 4]).value)


def test_the_mean_of_correlations_of_one_whose_z_is_infinite():
    nan = math.nan
    for r in (1.0, -1.0):
        assert ours.mean_correlation([r, r, nan]) == ours.Interval(r, r, r, 2)
        assert ours.mean_correlation([r * (1 + 3e-16)]).value == r  # rounding
        assert math.isnan(ours.mean_correlation([r]).low)
    # Of r itself, by scipy; one perfect seed of three does not make the mean perfect.
    values = [1.0, 0.5, 0.6]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    found = ours.mean_correlation([*values, nan])
    assert (found.value, found.low, found.n) == (pytest.approx(0.7), pytest.approx(low), 3)
    assert high > 1 == found.high
    assert ours.mean_correlation([1.0, -1.0]) == ours.Interval(0.0, -1.0, 1.0, 2)
    assert math.isnan(ours.mean_correlation([nan]).value)


SUPPORT = {
    "support_objects": 0.5,
    "support_objects_given_area": 0.3,
    "support_patch_object": -0.4,
    "support_patch_concepts": 0.45,
    "support_jpeg": 0.0,
}
NOTHING = dict.fromkeys(SUPPORT, 0.0)
JITTER = (-0.02, 0.0, 0.03)  # of the seeds


class Finished:
    """Finished cells of a sweep, written as the experiment writes them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.results: list[Result] = []

    def cell(self, model, seed, more=(), numbers=None, accuracy=None, concepts=None, **options):
        fit = model if model in ("pca", "neurons") else None
        words = dict(word.split("=") for word in more)
        latents = int(words.get("model.latents", 128))
        config = {
            "model": {
                "name": model,
                "latents": latents,
                "k": None,
                "fit": fit,
                "freeze": words.get("model.freeze"),
            },
            "trainer": {"max_steps": int(words.get("trainer.max_steps", 600))},
            "dataset": {"name": "scenes" if numbers else "scenes_shape_colour"},
            "evaluation": {"protocol": "paper", "ranking": "frequency", "count_share": None}
            | options,
            "seed": seed,
        }
        name = "-".join([model, *more, str(seed)])
        sae, folder = self.root / "sae" / name, self.root / "evaluation" / str(len(self.results))
        folder.mkdir(parents=True)
        sae.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        at = 3600.0 * len(self.results)
        for stage, end in ((sae, at), (folder, at + 1800)):
            mark = {"finished": end, "seconds": 1800, "host": "a", "git_commit": "0123456789abcdef"}
            (stage / "meta.json").write_text(json.dumps(mark))
        cell = {name: config["model"][name] for name in ("latents", "k")}
        cell |= {"model": model, "dataset": config["dataset"]["name"], "clip": "tiny", "seed": seed}
        if numbers:
            of_images = cell | {"image_encoder": None, "pooling": "mean"}
            rows = [{**of_images, "metric": key, "value": v} for key, v in numbers.items()]
            pd.DataFrame(rows).to_csv(folder / "metrics.csv", index=False)
        if concepts:
            rows = [
                {"level": "patch", "concept": concept, "auroc": area, "f1": 0.5}
                | {"auroc_random": 0.55, "auroc_probe": 0.95}
                for concept, area in concepts.items()
            ]
            pd.DataFrame(rows).to_csv(folder / "concepts.csv", index=False)
        if accuracy:
            rows = [
                {**cell, "protocol": "paper", "setting": "on", "n": n, "accuracy": value}
                | {"images": 100, "classes": 10}
                for n, value in accuracy.items()
            ]
            pd.DataFrame(rows).to_csv(folder / "results.csv", index=False)
        overrides = [
            f"model={model}",
            f"seed={seed}",
            *more,
            "evaluation=none",
            "trainer.precision=x",
        ]
        self.results.append(Result(overrides, sae, folder))


def numbers(found, seed, l0=16.0, **more):
    jitter = JITTER[seed]
    return {
        "l0": l0,
        "zero_fraction": 1 - l0 / 128,
        "patch_concepts_found": found + jitter,
        "patch_merging": 0.2,
        "fvu": 0.1 + jitter / 10,
        "cosine": 0.9,
        **{key: value + jitter * (value != 0) for key, value in more.items()},
    }


@pytest.fixture
def finished(tmp_path) -> Finished:
    """Sparsemax finds most concepts and is last by the paper's protocol, first by contrast; its L0
    rises with objects, falls on object patches. PCA finds more than any of them."""
    store = Finished(tmp_path / "out")
    recovery = {"topk": 0.4, "batch_topk": 0.5, "sparsemax": 0.6}
    order = {"topk": 40.0, "batch_topk": 30.0, "sparsemax": 10.0}
    for seed in range(3):
        for model, found in recovery.items():
            content = SUPPORT if model == "sparsemax" else NOTHING
            concepts = {"colour=red": found + 0.3, "colour=blue": found + 0.3, "shape=ring": 0.6}
            measured = numbers(found, seed, **content)
            store.cell(model, seed, numbers=measured, concepts=concepts)
            measured = numbers(0.1, seed, **NOTHING) | {"cosine": 0.9 + 0.001 * seed}
            store.cell(model, seed, ["trainer.max_steps=0"], measured)
            for ranking in ("frequency", "contrast"):
                level = order[model] if ranking == "frequency" else 50 - order[model]
                level += 10 * JITTER[seed]
                accuracy = {1: level / 2, 5: level, 128: 99.0}
                store.cell(model, seed, accuracy=accuracy, ranking=ranking)
        store.cell("pca", seed, numbers=numbers(0.8, seed))
        for size in (32, 64):
            measured = numbers(0.1 * math.log2(size) - 0.35, seed) | {"patch_merging": size / 1000}
            store.cell("topk", seed, [f"model.latents={size}"], measured)
        for share, ahead in ((1.0, 1), (0.1, -1)):
            for model, sign in (("topk", ahead), ("sparsemax", -ahead)):
                accuracy = {1: 20.0 + JITTER[seed], 5: 20.0 + 5 * sign + JITTER[seed]}
                store.cell(model, seed, accuracy=accuracy, count_share=share)
    return store


def test_the_answers_follow_the_results(finished, tmp_path):
    evidence = read(finished.results, cells=70)
    questions = ask(evidence)
    said = [" ".join(question.answer) for question in questions]
    assert "Against SAEs that are untrained, training is better in 3 of" in said[0]
    assert (
        "(PCA) is better than the best trained variant, beyond the noise of seeds, on 1 of "
        in said[0]
    )
    assert "(concepts found, patch)" in said[0]
    row = next(row for row in questions[0].tables[0].rows if row[0] == "concepts found, patch")
    assert row[1] == "3 / 0 / 0"
    assert row[2].endswith("(Sparsemax)")
    # Support.
    assert "rises with the number of objects in the image (0.50 [" in said[1]
    assert "falls with whether a patch shows an object (" in said[1]
    assert "has no clear correlation with the image's JPEG size (0.00 [" in said[1]
    assert "stronger than that of BatchTopK (0.00)" in said[1]
    assert "the untrained Sparsemax (0.00)" in said[1]
    assert "about equal" in said[1]
    # Concepts: best and worst, and that more is found in larger dictionaries.
    assert "Sparsemax finds the most concepts (60.3 % ± 6.3), TopK the fewest" in said[2]
    assert (
        "colour is recovered best (0.90 by Sparsemax, random directions 0.55, a probe 0.95)"
        in said[2]
    )
    assert "shape is recovered worst (0.60 by " in said[2]
    assert re.search(r"With dictionary size, over 9 SAEs, .*concepts found, patch rises", said[2])
    assert questions[2].tables[0].head == ["", "colour", "shape"]
    assert questions[2].tables[0].rows[-2:] == [
        ["random", "0.55", "0.55"],
        ["probe", *["0.95"] * 2],
    ]
    (image,) = questions[2].plots[0].figure.axes[0].get_images()
    drawn = [*[[0.7, 0.8, 0.9, 0.55, 0.95]] * 2, [0.6, 0.6, 0.6, 0.55, 0.95]]
    assert np.allclose(np.asarray(image.get_array()), drawn)
    assert {row[0] for row in questions[2].tables[1].rows} >= {"TopK", "TopK, model.latents=64"}
    # Trust: cosine of the main recipes never varies and is no measure here.
    assert re.search(r"\d of \d+ measures tell the 3 variants apart", said[3])
    assert "cosine" not in [row[0] for row in questions[3].tables[0].rows]
    correlations = {(row[1], row[2]): row[3] for row in questions[3].tables[1].rows}
    assert correlations["paper, frequency", "on_5"].startswith("\N{MINUS SIGN}0.9")
    assert correlations["paper, contrast", "on_5"].startswith("0.9")
    # Order: reversed.
    assert (
        "With the paper protocol and ranking by frequency, TopK is first at on_5 (40.0" in said[4]
    )
    assert (
        "With the paper protocol and ranking by contrast, Sparsemax is first at on_5 (40.0"
        in said[4]
    )
    assert questions[4].tables[-1].rows[1][4] == "\N{MINUS SIGN}1.00"
    # Shares.
    assert (
        "With 100 % of the codes counted (frequency) TopK is ahead at on_5; neither beyond noise "
        "at on_1." in said[5]
    )
    assert "With 10 % of the codes counted (frequency) Sparsemax is ahead at on_5" in said[5]
    assert all(question.answer and question.plots and question.limits for question in questions)

    page = write_page(evidence, tmp_path / "docs", ["sweeps=findings"]).read_text()
    assert page.count("\n## ") == len(QUESTIONS) == 6
    for picture in re.findall(r"\]\((images/.+?)\)", page):
        assert (tmp_path / "docs" / picture).read_text().count("<svg") == 1
    # Every training and evaluation took half an hour, and none at the same time.
    done = len(finished.results)
    saes = len({result.sae for result in finished.results})
    evaluations = len({result.evaluation for result in finished.results})
    said = f"{evaluations} evaluations of {saes} SAEs with 3 seeds"
    assert f"It rests on {done} of 70 cells of the sweep: {said}, made in" in page
    assert "'hydra.sweeper.only=[shares]'" in page
    assert str(tmp_path) not in page
    assert "nan" not in page


def test_a_seed_without_a_value_does_not_cost_a_variant_its_others(finished):
    evidence = read(finished.results, cells=70)
    figures = evidence.figures

    def row(lost: list[tuple[str, int]]) -> list[str]:
        """Of FVU in the table of variances, where some models' seeds have no value."""
        mine = figures.key.eq("fvu") & figures.role.eq("trained")
        of_lost = [mine & figures.model.eq(m) & figures.seed.eq(s) for m, s in lost]
        values = figures.value.mask(np.any(of_lost, axis=0))
        question = trust.ask(replace(evidence, figures=figures.assign(value=values)))
        (found,) = [row for row in question.tables[0].rows if row[0] == "FVU"]
        return found

    # All variants have the same FVU of a seed: 0.1 and a tenth of its jitter.
    two, three = np.array([0.1 + JITTER[1] / 10, 0.1 + JITTER[2] / 10]), 0.1 + np.array(JITTER) / 10
    for lost, kept in (
        ([("topk", 0)], [two, three, three]),
        ([("topk", 0), ("topk", 1)], [three, three]),  # one value has no spread
    ):
        degrees = sum(len(v) - 1 for v in kept)
        within = math.sqrt(sum(((v - v.mean()) ** 2).sum() for v in kept) / degrees)
        between = np.std([v.mean() for v in kept], ddof=1)
        assert row(lost)[1:3] == [f"{within:.3f}", f"{between:.3f}"]


def test_scores_of_other_scales_stand_beside_sparsemax(finished):
    evidence = read(finished.results, cells=70)
    figures = evidence.figures
    mine = figures[figures.model.eq("sparsemax") & figures.role.eq("trained")]
    mine = mine[mine.protocol.eq("") & ~mine.recipe.str.contains("latents")]
    scaled = mine.assign(recipe="model=sparsemax model.scale=2.0", value=-mine.value)
    question = content.ask(replace(evidence, figures=pd.concat([figures, scaled])))
    of_main, of_scaled = (correlation_of(rows, "support_patch_concepts") for rows in (mine, scaled))
    assert of_scaled.value == pytest.approx(-of_main.value)
    said = f"Trained with scores of another scale it is {bounds(of_scaled)} with model.scale=2.0"
    assert said in " ".join(question.answer)
    head, rows = question.tables[0].head, question.tables[0].rows
    assert head[-1] == "Sparsemax, model.scale=2.0"
    (row,) = [row for row in rows if row[0] == "L0 ~ concepts in the patch"]
    assert row[-1] == bounds(of_scaled)
    assert "model=sparsemax model.scale=2.0" in set(question.used.recipe)


def test_curves_are_of_recipes_that_differ_in_one_thing():
    recipes = ["model=topk", "model=topk model.latents=64", "model=topk model.k=4"]
    rows = pd.DataFrame({"recipe": recipes})
    assert _along(rows, "latents").recipe.tolist() == recipes[:2]
    assert _along(rows, "l0").recipe.tolist() == [recipes[0], recipes[2]]


def test_work_at_the_same_time_counts_once(finished):
    evidence = read(finished.results, cells=70)
    rows = evidence.figures[evidence.figures.evaluation.isin(["0", "1"])]
    spans = sorted(evidence.spans[name] for name in {*rows.sae, *rows.evaluation})
    hours = np.zeros(int(max(end for *_, end in spans)) + 3600, dtype=bool)
    for _, start, end in spans:
        hours[int(start) + 1800 : int(end) + 1800] = True
    assert evidence.hours(rows) == pytest.approx(hours.sum() / 3600)
    assert evidence.hours(rows) == pytest.approx(2)
    evidence.spans.update(dict.fromkeys(evidence.spans, ("a", 0.0, 1800.0)))
    assert evidence.hours(rows) == 0.5


def test_a_page_without_answers_says_which_cells_give_them(finished, tmp_path):
    """One cell: no question has an interval, and what has no answer names its grids."""
    (first, *_) = (r for r in finished.results if "pca" in r.overrides[0])
    evidence = read([first], cells=5)
    page = write_page(evidence, tmp_path / "docs").read_text()
    assert page.count("do not answer this yet") == 6
    with pytest.raises(ValueError, match="none of the sweep's 5 cells is finished"):
        read([], cells=5)


def test_one_seed_is_never_beyond_noise(finished, tmp_path):
    one = [result for result in finished.results if "seed=0" in result.overrides]
    said = " ".join(sentence for question in ask(read(one, 9)) for sentence in question.answer)
    assert "rises with" not in said
    assert "better in" not in said
    assert "ahead at" not in said


def test_two_cells_that_ask_for_one_sae_in_different_words_are_one_recipe(finished):
    again = finished.results[0]
    words = [*again.overrides, "model.latents=128"]
    more = [*finished.results, Result(words, again.sae, again.evaluation)]
    evidence = read(more, 70)
    assert evidence.figures.equals(read(finished.results, 70).figures)
    assert recipe_title("model=topk model.latents=64") == "TopK, model.latents=64"
    assert evidence.main("topk") == "model=topk"


def test_the_page_of_the_documentation_is_written_here():
    """Its name, and that the questions' grids are the sweep's."""
    from run import ROOT

    sweep = yaml.safe_load((ROOT / "sweeps" / "findings.yaml").read_text())
    grids = sweep["hydra"]["sweeper"]["grids"]
    empty = read_nothing()
    for question in QUESTIONS:
        assert set(question(empty).grids) <= set(grids)
    assert (ROOT / "docs" / PAGE).is_file()


def read_nothing():
    from clipsae.report.questions.evidence import _COLUMNS, Evidence

    return Evidence(pd.DataFrame(columns=_COLUMNS), pd.DataFrame(), {}, 0)
