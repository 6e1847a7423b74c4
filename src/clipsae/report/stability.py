"""Seed stability of the trained SAEs that the report's results rest on."""

import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from clipsae.evaluation.metrics.stability import mean_max_cosine
from clipsae.report.collect import Collected
from clipsae.report.select import Selection
from clipsae.report.variants import Line
from clipsae.sae import SAE

LARGEST = 8192  # latents; from there a pair takes minutes without a GPU


@dataclass(frozen=True)
class Stability:
    """How alike the decoders of several seeds are.

    Attributes:
        line, trained_on: of the SAEs.
        mean, std: of the mean max cosine over ordered pairs of seeds (std: None for one pair).
        pairs: how many ordered pairs.
    """

    line: Line
    trained_on: str
    mean: float
    std: float | None
    pairs: int


def seed_stability(
    root: Path | str, found: Collected, selection: Selection
) -> tuple[list[Stability], list[str]]:
    """Compare the decoders of the seeds of each model with the tables' k.

    Returns:
        what was found, and a line for each SAE that could not be read. Nothing is compared above
        `LARGEST` latents.
    """
    if selection.wanted.latents > LARGEST:
        return [], []
    groups: dict[tuple[Line, str], dict[int, str]] = {}
    for run in selection.runs.drop_duplicates("folder").itertuples():
        line = Line(run.model, run.common, run.own)
        if selection.k.get(line) != run.k:
            continue
        origin = found.origins[run.folder]
        name = (origin["meta"].get("key") or {}).get("sae")
        config = origin["config"]
        trained = (config.get("train_dataset") or {}).get("name") or run.dataset
        if name:
            groups.setdefault((line, trained), {})[run.seed] = name
    stable, problems = [], []
    for (line, trained), by_seed in groups.items():
        rows = []
        for name in by_seed.values() if len(by_seed) > 1 else ():
            folder = Path(root) / "sae" / name
            try:
                rows.append(SAE.load(folder).decoder_rows().detach())
            except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
                why = " ".join(str(error).split())
                problems.append(f"sae/{name}: {why.replace(f'{folder}/', '')}")
        values = [float(mean_max_cosine(a, b)) for a, b in itertools.permutations(rows, 2)]
        if values:
            std = statistics.stdev(values) if len(values) > 2 else None
            stable.append(Stability(line, trained, statistics.fmean(values), std, len(values)))
    order = {line: at for at, line in enumerate(selection.lines)}
    return sorted(stable, key=lambda s: order.get(s.line, len(order))), problems
