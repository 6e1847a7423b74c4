"""The report's opening: what the data say, in sentences that are computed from them."""

import math
import statistics
from collections.abc import Iterator

from clipsae.report.accuracy_tables import accuracy_columns, dataset_table, pivot, published_pivot
from clipsae.report.collect import NO_K
from clipsae.report.missing import ALL, Missing
from clipsae.report.names import WITH_K, column_title, dataset_title, model_title
from clipsae.report.plots import mean_support
from clipsae.report.select import Selection
from clipsae.report.table import number

LARGEST_DIFFERENCE = 2.0  # points between `no_sae` and the published figure
GUIDED_BY = "on_10"


def findings(selection: Selection, missing: list[Missing]) -> list[str]:
    """Sentences, most important first; those that the data do not carry are left out."""
    datasets = selection.eleven or selection.others
    present = tuple(m for m in selection.models if len(selection.of(m)))
    return [
        *_filled(selection, missing),
        *_winners(selection, present, datasets),
        *_against_published(selection),
        *_sparsity(selection, present),
        *_guidance(selection),
    ]


def _filled(selection: Selection, missing: list[Missing]) -> Iterator[str]:
    pairs = [(m, d) for m in selection.expected for d in selection.datasets]
    empty = {(gap.model, gap.dataset) for gap in missing if gap.what == ALL}
    filled = len(pairs) - len(empty & set(pairs))
    seeds = selection.cells.seeds
    spread = ""
    if len(seeds) and seeds.max() > 1:
        low, high = int(seeds.min()), int(seeds.max())
        spread = f", with {low} to {high} seeds each" if low < high else f", with {high} seeds each"
    yield (
        f"{filled} of {len(pairs)} pairs of a model and a dataset have results{spread}"
        + (f"; {len(missing)} commands would fill what is missing." if missing else ".")
    )


def _winners(
    selection: Selection, present: tuple[str, ...], datasets: tuple[str, ...]
) -> Iterator[str]:
    """Who leads at each n, over the datasets that all present models share."""
    if len(present) < 2:
        return
    by_model: dict[str, list[str]] = {}
    counts, agree, compared = set(), 0, 0
    for column in accuracy_columns(selection, datasets):
        ours = pivot(selection, present, datasets, column)
        if column == "no_sae" or ours.empty:
            continue
        mean = ours.mean()
        best = str(mean.idxmax())
        counts.add(len(ours))
        title = column_title(column, selection.wanted.latents)
        by_model.setdefault(best, []).append(f"{title} ({number(mean[best], 2)} %)")
        theirs = published_pivot(present, list(ours.index), column)
        if len(theirs):
            compared += 1
            agree += theirs.mean().idxmax() == best
    if not by_model:
        yield "No dataset has results of all models that have any: none can be called the best yet."
        return
    low, high = min(counts), max(counts)
    over = f"{low} to {high} datasets" if low < high else f"{high} datasets"
    where = "on the one dataset" if high == 1 else f"over the {over}"
    parts = [f"{model_title(m)} at {_listed(columns)}" for m, columns in by_model.items()]
    yield f"Highest mean accuracy {where} that all models with results share: {'; '.join(parts)}."
    if compared:
        yield (
            f"The best model is the published one at {agree} of {compared} values of n, over the "
            "same datasets."
        )


def _against_published(selection: Selection) -> Iterator[str]:
    differences, alone = [], {}
    for dataset in selection.eleven:
        for row in dataset_table(selection, dataset).rows:
            for column, cell in row.cells.items():
                if cell.difference is None:
                    continue
                if column == "no_sae":
                    alone[dataset] = cell.difference
                else:
                    differences.append((cell.difference, row.labels[0], dataset, column))
    if differences:
        middle = statistics.median(abs(d) for d, *_ in differences)
        largest, model, dataset, column = max(differences, key=lambda found: abs(found[0]))
        yield (
            f"{len(differences)} accuracies have a published counterpart: they differ by "
            f"{number(middle, 2)} points in the median, most in "
            f"{column_title(column, selection.wanted.latents)} of {model} on "
            f"{dataset_title(dataset)} ({number(largest, 2, signed=True)})."
        )
    far = {name: off for name, off in alone.items() if abs(off) > LARGEST_DIFFERENCE}
    if far:
        listed = [f"{dataset_title(d)} ({number(far[d], 2, signed=True)})" for d in far]
        yield (
            f"CLIP without an SAE is more than {LARGEST_DIFFERENCE:g} points off the published "
            f"figure on {_listed(listed)}: look at the split, the class names and the prompts"
            + (
                "; Caltech101's published one rests on mismatched names." * ("caltech101" in far)
                or "."
            )
        )


