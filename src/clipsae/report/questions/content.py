"""Does sparsemax's support follow how much there is to see?"""

import math

import matplotlib
import numpy as np
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
    "support_jpeg": "the image's JPEG size",
}
_EQUAL = 1.25  # the largest L0 over the smallest, below which they count as about equal


def ask(evidence: Evidence) -> Question:
    """Rank correlations of the number of active latents with content, of each variant."""
    rows = evidence.numbers
    rows = rows[rows.key.str.startswith("support_") | rows.key.eq("l0")]
    question = Question(
        "Does sparsemax's support follow how much there is to see?",
        ("main", "untrained"),
        limits=[
            "A correlation says nothing of why: a patch with more to see may have a longer token, "
            "and a fixed threshold lets more latents through there, whatever they mean.",
            "TopK's number of active latents is constant, so that its correlations are 0 by "
            "construction.",
            "Intervals are over trainings, on the same images: they do not say how far other "
            "images would differ.",
        ],
    )
    keys = [n for n in NUMBERS if n.key in set(rows.key[rows.value.notna()])]
    frames = evidence.mains(rows)
    if not keys or not frames:
        return question
    untrained = evidence.mains(rows, UNTRAINED)
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
    tables = [_table("Trained", keys, frames)]
    if untrained:
        tables.append(_table("Untrained", keys, untrained))
    used = rows[rows.role.isin([TRAINED, UNTRAINED])]
    plots = [_plot(keys, frames)]
    return Question(question.title, question.grids, answer, tables, plots, question.limits, used)


def _against(frames: dict, untrained: dict) -> list[str]:
    """Sparsemax beside BatchTopK, JumpReLU and its untrained twin, by the number of concepts."""
    key = "support_patch_concepts"
    mine = of(frames["sparsemax"], key)
    others = {model_title(m): frames[m] for m in ("batch_topk", "jumprelu") if m in frames}
    if "sparsemax" in untrained:
        others["the untrained Sparsemax"] = untrained["sparsemax"]
    parts = []
    for title, found in others.items():
        apart = difference(mine, of(found, key))
        if apart.n > 1 and not math.isnan(apart.value):
            verdict = ("within the noise of", "stronger than", "weaker than")[apart.sign]
            parts.append(f"{verdict} that of {title} ({figure(mean_of(found, key).value)})")
    if not parts:
        return []
    return [f"Its correlation with {_ASKED[key]} is {said(parts)}."]


def _table(kind: str, keys: list, frames: dict) -> Table:
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
    return Table(caption, ["", *map(model_title, models)], rows)


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
