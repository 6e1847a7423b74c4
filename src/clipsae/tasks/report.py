"""`task=report`: the paper's tables, ours beside the published, from all finished results."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table as RichTable

from clipsae.errors import ConfigError
from clipsae.evaluation.numbers import Number
from clipsae.report import (
    Collected,
    Commands,
    Report,
    Selection,
    Table,
    Wanted,
    collect,
    make_report,
    select,
    to_frame,
    write_report,
)
from clipsae.report.settings import config_settings
from clipsae.store import SCHEMA, digest
from clipsae.store.files import read_json, write_json
from clipsae.tasks import build
from clipsae.tasks.table import terminal
from clipsae.training.logging import finish

log = logging.getLogger(__name__)

# Which results a report is about: its options, and what they are in the config.
ABOUT = {
    "clip": "clip.name",
    "weights": "clip.pretrained",
    "layer": "clip.layer",
    "hook": "clip.hook",
    "protocol": "evaluation.protocol",
    "ranking": "evaluation.ranking",
    "latents": "model.latents",
}
# Overrides of the report's own command line that say nothing about how to fill a cell.
_OWN = ("task", "model", "dataset", "seed", "logger", "sweeps", "clip")
_OWN_KEYS = ("task.", "model.k", "dataset.", "logger.", "hydra.")


def run(cfg: DictConfig) -> None:
    """Collect, write, log, show.

    Raises:
        ConfigError: no result to report, a model or dataset that does not exist, or a folder that
            cannot be written to.
    """
    found = collect(cfg.paths.output_dir)
    wanted = wanted_of(cfg, found, HydraConfig.get().overrides.task)
    selection = select(found, wanted)
    commands = Commands(carried_overrides(cfg), cfg.seed, image_folders(found))
    if not selection.folders:
        raise ConfigError(nothing_there(cfg, found, selection, commands))
    report = make_report(cfg.paths.output_dir, found, selection, commands)
    try:
        page = write_report(report, cfg.task.folder)
    except OSError as error:
        raise ConfigError(
            f"task.folder={cfg.task.folder}: the report cannot be written there "
            f"({error.strerror}): name a folder that can be written to"
        ) from error
    log_report(cfg, report)
    print_report(report, page)


def wanted_of(cfg: DictConfig, found: Collected, overrides: Sequence[str] = ()) -> Wanted:
    """The task's options, and of the command line's overrides those that decide a result.

    Raises:
        ConfigError: an unknown model or dataset.
    """
    task = cfg.task
    about: dict[str, Any] = {name: task[name] for name in ABOUT} | {"weights": str(task.weights)}
    for group in ("model", "dataset"):
        names = task[f"{group}s"]
        configs = GlobalHydra.instance().config_loader().get_group_options(group)
        known = {name for name in configs if not name.startswith("_")}  # others: their parts
        known |= set(found.figures[group])
        unknown = [name for name in names or () if name not in known]
        if unknown:
            raise ConfigError(
                f"task.{group}s has {unknown[0]!r}: expected names among {', '.join(sorted(known))}"
            )
        about[f"{group}s"] = tuple(names) if names else None
    groups = ("trainer", "optimizer", "features", "evaluation", "measurement")
    composed = {group: build.plain(cfg[group]) for group in groups}
    usual = config_settings(composed, groups) | {"schema": str(SCHEMA)}
    if cfg.precision != "auto":
        usual["precision"] = cfg.precision
    given = {override.lstrip("+").partition("=")[0] for override in overrides}
    deciding = {name for settings in set(found.figures.settings) for name, _ in settings}
    return Wanted(
        **about,
        k=task.k,
        settings={name: usual[name] for name in sorted(given & usual.keys() & deciding)},
        usual=usual,
    )


def carried_overrides(cfg: DictConfig) -> list[str]:
    """What a command that fills a cell takes from the report's command line."""
    hydra = HydraConfig.get()
    words: list[str] = [f"clip={hydra.runtime.choices['clip']}"]
    for name, key in ABOUT.items():
        value, (group, option) = cfg.task[name], key.split(".")
        if value != cfg[group].get(option, value):
            words.append(f"{key}={'null' if value is None else value}")
    for word in hydra.overrides.task:
        key = word.split("=", 1)[0].lstrip("+~")
        if key not in _OWN and not key.startswith(_OWN_KEYS):
            words.append(word)
    return words


def image_folders(found: Collected) -> dict[str, list[str]]:
    """The overrides that choose each of the user's own image folders, by its name."""
    folders = {}
    for origin in found.origins.values():
        node = origin["config"].get("dataset") or {}
        if str(node.get("_target_")).endswith(".ImageFolder") and node.get("root"):
            words = ["dataset=image_folder", f"dataset.root={node['root']}"]
            if node["name"] != "image_folder":
                words.append(f"dataset.name={node['name']}")
            folders[node["name"]] = words
    return folders


