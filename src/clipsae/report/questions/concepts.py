"""Which variant recovers which concepts; splitting, merging and absorption against size and
sparsity."""

import math

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from clipsae.report.names import listed, model_style, model_title
from clipsae.report.plots import (
    BESIDE,
    ON_THE_MAP,
    STYLE,
    Plot,
    concept_areas,
    concept_map,
    legend_below,
)
from clipsae.report.questions.evidence import (
    TRAINED,
    Evidence,
    mean_of,
    of,
    recipe_title,
    said,
)
from clipsae.report.questions.question import (
    Question,
    Table,
    bounds,
    figure,
    interval,
    number_of,
)
from clipsae.report.questions.statistics import correlation, difference

FOUND = "patch_concepts_found"
_SHAPES_OF = ("patch_splitting", "patch_merging", "patch_absorption")
_LEVEL = "patch"


def ask(evidence: Evidence) -> Question:
    """AUROC of each concept's latent, by variant; and numbers over latents and L0."""
    rows = evidence.numbers
    rows = rows[rows.role == TRAINED]
    question = Question(
        "Which variant recovers which concepts; how do splitting, merging and absorption depend on "
        "dictionary size and sparsity?",
        ("main", "sizes", "sparsities"),
        limits=[
            "The concepts are those that the renderer knows. A latent for another one, such as an "
            "edge at some angle, counts for nothing here.",
            "A correlation is of a straight line over the logarithm: where a curve turns, as that "
            "of the concepts found may with L0, the figure says more. Its interval takes SAEs of "
            "one recipe, which differ by their seed alone, as independent.",
            "Sizes and sparsities are trained with the rate and the number of steps that were "
            "chosen for the main recipe: a large dictionary may need more.",
        ],
    )
    frames = evidence.mains(rows[rows.key == FOUND])
    if not frames:
        return question
    answer, tables, plots = [], [], []
    means = {model: mean_of(found, FOUND) for model, found in frames.items()}
    means = {m: found for m, found in means.items() if not math.isnan(found.value)}
    if means:
        best = max(means, key=lambda m: means[m].value)
        worst = min(means, key=lambda m: means[m].value)
        fewest = ""
        if best != worst:
            fewest = f", {model_title(worst)} the fewest ({interval(means[worst], '.1%')})"
        mine = of(frames[best], FOUND)
        tied = [m for m in means if m != best and difference(mine, of(frames[m], FOUND)).sign == 0]
        noise = f", within the noise of {listed([model_title(m) for m in tied])}" if tied else ""
        answer.append(
            f"Among siblings and on held-out scenes {model_title(best)} finds the most concepts "
            f"({interval(means[best], '.1%')}){noise}{fewest}."
        )
    areas = _areas(evidence, frames)
    if areas is not None:
        mean = areas.groupby(lambda concept: concept.partition("=")[0], sort=False).mean().T
        of_models = mean.drop(index=[*BESIDE], errors="ignore")
        best_of = of_models.max()
        beside = {"random": "random directions", "probe": "a probe"}
        beside = {of: said for of, said in beside.items() if of in mean.index}
        ends = [
            f"{attribute} is recovered {how} ({figure(best_of[attribute])} by "
            f"{of_models[attribute].idxmax()}"
            + "".join(f", {said} {figure(mean[attribute][of])}" for of, said in beside.items())
            + ")"
            for attribute, how in ((best_of.idxmax(), "best"), (best_of.idxmin(), "worst"))
        ]
        answer.append(f"By the mean AUROC over an attribute's values, {' and '.join(ends)}.")
        table = [[name, *(figure(v) for v in row)] for name, row in mean.iterrows()]
        caption = (
            "AUROC of a concept's latent among its siblings, on scenes that it was not chosen on: "
            "mean over the attribute's values and over seeds."
        )
        tables.append(Table(caption, ["", *mean.columns], table))
        caption = (
            "AUROC of a concept's latent among siblings, chosen on other scenes than those it is "
            f"scored on; {ON_THE_MAP}"
        )
        title = "Which variant recovers which concept"
        plots.append(Plot("concepts", title, caption, concept_map(areas)))
    answer += _trends(rows)
    varied = _varied(rows)
    if len(varied):
        keys = [FOUND, *(key for key in _SHAPES_OF if key in set(rows.key))]
        table = []
        for recipe, found in varied.groupby("recipe", sort=False):
            cells = [interval(mean_of(found, key), number_of(key).format) for key in keys]
            l0 = interval(mean_of(found, "l0"), ".1f")
            table.append([recipe_title(recipe), str(int(found.latents.iloc[0])), l0, *cells])
        caption = "Means over seeds with half their 95 % intervals."
        tables.append(
            Table(caption, ["", "M", "L0", *(number_of(key).label for key in keys)], table)
        )
        plots += [_curves(varied, keys, by) for by in ("latents", "l0") if _several(varied, by)]
    used = rows[rows.recipe.isin({*varied.recipe, *(r for f in frames.values() for r in f.recipe)})]
    return Question(question.title, question.grids, answer, tables, plots, question.limits, used)


