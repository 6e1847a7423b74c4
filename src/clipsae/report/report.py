"""The whole report as an object: sections of tables and plots, findings, gaps, origins."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from clipsae.report import ablation, accuracy_tables, metric_tables, plots
from clipsae.report.collect import Collected
from clipsae.report.findings import findings
from clipsae.report.metric_tables import MEASURED_ON
from clipsae.report.missing import Commands, Missing, fewer_seeds, missing_cells
from clipsae.report.names import dataset_title, model_title, slug
from clipsae.report.plots import Plot
from clipsae.report.published import table_numbers
from clipsae.report.select import Selection
from clipsae.report.stability import seed_stability
from clipsae.report.table import Table


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: its anchor.
        title: plain text.
        tables, plots: shown.
        folded: tables shown when asked for.
    """

    name: str
    title: str
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    folded: list[Table] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """Everything that is written.

    Attributes:
        selection: what it rests on.
        sections: in order; the first holds the averages.
        differences: sentences on what is not alike in the results, and so shown apart.
        findings: sentences.
        missing, fewer: gaps, with commands.
        notes: lines on what was left out.
        origins: a dict a result that is used: kind, name, model, dataset, k, seed, finished
            (seconds since 1970), commit, versions, host.
    """

    selection: Selection
    sections: list[Section]
    differences: list[str]
    findings: list[str]
    missing: list[Missing]
    fewer: list[Missing]
    notes: list[str]
    origins: list[dict[str, Any]]

    @property
    def tables(self) -> list[Table]:
        return [t for section in self.sections for t in (*section.tables, *section.folded)]

    @property
    def has_published(self) -> bool:
        return any(table.has_published for table in self.tables)

    @property
    def plots(self) -> list[Plot]:
        return [plot for section in self.sections for plot in section.plots]


def make_report(
    root: Path | str, found: Collected, selection: Selection, commands: Commands
) -> Report:
    """Build tables, plots and sentences from a selection of what the store at `root` holds."""
    missing = missing_cells(selection, commands)
    stable, unread = seed_stability(root, found, selection)
    sections = [
        _overview(selection),
        *(_dataset_section(selection, dataset) for dataset in selection.datasets),
        _ablation(selection),
        _sweep(selection),
        _beyond(selection, stable),
    ]
    return Report(
        selection=selection,
        sections=[s for s in sections if s.tables or s.plots],
        differences=[*selection.differences, *_several_k(selection)],
        findings=findings(selection, missing),
        missing=missing,
        fewer=fewer_seeds(selection, commands),
        notes=[
            *(f"Left out, it cannot be read: {line}" for line in [*found.problems, *unread]),
            *_counts(selection),
        ],
        origins=_origins(found, selection),
    )


def _overview(selection: Selection) -> Section:
    section = Section("overview", "Average and ranks")
    for datasets, name, of in (
        (selection.eleven, "average", _called(selection.eleven)),
        (selection.others, "average_others", f"the {len(selection.others)} other datasets"),
    ):
        if not datasets:
            continue
        if name != "average" and not selection.eleven:
            name, of = "average", f"{len(datasets)} datasets"
        if len(datasets) < 2:
            continue
        suffix = "_others" if name == "average_others" else ""
        section.tables.append(accuracy_tables.average_table(selection, datasets, name, of))
        groups = [x for x in accuracy_tables.compared(selection, datasets) if len(x.datasets) > 1]
        for at, group in enumerate(groups, start=1):
            rank = f"rank{suffix}" + (f"_{at}" if len(groups) > 1 else "")
            section.tables.append(accuracy_tables.rank_table(selection, group, rank))
    return section


def _called(eleven: tuple[str, ...]) -> str:
    return "the eleven datasets" if len(eleven) == 11 else f"{len(eleven)} of the eleven datasets"