def nothing_there(
    cfg: DictConfig, found: Collected, selection: Selection, commands: Commands
) -> str:
    """The sentence for a store without a fitting result."""
    wanted, folder = selection.wanted, Path(cfg.paths.output_dir) / "evaluation"
    line = selection.main((wanted.models or (cfg.model.name,))[0])
    command = commands.line(selection, line, [(wanted.datasets or (cfg.dataset.name,))[0]])
    accuracies = found.figures[found.figures.measured.eq(False)]
    if accuracies.empty:
        unread = f" that can be read ({found.problems[0]})" if found.problems else ""
        return f"{folder} holds no finished evaluation{unread}: run `{command}` first"
    settings = "".join(f", {name}={value}" for name, value in wanted.settings.items())
    others = []
    for group in accuracies[list(ABOUT)].drop_duplicates().to_dict("records"):
        differs = {n: value for n, value in group.items() if value != getattr(wanted, n)}
        values = {n: "null" if value == "None" else value for n, value in differs.items()}
        others.append(" ".join(f"{ABOUT[n]}={value}" for n, value in values.items()))
    # Those that need the fewest changes first; none: the wanted models or datasets are missing.
    others = sorted(filter(None, others), key=lambda words: words.count("="))[:3]
    hint = f", or report on what is there with {' or with '.join(others)}" if others else ""
    return (
        f"{folder} holds no finished evaluation of {wanted.clip} (weights {wanted.weights}, "
        f"{wanted.where}) with {wanted.latents} latents by the {wanted.protocol} protocol"
        f"{', ranked by contrast' * (wanted.ranking == 'contrast')}"
        f"{settings}: run `{command}` first{hint}"
    )


def log_report(cfg: DictConfig, report: Report) -> None:
    """The tables as W&B Tables of one run; other loggers have no place for them."""
    about = report.selection.wanted
    wanted = {**vars(about), "weights": about.weights_title}
    del wanted["usual"]
    run_id = digest({**wanted, "results": report.selection.folders})
    logged = Path(cfg.task.folder) / "logged.json"
    mark = {"run": run_id, "logger": digest(build.plain(cfg.logger))} if cfg.logger else {}
    if mark and read_json(logged) == mark:
        log.info("these tables are in W&B already, as run %s", run_id)
        return
    logger: Logger | None = build.call_target(
        cfg.logger,
        name=f"report-{cfg.task.clip}-{cfg.task.protocol}",
        run_id=run_id,
        job_type="report",
        run_config={"report": {**wanted, "results": list(report.selection.folders)}},
        folder=Path(cfg.paths.output_dir),
        run_folder=Path(HydraConfig.get().runtime.output_dir),
    )
    failed = True
    try:
        if isinstance(logger, WandbLogger):
            for table in report.tables:
                frame = to_frame(table).astype(object)
                logger.log_table(table.name, dataframe=frame.where(frame.notna(), None))
            logger.experiment.summary.update({"missing": len(report.missing)})
        failed = False
    finally:
        finish(logger, failed)
    if isinstance(logger, WandbLogger):
        write_json(logged, mark)


def print_report(report: Report, page: Path) -> None:
    """The first table, what is missing, and where the page lies."""
    console = terminal()
    if report.differences:
        console.print("settings that differ, each in rows of its own:", highlight=False)
        for sentence in report.differences:
            console.print(f"- {sentence}", markup=False, highlight=False)
    for part in in_parts(report.tables[0], console):
        console.print(part)
    for sentence in (*report.findings, *report.notes):
        console.print(f"- {sentence}", markup=False, highlight=False)
    if report.missing:
        missing = page.with_name("missing.md")
        console.print(f"missing  {missing} ({len(report.missing)} commands)", soft_wrap=True)
    console.print(f"page     {page}", soft_wrap=True)


def in_parts(table: Table, console: Console) -> list[RichTable]:
    """Ours, and behind it the difference to the published figure; in several tables where the
    columns do not fit in the terminal's width."""
    unbounded, count = console.options.update_width(10_000), len(table.columns)

    def part(columns: Sequence[Number]) -> RichTable:
        found = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD)
        for head in table.heads:
            found.add_column(head, overflow="fold", min_width=16)
        for column in columns:
            found.add_column(column.label, justify="right", no_wrap=True)
        for row in table.rows:
            texts = [row.cell(column).texts(column) for column in columns]
            figures = (f"{t['ours']} [dim]{t['difference']}[/]".strip() for t in texts)
            found.add_row(*map(escape, row.labels), *figures)
        if table.has_published:
            found.caption, found.caption_justify = "dim: difference to the published figure", "left"
        return found

    for size in range(count, 0, -1):
        found = [part(table.columns[at : at + size]) for at in range(0, count, size)]
        widths = [Measurement.get(console, unbounded, one).minimum for one in found]
        if max(widths) <= console.width:
            break
    return found