def _areas(evidence: Evidence, frames: dict) -> pd.DataFrame | None:
    """`concept_areas` of the main recipes in `frames`, by the models' titles; None: not known."""
    found = evidence.concepts
    if found.empty or "auroc" not in found:
        return None
    recipes = {recipe for frame in frames.values() for recipe in frame.recipe}
    found = found[found.level.eq(_LEVEL) & found.recipe.isin(recipes)]
    if found.empty:
        return None
    areas = concept_areas(found, "model")
    titles = {model: model_title(model) for model in areas if model not in BESIDE}
    return areas.rename(columns=titles)


def _varied(rows: pd.DataFrame) -> pd.DataFrame:
    """Results of models that were trained with several sizes or sparsities."""
    counts = rows.groupby("model").recipe.nunique()
    return rows[rows.model.isin(counts[counts > 1].index)]


def _along(rows: pd.DataFrame, by: str) -> pd.DataFrame:
    """Of the rows those whose recipes differ in size alone, or not in size (by L0)."""
    words = rows.recipe.str.split().map(lambda recipe: {w.partition("=")[0] for w in recipe})
    if by == "latents":
        return rows[words.map(lambda names: names <= {"model", "model.latents"})]
    return rows[words.map(lambda names: "model.latents" not in names)]


def _several(rows: pd.DataFrame, by: str) -> bool:
    if by == "latents":
        return bool((rows.groupby("model").latents.nunique() > 1).any())
    return bool((rows.groupby("model").recipe.nunique() > 1).any()) and "l0" in set(rows.key)


def _trends(rows: pd.DataFrame) -> list[str]:
    """A sentence: how the numbers move with the logarithm of size and of L0, over all SAEs of the
    models that were varied, each model about its own mean."""
    varied = _varied(rows)
    wide = varied.pivot_table(
        index=["model", "recipe", "seed", "latents"], columns="key", values="value"
    )
    wide = wide.reset_index()
    sentences = []
    for by, words in (("latents", "dictionary size"), ("l0", "L0")):
        if by not in wide or wide.groupby("model")[by].nunique().max() < 2:
            continue
        kept = _along(wide, by)
        kept = kept[kept.groupby("model").recipe.transform("nunique") > 1]
        if not len(kept):
            continue
        x = np.log(kept[by].astype(float).clip(lower=1e-9))
        x -= x.groupby(kept.model).transform("mean")
        parts = []
        for key in (FOUND, *_SHAPES_OF):
            if key not in kept:
                continue
            y = kept[key] - kept[key].groupby(kept.model).transform("mean")
            found = correlation(x.tolist(), y.tolist())
            if not math.isnan(found.value) and not math.isnan(found.low):
                verb = ("shows no clear trend", "rises", "falls")[found.sign]
                parts.append(f"{number_of(key).label} {verb} (r = {bounds(found)})")
        if parts:
            sentences.append(f"With {words}, over {len(kept)} SAEs, {said(parts)}.")
    return sentences


def _curves(varied: pd.DataFrame, keys: list[str], by: str) -> Plot:
    """Numbers over size or L0, a line a model."""
    models = list(dict.fromkeys(varied.model))
    with matplotlib.rc_context(STYLE):
        rows = -(-len(keys) // 2)
        plot = Figure(figsize=(8.0, 0.9 + 2.1 * rows), layout="constrained")
        panels = list(plot.subplots(rows, 2, squeeze=False).flat)
        for axes, key in zip(panels, keys, strict=False):
            for model in models:
                colour, marker = model_style(model, models)
                points = []
                of_model = _along(varied, by)
                of_model = of_model[of_model.model == model]
                for _, found in of_model.groupby("recipe", sort=False):
                    at = found.latents.iloc[0] if by == "latents" else mean_of(found, "l0").value
                    mean = mean_of(found, key)
                    points.append((float(at), mean.value, mean.bar))
                if not points:
                    continue
                x, y, spread = zip(*sorted(points), strict=True)
                style = {"color": colour, "marker": marker, "markersize": 5}
                axes.errorbar(x, y, yerr=spread, **style, label=model_title(model))
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_title(number_of(key).label, fontsize=10, loc="left")
            axes.set_xlabel("latents M" if by == "latents" else "L0: active latents per token")
        for axes in panels[len(keys) :]:
            axes.set_visible(False)
        legend_below(plot, panels[0], 5)
    what = "dictionary size" if by == "latents" else "sparsity"
    caption = "Each point a recipe. Bars: 95 % intervals over seeds."
    return Plot(f"concepts_{by}", f"Concepts and {what}", caption, plot)
