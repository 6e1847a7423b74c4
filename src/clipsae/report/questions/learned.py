"""Do trained SAEs beat frozen and untrained ones, and on which measures?"""

import math
from collections import Counter

import matplotlib
from matplotlib.figure import Figure

from clipsae.evaluation.numbers import Number
from clipsae.report.names import column_order, model_style, model_title
from clipsae.report.plots import INK, STYLE, Plot, legend_below
from clipsae.report.questions.evidence import (
    TRAINED,
    Evidence,
    mean_of,
    of,
    said,
)
from clipsae.report.questions.question import (
    NOISE,
    Question,
    Table,
    accuracy,
    counted,
    interval,
    measures,
)
from clipsae.report.questions.statistics import difference
from clipsae.report.settings import FITTED, UNTRAINED

_DRAWN = ("patch_concepts_found", "patch_f1", "object_concepts_found", "fvu", "on_5", "on_10")
_WHICH = {
    UNTRAINED: "that are untrained",
    "decoder frozen": "whose decoder is frozen",
    "decoder softly frozen": "whose decoder is softly frozen",
    "encoder frozen": "whose encoder is frozen",
}
_MARKERS = ("x", "s", "D", "v")  # of twins


def ask(evidence: Evidence) -> Question:
    """For each measure and kind of twin, in how many variants training is better beyond noise."""
    rows = evidence.comparable()
    trained = evidence.mains(rows)
    twins = {role: evidence.mains(rows, role) for role in evidence.twins}
    fitted = evidence.mains(rows, FITTED)
    twins = {role: found for role, found in twins.items() if found.keys() & trained.keys()}
    question = Question(
        "Do trained SAEs beat frozen and untrained ones, and on which measures?",
        (
            *("main", "main_topn", "untrained", "untrained_topn", "frozen", "frozen_topn"),
            *("frozen_sparsemax", "frozen_sparsemax_topn", "fitted", "fitted_topn"),
        ),
        limits=[
            "A frozen or untrained SAE has the recipe of its trained twin: with a recipe of its "
            "own it might do better. Untrained ReLU and Gated SAEs have hundreds of active "
            "latents, and most untrained SAEs reconstruct worse than the mean token would.",
            "The baselines are not as sparse as the trained SAEs: raw neurons, PCA and ICA keep "
            "all of a token, so that measures of what is kept favour them. ICA, k-means and PCA "
            "are fitted to tokens; the directions of texts know the concepts' names.",
            "Many differences are tested at 95 % each: one in forty is called better, and as many "
            "worse, by chance alone. Few seeds find large differences only. "
            "Measures that say nearly the same, such as FVU and FVU per token, count each.",
            "It is one backbone on rendered scenes, whose patches were taught to name what they "
            "show; directions that exist before training may be rarer in other models.",
        ],
    )
    if not trained or not (twins or fitted):
        return question
    accuracies = {k for k in rows.key if k.startswith("on_")}
    asked = [n for n in measures() if n.key in set(rows.key)]
    asked += [accuracy(key) for key in sorted(accuracies, key=column_order)]
    verdicts: Counter[tuple[str, str]] = Counter()  # of (role, verdict)
    better_unlearned: list[Number] = []
    comparable, table = 0, []
    for number in asked:
        cells = []
        for role, found in twins.items():
            counts: Counter[str] = Counter()
            for model in found.keys() & trained.keys():
                apart = difference(of(trained[model], number.key), of(found[model], number.key))
                if apart.n > 1:
                    sign = apart.sign * (-1 if number.better == "min" else 1)
                    counts[("same", "better", "worse")[sign]] += 1
            verdicts.update({(role, verdict): n for verdict, n in counts.items()})
            total = sum(counts.values())
            cells.append(f"{counts['better']} / {counts['same']} / {counts['worse']}" * (total > 0))
        best, unlearned = (_best(frames, number)[0] for frames in (trained, fitted))
        if best and unlearned:
            comparable += 1
            apart = difference(
                of(fitted[unlearned], number.key), of(trained[best], number.key)
            ).sign
            if apart * (-1 if number.better == "min" else 1) > 0:
                better_unlearned.append(number)
        shown = [
            f"{interval(mean_of(frames[model], number.key), number.format)} ({model_title(model)})"
            if model
            else ""
            for frames, model in ((trained, best), (fitted, unlearned))
        ]
        table.append([number.label, *cells, *shown])
    answer = []
    for role in twins:
        of_role = {v: n for (r, v), n in verdicts.items() if r == role}
        if total := sum(of_role.values()):
            answer.append(
                f"Against SAEs {_WHICH.get(role, role)}, training is better in "
                f"{of_role.get('better', 0)} of {total} comparisons of a variant and a measure, "
                f"worse in {of_role.get('worse', 0)}, and within the noise of seeds in the rest."
            )
    if comparable:
        answer.append(
            f"The best baseline that is no trained SAE ({said(map(model_title, fitted))}) is "
            "better than the best trained variant, beyond the noise of seeds, on "
            f"{len(better_unlearned)} of {counted(comparable, 'measure')}"
            + (f" ({said(n.label for n in better_unlearned)})." if better_unlearned else ".")
        )
    head = ["measure", *twins, "best trained", "best not learned"]
    caption = (
        "In how many variants training is better / within the noise / worse than the same variant "
        f"untrained or frozen. Within the noise: {NOISE}. Empty: one seed. Beside it the best "
        "trained variant and the best SAE that is not learned: the mean over seeds with half its "
        "95 % interval."
    )
    used = [*trained.values(), *(f for found in twins.values() for f in found.values())]
    return Question(
        question.title,
        question.grids,
        answer,
        [Table(caption, head, table)],
        _plots(trained, twins, fitted, [n for n in asked if n.key in _DRAWN]),
        question.limits,
        rows[rows.recipe.isin({r for f in [*used, *fitted.values()] for r in f.recipe})],
    )


