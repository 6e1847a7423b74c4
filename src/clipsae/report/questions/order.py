"""What becomes of the paper's order of variants under held-out counting and contrastive ranking?"""

import math
import statistics

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from clipsae.report import published
from clipsae.report.names import SIX, column_order, listed, model_style, model_title
from clipsae.report.plots import STYLE, Plot, legend_below
from clipsae.report.questions.evidence import Evidence, Setting, mean_of, of
from clipsae.report.questions.question import NOISE, Question, Table, figure, interval
from clipsae.report.questions.statistics import agreement, difference

USUAL = ("paper", "frequency")
SHOWN = "on_5"


def ask(evidence: Evidence) -> Question:
    """The variants' order by each protocol and ranking, beside the published one."""
    question = Question(
        "What becomes of the paper's order of variants under held-out counting and contrastive "
        "ranking?",
        ("main_topn",),
        limits=[
            "The published order is that of SAEs of ViT-B/16 on ImageNet, averaged over eleven "
            "datasets; ours are of a small CLIP on one dataset of rendered scenes.",
            "Which codes count is set by each recipe's threshold, a tenth of its active codes; the "
            "order may depend on it (the last question).",
            "The latents of a class are counted on the images that are evaluated: on more images "
            "than these, the same SAEs have higher accuracies.",
            "An order of variants within the noise of each other means nothing: ranked by "
            "frequency, few latents are near chance (1.25 %) for most of them. With six variants, "
            "a tau below about 0.8 is no more than chance often gives.",
        ],
    )
    settings = [s for s in evidence.settings(share=False) if s.dataset == _dataset(evidence)]
    settings.sort(key=lambda s: (s.ranking != USUAL[1], s.protocol != USUAL[0]))
    frames = {s: evidence.mains(evidence.within(s)) for s in settings}
    frames = {s: found for s, found in frames.items() if len(found) > 1}
    if not frames:
        return question
    models = [m for m in SIX if all(m in found for found in frames.values())]
    keys = {key for found in frames.values() for frame in found.values() for key in frame.key}
    keys = sorted((k for k in keys if k.startswith("on_") and k != "on_all"), key=column_order)
    if len(models) < 2 or not keys:
        return question
    paper = {key: _published(models, key) for key in keys}
    means = {
        s: {key: [mean_of(found[m], key).value for m in models] for key in keys}
        for s, found in frames.items()
    }
    answer, taus, base = [], [], next(iter(frames))
    at = SHOWN if SHOWN in keys else keys[0]
    for setting, found in frames.items():
        first, rest = _first(found, models, at)
        tied = [m for m in rest if difference(of(found[first], at), of(found[m], at)).sign == 0]
        with_noise = f", within the noise of {', '.join(map(model_title, tied))}" if tied else ""
        known = {key: agreement(means[setting][key], paper[key]) for key in keys if paper[key]}
        known = {key: tau for key, tau in known.items() if not math.isnan(tau)}
        agrees = (
            "; Kendall's tau with the published order is "
            f"{listed([figure(tau) for tau in known.values()])} at {listed(list(known))}"
            if known
            else ""
        )
        answer.append(
            f"With the {setting.protocol} protocol and ranking by {setting.ranking}, "
            f"{model_title(first)} is first at {at} "
            f"({interval(mean_of(found[first], at), '.1f')} %){with_noise}{agrees}."
        )
    for setting in frames:
        row = [setting.title]
        for key in keys:
            against = paper[key]
            row.append(figure(agreement(means[setting][key], against)) if against else "")
            row.append(
                figure(agreement(means[setting][key], means[base][key])) if setting != base else ""
            )
        taus.append(row)
    tables = [
        Table(
            f"{key} in percent: means over seeds with half their 95 % intervals; in brackets the "
            f"rank. Two variants are within the noise where {NOISE}.",
            ["", *(setting.title for setting in frames), *(["published"] if paper[key] else [])],
            [
                [
                    model_title(model),
                    *(_ranked(found, models, model, key) for found in frames.values()),
                    *([f"{paper[key][i]:.1f} ({_rank(paper[key], i)})"] if paper[key] else []),
                ]
                for i, model in enumerate(models)
            ],
        )
        for key in keys
    ]
    head = ["", *(f"{key}, {what}" for key in keys for what in ("published", "first row"))]
    tables.append(
        Table(
            "Kendall's tau-b of the order with the published one and with that of the "
            "first row: 1 the same, -1 the reverse.",
            head,
            taus,
        )
    )
    used = evidence.accuracies
    used = used[
        used.evaluation.isin({e for f in frames.values() for x in f.values() for e in x.evaluation})
    ]
    plots = [_plot(frames, models, at)]
    return Question(question.title, question.grids, answer, tables, plots, question.limits, used)


def _dataset(evidence: Evidence) -> str:
    settings = evidence.settings(share=False)
    return settings[0].dataset if settings else ""


def _published(models: list[str], key: str) -> list[float]:
    """Means over the paper's datasets; empty where it lacks one."""
    known = published.zero_shot()
    found = [
        [float(v) for (_, m, k), v in known.items() if (m, k) == (model, key)] for model in models
    ]
    return [statistics.fmean(values) for values in found] if all(found) else []


def _first(found: dict, models: list[str], key: str) -> tuple[str, list[str]]:
    ordered = sorted(models, key=lambda m: -np.nan_to_num(mean_of(found[m], key).value, nan=-1))
    return ordered[0], ordered[1:]


def _rank(values: list[float], at: int) -> int:
    return 1 + sum(value > values[at] for value in values)


def _ranked(found: dict, models: list[str], model: str, key: str) -> str:
    values = [mean_of(found[m], key).value for m in models]
    text = interval(mean_of(found[model], key), ".1f")
    return f"{text} ({_rank(values, models.index(model))})" if text else ""


def _plot(frames: dict[Setting, dict], models: list[str], key: str) -> Plot:
    """A line a variant over the settings."""
    with matplotlib.rc_context(STYLE):
        plot = Figure(figsize=(8.0, 3.6), layout="constrained")
        axes = plot.subplots()
        for at, model in enumerate(models):
            colour, marker = model_style(model, models)
            means = [mean_of(found[model], key) for found in frames.values()]
            places = [i + 0.05 * (at - len(models) / 2) for i in range(len(means))]
            spread = [one.bar for one in means]
            style = {"color": colour, "marker": marker, "label": model_title(model)}
            axes.errorbar(places, [one.value for one in means], yerr=spread, **style)
        axes.set_xticks(range(len(frames)), [setting.title for setting in frames])
        axes.set_ylabel(f"{key}, %")
        axes.set_ylim(bottom=0)
        legend_below(plot, axes, 6)
    caption = "Bars: 95 % intervals over seeds."
    return Plot("order", f"{key} by protocol and ranking", caption, plot)
