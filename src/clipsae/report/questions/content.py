"""Does sparsemax's support follow how much there is to see?"""

import math

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from clipsae.evaluation.metrics.support import NUMBERS
from clipsae.report.names import model_style, model_title
from clipsae.report.plots import INK, STYLE, Plot, legend_below
from clipsae.report.questions.evidence import (
    TRAINED,
    UNTRAINED,
    Evidence,
    correlation_of,
    mean_of,
    of,
    recipe_title,
    relations,
    said,
)
from clipsae.report.questions.question import NOISE, Question, Table, bounds, figure, interval
from clipsae.report.questions.statistics import difference

_ASKED = {  # what a sentence calls them
    "support_objects": "the number of objects in the image",
    "support_objects_given_area": "that number at a given area of objects",
    "support_patch_object": "whether a patch shows an object",
    "support_patch_concepts": "the number of concepts in a patch",
    "support_patch_boundary": "whether an object's patch shows background, too",
    "support_patch_pattern": "whether the object has a pattern",
    "support_jpeg": "the image's JPEG size",
}
_CONCEPTS = "support_patch_concepts"
_EQUAL = 1.25  # the largest L0 over the smallest, below which they count as about equal


def ask(evidence: Evidence) -> Question:
    """Rank correlations of the number of active latents with content, of each variant."""
    rows = evidence.numbers
    rows = rows[rows.key.str.startswith("support_") | rows.key.eq("l0")]
    question = Question(
        "Does sparsemax's support follow how much there is to see?",
        ("main", "untrained", "scales"),
        limits=[
            "A correlation says nothing of why. A threshold that is the same for all tokens lets "
            "more latents through for tokens far from the mean, whatever they mean: some variants "
            "follow the number of concepts before training, too.",
            "Sparsemax alone reads tokens divided by their norms, and how many of its scores pass "
            "depends on their scale, which its recipe sets: other scales are other SAEs.",
            "A trained TopK SAE's number of active latents is constant, so that its correlations "
            "are 0 by construction.",
            "Intervals are over trainings, on the same images: they do not say how far other "
            "images would differ.",
        ],
    )
    keys = [n for n in NUMBERS if n.key in set(rows.key[rows.value.notna()])]
    frames = evidence.mains(rows)
    if not keys or not frames:
        return question
    untrained = evidence.mains(rows, UNTRAINED)
    scales = _scales(rows)
    answer = []
    if "sparsemax" in frames:
        mine = frames["sparsemax"]
        signs: dict[int, list[str]] = {1: [], 0: [], -1: []}
        for key, words in _ASKED.items():
            found = correlation_of(mine, key)
            if found.n > 1 and not math.isnan(found.value):
                signs[found.sign].append(f"{words} ({bounds(found)})")
        if parts := relations(signs):
            answer.append(
                "The number of active latents of Sparsemax "
                f"{'; it '.join(parts)} (rank correlation, 95 % interval over seeds)."
            )
        answer += _against(frames, untrained)
        parts = [
            f"{bounds(correlation_of(found, _CONCEPTS))} with {title.partition(', ')[2]} (L0 "
            f"{figure(mean_of(found, 'l0').value, '.1f')})"
            for title, found in scales.items()
        ]
        if parts:
            answer.append(f"Trained with scores of another scale it is {said(parts)}.")
    l0 = {model: mean_of(found, "l0").value for model, found in frames.items()}
    l0 = {model: value for model, value in l0.items() if not math.isnan(value)}
    if len(l0) > 1:
        low, high = min(l0, key=l0.__getitem__), max(l0, key=l0.__getitem__)
        equal = l0[high] <= _EQUAL * l0[low]
        answer.append(
            f"Mean L0 lies between {figure(l0[low], '.1f')} ({model_title(low)}) and "
            f"{figure(l0[high], '.1f')} ({model_title(high)})"
            + (": about equal." if equal else ": not equal, so the variants compare with care.")
        )
    titled = {model_title(model): found for model, found in frames.items()}
    tables = [_table("Trained", keys, titled | scales)]
    if untrained:
        titled = {model_title(model): found for model, found in untrained.items()}
        tables.append(_table("Untrained", keys, titled))
    used = [*frames.values(), *untrained.values(), *scales.values()]
    used = rows[rows.recipe.isin({recipe for found in used for recipe in found.recipe})]
    plots = [_plot(keys, frames)]
    return Question(question.title, question.grids, answer, tables, plots, question.limits, used)


