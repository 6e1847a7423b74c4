"""Which measures can be trusted: noise against difference, and does recovery go with on_1, on_5?"""

import math

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from clipsae.report.names import column_order, model_style, model_title
from clipsae.report.noise import Reliability, reliability
from clipsae.report.plots import STYLE, Plot, legend_below
from clipsae.report.questions.evidence import (
    TRAINED,
    Evidence,
    Setting,
    of,
    recipe_title,
    relations,
)
from clipsae.report.questions.question import (
    Question,
    Table,
    accuracy,
    bounds,
    counted,
    figure,
    measures,
)
from clipsae.report.questions.statistics import Interval, correlation

_RECOVERY = ("patch_concepts_found", "patch_auroc", "patch_f1")
_NS = ("on_1", "on_5")


def ask(evidence: Evidence) -> Question:
    """An analysis of variance of each measure over the variants; correlations over recipes."""
    question = Question(
        "Which measures can be trusted, and does recovery go with on_1 and on_5?",
        ("main", "main_topn", "sizes", "sizes_topn"),
        limits=[
            "That a measure tells variants apart does not say that it measures something useful, "
            "only that it is not noise.",
            "The noise is that of seeds. Other images, and another backbone, add their own.",
            "A correlation over recipes depends on which recipes there are: it is not a law. With "
            "so few of them, and so many pairs of measures, one of the intervals may well miss 0 "
            "by chance.",
        ],
    )
    rows = evidence.comparable()
    frames = evidence.mains(rows)
    asked = [n for n in measures() if n.key in set(rows.key)]
    on = sorted({key for key in rows.key if key.startswith("on_")}, key=column_order)
    asked += [accuracy(key) for key in on]
    values = {n: [of(frame, n.key) for frame in frames.values()] for n in asked}
    known = {
        n: reliability([[v for v in of_seeds if not math.isnan(v)] for of_seeds in one])
        for n, one in values.items()
    }
    found = {number: one for number, one in known.items() if one is not None}
    answer, tables, plots = [], [], []
    if found:
        ordered = sorted(found.items(), key=lambda pair: pair[1].ratio)
        apart = [number for number, one in ordered if one.tells]
        answer.append(
            f"{len(apart)} of {counted(len(found), 'measure')} tell the "
            f"{max(one.variants for one in found.values())} variants apart (F test, p < 0.05); "
            f"{ordered[0][0].label} best, {ordered[-1][0].label} least: there the spread between "
            f"seeds is {figure(ordered[-1][1].ratio)} times that between variants."
        )
        table = [
            [
                number.label,
                figure(one.within, number.format),
                figure(one.between, number.format),
                figure(one.ratio),
                f"{figure(one.icc)} [{figure(one.low)}, {figure(one.high)}]",
                "yes" if one.tells else "no",
            ]
            for number, one in ordered
        ]
        head = ["measure", "sd between seeds", "sd between variants", "ratio", "ICC", "apart"]
        caption = (
            "One-way analysis of variance over the variants' main recipes; sd between seeds is "
            "pooled over variants. The smaller the ratio, the better a measure tells them apart. "
            "ICC: the share of the variance that lies between variants, with its 95 % interval; "
            "apart: whether the F test (p < 0.05) tells them apart. It is one-sided, and the "
            "interval two-sided."
        )
        tables.append(Table(caption, head, table))
        plots.append(_ratios([(number.label, one) for number, one in ordered]))
    together = _correlations(evidence)
    if together:
        answer.append(_sentence(together))
        table = [
            [recovery, setting.title, key, bounds(one), str(one.n)]
            for (recovery, setting, key), one in together.items()
        ]
        caption = (
            "Pearson's correlation over recipes of trained SAEs (means over seeds), with Fisher's "
            "95 % interval."
        )
        tables.append(Table(caption, ["recovery", "setting", "accuracy", "r", "recipes"], table))
        plots += _scatter(evidence)
    used = [rows[rows.recipe.isin({r for frame in frames.values() for r in frame.recipe})]]
    for recovery, setting, key in together:
        both = _points(evidence, recovery, setting, key)
        used += [f[f.recipe.isin(both)] for f in (evidence.numbers, evidence.within(setting))]
    used = pd.concat(used)
    return Question(question.title, question.grids, answer, tables, plots, question.limits, used)


