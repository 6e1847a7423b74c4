"""The whole report as an object: sections of tables and plots, findings, gaps, origins."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipsae.report import plots, rankings, tables
from clipsae.report.collect import NO_K, Collected
from clipsae.report.findings import concepts_found, findings, tells_apart
from clipsae.report.missing import Commands, Missing, fewer_seeds, missing_cells, no_baselines
from clipsae.report.names import dataset_title, slug
from clipsae.report.plots import Plot
from clipsae.report.published import table_numbers
from clipsae.report.recipes import recipe_table
from clipsae.report.select import Selection
from clipsae.report.table import Table


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    name: str  # its anchor
    title: str
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    folded: list[Table] = field(default_factory=list)  # shown when asked for


@dataclass(frozen=True)
class Report:
    """Everything that is written."""

    selection: Selection  # what it rests on
    sections: list[Section]  # the first holds the averages
    differences: list[str]  # sentences on the settings that differ between results
    findings: list[str]  # sentences
    missing: list[Missing]  # gaps, with commands
    fewer: list[Missing]
    notes: list[str]  # on what was left out
    origins: list[dict[str, Any]]  # of each result that is used: where it comes from

    @property
    def tables(self) -> list[Table]:
        return [t for section in self.sections for t in (*section.tables, *section.folded)]

    @property
    def plots(self) -> list[Plot]:
        return [plot for section in self.sections for plot in section.plots]


def make_report(
    root: Path | str, found: Collected, selection: Selection, commands: Commands
) -> Report:
    """Build tables, plots and sentences from a selection of what the store at `root` holds."""
    missing = missing_cells(selection, commands)
    ways = rankings.side_by_side(selection)
    side_by_side = [] if ways is None else [rankings.rankings_table(selection, ways)]
    noise = _noise_section(selection)
    fidelity = tables.fidelity_table(selection)
    stability, unread = tables.stability_table(root, found, selection)
    swept = [plots.k_plot(selection, dataset) for dataset in selection.datasets]
    sections = [
        _overview(selection),
        *(_dataset_section(selection, found, dataset) for dataset in selection.datasets),
        Section("rankings", "Rankings of latents", side_by_side),
        Section("ablation", "Ablation", tables.ablation_tables(selection)),
        Section("k", "Sweep of k", plots=[plot for plot in swept if plot is not None]),
        noise,
        Section("beyond", "Beyond the paper", [t for t in (fidelity, stability) if not t.empty]),
        Section("recipes", "Recipes", [t for t in [recipe_table(selection)] if t.rows]),
    ]
    return Report(
        selection=selection,
        sections=[s for s in sections if s.tables or s.plots],
        differences=[*selection.differences, *_several_k(selection)],
        findings=[
            *findings(selection, missing),
            *(
                sentence
                for dataset in selection.datasets
                for sentence in concepts_found(selection, found.concepts, dataset)
            ),
            *([] if ways is None else rankings.order_kept(selection, ways)),
            *tells_apart([*noise.tables, *noise.folded]),
            *no_baselines(selection, commands),
        ],
        missing=missing,
        fewer=fewer_seeds(selection, commands),
        notes=[
            *(f"Skipped, unreadable: {line}" for line in [*found.problems, *unread]),
            *_counts(selection),
        ],
        origins=_origins(found, selection),
    )


def _overview(selection: Selection) -> Section:
    """Averages and ranks over the eleven datasets, and over others."""
    eleven = selection.eleven
    others = tuple(name for name in selection.classified if name not in eleven)
    called = "the eleven" if len(eleven) == 11 else f"{len(eleven)} of the eleven"
    kinds = [
        (eleven, "", f"{called} datasets"),
        (others, "_others", f"the {len(others)} other datasets"),
    ]
    if not eleven:
        kinds = [(others, "", f"{len(others)} datasets")]
    found = []
    for datasets, suffix, title in kinds:
        if len(datasets) < 2:
            continue
        found.append(tables.average_table(selection, datasets, f"average{suffix}", title))
        groups = [x for x in tables.compared(selection, datasets) if len(x.datasets) > 1]
        for at, group in enumerate(groups, start=1):
            rank = f"rank{suffix}" + (f"_{at}" if len(groups) > 1 else "")
            found.append(tables.rank_table(selection, group, rank))
    return Section("overview", "Average and ranks", found)


def _dataset_section(selection: Selection, found: Collected, dataset: str) -> Section:
    """Accuracy, sparsity and interpretability of one dataset."""
    number = table_numbers().get(dataset)
    accuracies = (
        tables.accuracy_tables(selection, dataset) if dataset in selection.classified else []
    )
    measured = tables.metric_tables(selection, dataset)
    recovery = tables.recovery_tables(selection, dataset)
    in_paper = dataset == tables.MEASURED_ON
    headlines = [t for t in [tables.headline_table(selection, dataset)] if not t.empty]
    drawn = (
        plots.accuracy_plot(selection, dataset),
        plots.sparsity_plot(selection, dataset),
        *plots.concept_plots(selection, found.concepts, dataset),
    )
    return Section(
        f"dataset-{slug(dataset)}",
        dataset_title(dataset) + (f" (Table {number})" if number else ""),
        [*accuracies[:1], *(measured if in_paper else headlines), *recovery],
        [plot for plot in drawn if plot is not None],
        [*accuracies[1:], *([] if in_paper else measured)],
    )


def _noise_section(selection: Selection) -> Section:
    """What tells variants apart, of each dataset with several seeds; the first is open."""
    found = [tables.noise_table(selection, dataset) for dataset in selection.datasets]
    found = [table for table in found if table.rows]
    drawn = [plot for plot in map(plots.noise_plot, found) if plot is not None]
    return Section("noise", "Noise of the seeds", found[:1], drawn, found[1:])


def _several_k(selection: Selection) -> list[str]:
    """Which k the tables show of lines that have several."""
    sentences = []
    for line in selection.lines:
        ks = sorted(plots.swept_k(selection.cells, line))
        if len(ks) > 1:
            sentences.append(
                f"{line.title} has results with k = {', '.join(map(str, ks))}. The tables show "
                f"k = {selection.k[line]} (task.k chooses another), the plots over k all of them."
            )
    return sentences


def _counts(selection: Selection) -> list[str]:
    """How many results were not used, or only cover a part of the images."""
    wanted, limit = selection.wanted, "evaluation.limit_images"
    runs = selection.runs.drop_duplicates("folder")
    settings = "".join(f", {name}={value}" for name, value in wanted.settings.items())
    ranking = ", ranked by contrast," * (wanted.ranking == "contrast")
    counts = {
        "superseded by a newer one with the same settings.": selection.superseded,
        f"excluded: not of the CLIP {wanted.clip} (weights {wanted.weights_title}, "
        f"{wanted.where}), the {wanted.protocol} protocol{ranking} and M = "
        f"{wanted.latents}{settings}.": (selection.unfitting),
        f"of a part of the images only ({limit}).": sum(
            dict(one).get(limit, "null") != "null" for one in runs.settings
        ),
    }
    return [
        f"{n} {'result is' if n == 1 else 'results are'} {what}" for what, n in counts.items() if n
    ]


def _origins(found: Collected, selection: Selection) -> list[dict[str, Any]]:
    rows = found.figures.sort_values("measured", kind="stable").drop_duplicates("folder")
    rows = rows[rows.folder.isin(selection.folders)].rename(columns={"folder": "name"})
    metas = [found.origins[name]["meta"] for name in rows.name]
    rows = rows[["name", "model", "dataset", "k", "seed", "finished"]].assign(
        kind="evaluation",
        k=rows.k.astype(object).where(rows.k != NO_K, ""),
        commit=[meta.get("git_commit") or "" for meta in metas],
        versions=[meta.get("versions") or {} for meta in metas],
        host=[meta.get("host") or "" for meta in metas],
    )
    return rows.to_dict("records")