def _scales(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Trained Sparsemax SAEs with scores of other scales, by the titles of their recipes."""
    found = rows[rows.model.eq("sparsemax") & rows.role.eq(TRAINED)]
    found = found[found.recipe.str.contains("model.scale=", regex=False)]
    return {recipe_title(recipe): one for recipe, one in found.groupby("recipe", sort=False)}


def _against(frames: dict, untrained: dict) -> list[str]:
    """Sparsemax beside BatchTopK, JumpReLU and its untrained twin, by the number of concepts."""
    mine = of(frames["sparsemax"], _CONCEPTS)
    others = {model_title(m): frames[m] for m in ("batch_topk", "jumprelu") if m in frames}
    if "sparsemax" in untrained:
        others["the untrained Sparsemax"] = untrained["sparsemax"]
    parts = []
    for title, found in others.items():
        apart = difference(mine, of(found, _CONCEPTS))
        if apart.n > 1 and not math.isnan(apart.value):
            verdict = ("not distinguishable from", "stronger than", "weaker than")[apart.sign]
            value = figure(correlation_of(found, _CONCEPTS).value)
            parts.append(f"{verdict} that of {title} ({value})")
    if not parts:
        return []
    before = [
        f"{model_title(m)} {figure(correlation_of(untrained[m], _CONCEPTS).value)}"
        for m in ("batch_topk", "jumprelu")
        if m in untrained
    ]
    return [
        f"Its correlation with {_ASKED[_CONCEPTS]} is {said(parts)}"
        + (f"; before training {said(before)} have it." if before else ".")
    ]


def _table(kind: str, keys: list, frames: dict[str, pd.DataFrame]) -> Table:
    models = list(frames)
    rows = [["L0", *(interval(mean_of(frames[m], "l0"), ".1f") for m in models)]]
    for number in keys:
        if "~" in number.label:
            cells = [bounds(correlation_of(frames[m], number.key)) for m in models]
        else:
            form = ".1f" if "_l0_" in number.key else ".2f"
            cells = [interval(mean_of(frames[m], number.key), form) for m in models]
        rows.append([number.label, *cells])
    caption = (
        f"{kind}: means over seeds with 95 % intervals. L0 ~ x is the rank correlation of the "
        f"number of active latents with x. A difference is within the noise where {NOISE}."
    )
    return Table(caption, ["", *models], rows)


def _plot(keys: list, frames: dict) -> Plot:
    """Correlations with their intervals, a colour a variant."""
    shown = [number for number in keys if "~" in number.label]
    models = list(frames)
    with matplotlib.rc_context(STYLE):
        plot = Figure(figsize=(8.0, 1.2 + 0.55 * len(shown)), layout="constrained")
        axes = plot.subplots()
        axes.axvline(0, color=INK, linewidth=0.8)
        for at, model in enumerate(models):
            colour, marker = model_style(model, models)
            found = [correlation_of(frames[model], number.key) for number in shown]
            places = [-i + 0.1 * (len(models) / 2 - at) for i in range(len(shown))]
            ends = [(one.value - one.low, one.high - one.value) for one in found]
            spread = np.nan_to_num(ends).clip(min=0).T
            values = [one.value for one in found]
            style = {"color": colour, "marker": marker, "markersize": 5, "linestyle": "none"}
            axes.errorbar(values, places, xerr=spread, **style, label=model_title(model))
        axes.set_yticks([-i for i in range(len(shown))], [number.label for number in shown])
        axes.set_xlabel("rank correlation")
        legend_below(plot, axes, 6)
    caption = "Bars: 95 % intervals over seeds."
    return Plot("content", "Active latents and content", caption, plot)