def _points(
    evidence: Evidence, recovery: str, setting: Setting, key: str
) -> dict[str, list[float]]:
    """Of each recipe that has both: recovery and accuracy, means over seeds."""
    numbers, accuracies = evidence.numbers, evidence.within(setting)
    numbers = numbers[numbers.key.eq(recovery) & numbers.role.eq(TRAINED)]
    accuracies = accuracies[accuracies.key.eq(key)]
    left, right = (f.groupby("recipe", sort=False).value.mean() for f in (numbers, accuracies))
    return {r: [left[r], right[r]] for r in left.index if r in right.index}


def _correlations(evidence: Evidence) -> dict[tuple[str, Setting, str], Interval]:
    found = {}
    for recovery in _RECOVERY:
        for setting in evidence.settings():
            for key in _NS:
                points = _points(evidence, recovery, setting, key).values()
                one = correlation([p[0] for p in points], [p[1] for p in points])
                if not math.isnan(one.value):
                    found[recovery, setting, key] = one
    return found


def _sentence(found: dict[tuple[str, Setting, str], Interval]) -> str:
    """How recovery goes with accuracy, by the first measure of recovery."""
    first = next(iter(found))[0]
    parts: dict[int, list[str]] = {1: [], -1: [], 0: []}
    most = max(one.n for one in found.values())
    for (recovery, setting, key), one in found.items():
        if recovery == first and one.n == most:
            sign = 0 if math.isnan(one.low) else one.sign
            parts[sign].append(f"{key} ({setting.title}: {bounds(one)})")
    told = "; it ".join(relations(parts))
    return f"Over {most} recipes of trained SAEs, the share of concepts found in patches {told}."


def _ratios(ordered: list[tuple[str, Reliability]]) -> Plot:
    """Spread between seeds over that between variants, a bar a measure."""
    with matplotlib.rc_context(STYLE):
        plot = Figure(figsize=(8.0, 0.8 + 0.2 * len(ordered)), layout="constrained")
        axes = plot.subplots()
        drawn = ordered[::-1]
        colours = ["#0072b2" if one.tells else "#999999" for _, one in drawn]
        finite = [min(one.ratio, 3.0) for _, one in drawn]
        axes.barh(range(len(drawn)), finite, color=colours)
        axes.set_yticks(range(len(drawn)), [label for label, _ in drawn], fontsize=8)
        axes.axvline(1, color="#d55e00", linewidth=1)
        axes.set_xlabel("sd between seeds / sd between variants")
    caption = (
        "Blue: the F test tells the variants apart (p < 0.05). Right of the line the noise is "
        "larger than the difference; bars end at 3."
    )
    return Plot("noise", "Noise against difference", caption, plot)


def _scatter(evidence: Evidence) -> list[Plot]:
    """on_5 over concepts found, a panel a setting."""
    panels = {s: _points(evidence, _RECOVERY[0], s, "on_5") for s in evidence.settings()}
    panels = {setting: points for setting, points in panels.items() if len(points) > 2}
    if not panels:
        return []
    model_of = evidence.figures.drop_duplicates("recipe").set_index("recipe").model
    models = list(dict.fromkeys(model_of[r] for points in panels.values() for r in points))
    rows = -(-len(panels) // 2)
    with matplotlib.rc_context(STYLE):
        plot = Figure(figsize=(8.0, 0.9 + 2.3 * rows), layout="constrained")
        axes_of = list(plot.subplots(rows, 2, squeeze=False).flat)
        for axes, (setting, points) in zip(axes_of, panels.items(), strict=False):
            labels = set()
            for recipe, (x, y) in points.items():
                model = str(model_of[recipe])
                colour, marker = model_style(model, models)
                plain = recipe_title(recipe) == model_title(model)
                label = model_title(model) if model not in labels else "_"
                labels.add(model)
                fill = colour if plain else "none"
                axes.plot(
                    [x],
                    [y],
                    marker=marker,
                    color=colour,
                    markerfacecolor=fill,
                    linestyle="",
                    label=label,
                )
            axes.set_title(setting.title, fontsize=9, loc="left")
            axes.set_xlabel("concepts found, patch")
            axes.set_ylabel("on_5, %")
        for axes in axes_of[len(panels) :]:
            axes.set_visible(False)
        legend_below(plot, axes_of[0], 6)
    caption = "A point a recipe, mean over seeds; hollow: not the main recipe of the variant."
    return [Plot("recovery_on_5", "Recovery and on_5", caption, plot)]
