"""What of the README's "Sparsemax against TopK" holds under fair counting thresholds?"""

import matplotlib
from matplotlib.figure import Figure

from clipsae.report.names import column_order, model_style, model_title
from clipsae.report.plots import STYLE, Plot, legend_below
from clipsae.report.questions.evidence import Evidence, Setting, mean_of, of, said
from clipsae.report.questions.question import NOISE, Question, Table, interval
from clipsae.report.questions.statistics import difference

PAIR = ("sparsemax", "topk")


def ask(evidence: Evidence) -> Question:
    """on_n of both with the same share of their active codes counted."""
    question = Question(
        "Do a few latents of Sparsemax carry more than equally few of TopK, where the same share "
        "of their active codes is counted?",
        ("shares",),
        limits=[
            "The share equalises how many codes count, not how many a latent has: a dictionary "
            "with latents that are active everywhere still loses its first places to them.",
            "It is one dataset, and one recipe each.",
        ],
    )
    settings = sorted(evidence.settings(share=True), key=lambda s: (s.ranking, -s.share))
    frames = {s: evidence.mains(evidence.within(s)) for s in settings}
    frames = {s: found for s, found in frames.items() if set(PAIR) <= found.keys()}
    if not frames:
        return question
    ours, theirs = (model_title(model) for model in PAIR)
    answer, table = [], []
    for setting, found in frames.items():
        keys = {key for key in found[PAIR[0]].key if key.startswith("on_")}
        keys = sorted(keys & set(found[PAIR[1]].key), key=column_order)
        signs: dict[int, list[str]] = {1: [], -1: [], 0: []}
        for key in keys:
            apart = difference(of(found[PAIR[0]], key), of(found[PAIR[1]], key))
            signs[apart.sign].append(key)
        parts = [f"{ours} is ahead at {said(signs[1])}"] * bool(signs[1])
        parts += [f"{theirs} is ahead at {said(signs[-1])}"] * bool(signs[-1])
        parts += [f"neither beyond noise at {said(signs[0])}"] * bool(signs[0])
        rule = f"With {setting.share:.0%} of the codes counted ({setting.ranking})".replace(
            "%", " %"
        )
        answer.append(f"{rule} {'; '.join(parts)}.")
        for model in PAIR:
            cells = []
            for key in keys:
                text = interval(mean_of(found[model], key), ".1f")
                ahead = signs[1 if model == PAIR[0] else -1]
                cells.append(f"**{text}**" if key in ahead else text)
            table.append([setting.title, model_title(model), *cells])
    caption = (
        "on_n in percent: means over seeds with half their 95 % intervals. Bold: ahead of the "
        f"other beyond the noise of seeds. Within it: {NOISE}."
    )
    used = evidence.accuracies
    kept = {e for found in frames.values() for m in PAIR for e in found[m].evaluation}
    return Question(
        question.title,
        question.grids,
        answer,
        [Table(caption, ["setting", "SAE", *keys], table)],
        [_plot(frames, [key for key in keys if key != "on_all"])],
        question.limits,
        used[used.evaluation.isin(kept)],
    )


def _plot(frames: dict[Setting, dict], keys: list[str]) -> Plot:
    """Accuracy over n, a panel a setting."""
    rows = -(-len(frames) // 3)
    with matplotlib.rc_context(STYLE):
        plot = Figure(figsize=(8.0, 0.8 + 2.4 * rows), layout="constrained")
        panels = list(plot.subplots(rows, 3, squeeze=False, sharey=True).flat)
        for axes, (setting, found) in zip(panels, frames.items(), strict=False):
            for model in PAIR:
                colour, marker = model_style(model, PAIR)
                means = [mean_of(found[model], key) for key in keys]
                spread = [one.bar for one in means]
                style = {"color": colour, "marker": marker, "label": model_title(model)}
                axes.errorbar(range(len(keys)), [m.value for m in means], yerr=spread, **style)
            axes.set_xticks(range(len(keys)), [key.removeprefix("on_") for key in keys])
            axes.set_title(f"{setting.ranking}, {setting.share:.0%}", fontsize=9, loc="left")
            axes.set_xlabel("n")
        panels[0].set_ylabel("on_n, %")
        for axes in panels[len(frames) :]:
            axes.set_visible(False)
        legend_below(plot, panels[0], 2)
    caption = "A panel a ranking and share of the active codes that count. Bars: 95 % intervals."
    return Plot("shares", "Sparsemax against TopK at equal shares", caption, plot)