def _dataset_section(selection: Selection, dataset: str) -> Section:
    """Accuracy, sparsity and interpretability of one dataset."""
    number = table_numbers().get(dataset)
    of_paper = f" (Table {number})" if number else ""
    section = Section(f"dataset-{slug(dataset)}", dataset_title(dataset) + of_paper)
    accuracy = accuracy_tables.dataset_table(selection, dataset)
    section.tables.append(accuracy)
    others = accuracy_tables.other_settings_table(selection, dataset)
    if others.columns:
        section.folded.append(others)
    measured = [
        *metric_tables.sparsity_tables(selection, dataset),
        *metric_tables.interpretability_tables(selection, dataset),
    ]
    (section.tables if dataset == MEASURED_ON else section.folded).extend(measured)
    recovered = metric_tables.recovery_table(selection, dataset)
    if recovered is not None:
        section.folded.append(recovered)
    for plot in (plots.accuracy_plot(selection, dataset), plots.sparsity_plot(selection, dataset)):
        if plot is not None:
            section.plots.append(plot)
    return section


def _ablation(selection: Selection) -> Section:
    datasets = ablation.ablated(selection)
    tables = [ablation.ablation_table(selection, dataset) for dataset in datasets]
    return Section("ablation", "Ablation", tables)


def _sweep(selection: Selection) -> Section:
    drawn = [plots.k_plot(selection, dataset) for dataset in selection.datasets]
    return Section("k", "Sweep of k", plots=[plot for plot in drawn if plot is not None])


def _beyond(selection: Selection, stable: list) -> Section:
    tables = []
    fidelity = accuracy_tables.fidelity_table(selection)
    if not fidelity.empty:
        tables.append(fidelity)
    if stable:
        tables.append(metric_tables.stability_table(selection, stable))
    return Section("beyond", "Beyond the paper", tables)


def _several_k(selection: Selection) -> list[str]:
    """Which k the tables show of lines that have several."""
    lines = []
    for line in selection.lines:
        ks = sorted(plots.swept_k(selection.cells, line))
        if len(ks) > 1:
            variant = f", {line.variant}" if line.variant else ""
            lines.append(
                f"{model_title(line.model)}{variant} has results with k = "
                f"{', '.join(str(k) for k in ks)}. The tables show k = {selection.k[line]} "
                "(task.k chooses another), the plots over k all of them."
            )
    return lines


def _counts(selection: Selection) -> list[str]:
    wanted, lines = selection.wanted, []
    if selection.superseded:
        lines.append(
            f"{_results(selection.superseded)} superseded by a newer one with the same settings."
        )
    if selection.unfitting:
        lines.append(
            f"{_results(selection.unfitting)} left out, being of another CLIP than {wanted.clip} "
            f"(weights {wanted.weights_title}, layer {wanted.layer}), another protocol than "
            f"{wanted.protocol} or another M than {wanted.latents}."
        )
    limited = {
        row.folder
        for row in selection.runs.drop_duplicates("folder").itertuples()
        if dict(row.settings).get("evaluation.limit_images", "null") != "null"
    }
    if limited:
        lines.append(
            f"{_results(len(limited))} used that looked at a part of the images only "
            "(evaluation.limit_images)."
        )
    return lines


def _results(count: int) -> str:
    return f"{count} result is" if count == 1 else f"{count} results are"


def _origins(found: Collected, selection: Selection) -> list[dict[str, Any]]:
    columns = ["folder", "model", "dataset", "k", "seed", "finished"]
    every = pd.concat([frame[columns] for frame in (found.results, found.measurements)])
    rows = []
    for row in every[every.folder.isin(selection.folders)].drop_duplicates("folder").itertuples():
        meta = found.origins[row.folder]["meta"]
        rows.append(
            {
                "kind": "evaluation",
                "name": row.folder,
                "model": row.model,
                "dataset": row.dataset,
                "k": row.k or "",
                "seed": row.seed,
                "finished": row.finished,
                "commit": meta.get("git_commit") or "",
                "versions": meta.get("versions") or {},
                "host": meta.get("host") or "",
            }
        )
    return rows