def _best(frames: dict, number: Number) -> tuple[str, float]:
    """The model with the best mean; "" where none has the measure."""
    means = {model: mean_of(found, number.key).value for model, found in frames.items()}
    means = {model: value for model, value in means.items() if not math.isnan(value)}
    if not means:
        return "", math.nan
    best = (min if number.better == "min" else max)(means, key=means.__getitem__)
    return best, means[best]


def _plots(trained: dict, twins: dict, fitted: dict, drawn: list[Number]) -> list[Plot]:
    """A panel a measure: every variant trained, frozen and untrained."""
    if not drawn:
        return []
    models = list(trained)
    rows = -(-len(drawn) // 2)
    marker_of = {TRAINED: "o"} | dict(zip(twins, _MARKERS, strict=False))
    with matplotlib.rc_context(STYLE):
        plot = Figure(figsize=(8.0, 0.9 + 2.2 * rows), layout="constrained")
        panels = list(plot.subplots(rows, 2, squeeze=False).flat)
        for axes, number in zip(panels, drawn, strict=False):
            means = []
            for place, model in enumerate(models):
                colour = model_style(model, models)[0]
                points = {TRAINED: trained[model]} | {
                    r: f[model] for r, f in twins.items() if model in f
                }
                for at, (role, found) in enumerate(points.items()):
                    mean = mean_of(found, number.key)
                    if math.isnan(mean.value):
                        continue
                    means.append(mean.value)
                    axes.errorbar(
                        place + 0.12 * (at - len(points) / 2),
                        mean.value,
                        yerr=mean.bar,
                        color=colour,
                        marker=marker_of[role],
                        markersize=5,
                        markerfacecolor=colour if role == TRAINED else "none",
                    )
            best, value = _best(fitted, number)
            if best:
                means.append(value)
                axes.axhline(value, color=INK, linewidth=1, linestyle=":")
            if len(set(means)) > 1:  # intervals of few seeds are long, and would flatten the rest
                margin = 0.4 * (max(means) - min(means))
                axes.set_ylim(min(means) - margin, max(means) + margin)
            axes.set_xticks(range(len(models)), map(model_title, models), rotation=30, ha="right")
            axes.set_title(number.label, fontsize=10, loc="left")
        for axes in panels[len(drawn) :]:
            axes.set_visible(False)
        for role in (TRAINED, *twins):
            marker = marker_of[role]
            fill = INK if role == TRAINED else "none"
            plot.axes[0].plot(
                [], [], linestyle="", marker=marker, color=INK, markerfacecolor=fill, label=role
            )
        legend_below(plot, plot.axes[0], 5)
    caption = (
        "Bars: 95 % intervals over seeds, cut where they are long. Dotted: the best SAE that is "
        "not learned."
    )
    return [Plot("learned", "Trained, frozen and untrained SAEs", caption, plot)]