def _sparsity(selection: Selection, present: tuple[str, ...]) -> Iterator[str]:
    """Fewest latents and lowest FVU, over the datasets that all present models share."""
    metrics = selection.metrics
    tables = {}
    for metric in ("active", "fvu"):
        of = metrics[(metrics.metric == metric) & metrics.model.isin(present)]
        of = of[of.k == of.model.map(selection.k)]
        wide = of.pivot_table(index="dataset", columns="model", values="value")
        tables[metric] = wide.reindex(columns=list(present)).dropna().mean()
    active, fvu = tables["active"].dropna(), tables["fvu"].dropna()
    if len(active) < 2 or len(fvu) < 2:
        return
    sparse, faithful = str(active.idxmin()), str(fvu.idxmin())
    yield (
        f"{model_title(sparse)} uses the fewest latents of a token ({number(active[sparse], 1)}, "
        f"FVU {number(fvu[sparse], 3)}); {model_title(faithful)} reconstructs best (FVU "
        f"{number(fvu[faithful], 3)}, {number(active[faithful], 1)} latents)."
        if sparse != faithful
        else f"{model_title(sparse)} uses the fewest latents of a token "
        f"({number(active[sparse], 1)}) and reconstructs best (FVU {number(fvu[sparse], 3)})."
    )


def _guidance(selection: Selection) -> Iterator[str]:
    """How good the k is that the Sparsemax SAE's mean support suggests, over all sweeps."""
    cells = selection.cells
    supports, losses = [], []
    for dataset in selection.datasets:
        support = mean_support(selection, dataset)
        for model in WITH_K:
            of = cells[(cells.model == model) & (cells.dataset == dataset) & (cells.k > NO_K)]
            of = of[of.column == GUIDED_BY].set_index("k").accuracy
            if support is None or len(of) < 2:
                continue
            nearest = min(of.index, key=lambda k: abs(math.log(k / support)))
            supports.append(support)
            losses.append(float(of.max() - of[nearest]))
    if not losses:
        return
    low, high = number(min(supports), 1), number(max(supports), 1)
    best = sum(loss == 0 for loss in losses)
    mean = number(statistics.fmean(losses), 2)
    yield (
        f"The Sparsemax SAE's mean support is {low if low == high else f'{low} to {high}'}. The "
        f"swept k nearest to it is the best by {GUIDED_BY} in {best} of "
        f"{_count(len(losses), 'sweep')} of TopK and BatchTopK, and {mean} points below the best "
        "on average."
    )


def differing_settings(selection: Selection, origins: dict[str, dict]) -> list[str]:
    """Options that are not the same in all results of a model: those cells are not alike."""
    folders = selection.runs.drop_duplicates("folder")
    lines = []
    for model, of in folders.groupby("model", sort=False):
        values: dict[str, set[str]] = {}
        for folder in of.folder:
            for name, value in _settings(origins[folder]["config"]).items():
                values.setdefault(name, set()).add(str(value))
        lines += [
            f"{model_title(str(model))}: {name} is {_listed(sorted(found), 'and')}"
            for name, found in values.items()
            if len(found) > 1
        ]
    return lines


def _settings(config: dict) -> dict[str, object]:
    """What should be alike in the results of one model."""
    model = {k: v for k, v in (config.get("model") or {}).items() if k not in ("k", "compile")}
    of_evaluation = ("split", "limit_images", "renormalize_text")
    of_trainer = ("max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val")
    evaluation, trainer = config.get("evaluation") or {}, config.get("trainer") or {}
    dataset = config.get("dataset") or {}
    of_dataset = ("split_source", "classnames", "templates")
    return {
        **{f"model.{k}": v for k, v in model.items()},
        **{f"evaluation.{k}": evaluation[k] for k in of_evaluation if k in evaluation},
        **{f"trainer.{k}": trainer[k] for k in of_trainer if k in trainer},
        **{f"dataset.{k}": dataset[k] for k in of_dataset if k in dataset},
        "train_dataset.name": (config.get("train_dataset") or {}).get("name", "the dataset itself"),
    }


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("s" if n != 1 else "")


def _listed(words: list[str], last: str = "and") -> str:
    return ", ".join(words[:-1]) + f" {last} {words[-1]}" if len(words) > 1 else words[0]
