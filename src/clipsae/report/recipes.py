"""How each SAE of the tables was trained: steps, learning rate, decay, clipping, penalty."""

import math
from collections.abc import Mapping

from clipsae.report.select import Selection
from clipsae.report.settings import NOT_SET
from clipsae.report.table import Row, Table

HEADS = ("model", "steps", "learning rate", "decay", "gradients clipped at", "sparsity")
PENALTIES = ("l1_coefficient", "l0_coefficient", "target_l0")


def recipe_table(selection: Selection) -> Table:
    """A row a line whose settings say how its SAE was trained; no rows where none do.

    The learning rate is that of the training after its warm-up: `optimizer.learning_rate` times
    sqrt(reference_latents / M) where that is set.
    """
    rows = []
    for line in dict.fromkeys((*selection.lines, *selection.ablated)):
        runs = selection.runs[selection.runs.line.eq(line)]
        if not runs.empty and "optimizer.learning_rate" in (own := dict(runs.settings.iloc[0])):
            labels = (
                f"{int(own['trainer.max_steps']):,}" if "trainer.max_steps" in own else "",
                f"{_rate(own, selection.wanted.latents):.3g}",
                _decay(own),
                own.get("trainer.gradient_clip_val", "null").replace("null", "no"),
                _sparsity(own),
            )
            rows.append(Row((selection.title(line), *labels), {}, line.model))
    return Table(
        "recipes",
        "How the SAEs were trained",
        "The learning rate is that after its warm-up; decay is down to 0 at the last step; "
        "clipped is the norm of all gradients together.",
        (),
        tuple(rows),
        HEADS,
    )


def _rate(own: Mapping[str, str], latents: int) -> float:
    reference = own.get("optimizer.reference_latents", "null")
    scale = 1.0 if reference in ("null", NOT_SET) else math.sqrt(float(reference) / latents)
    return float(own["optimizer.learning_rate"]) * scale


def _decay(own: Mapping[str, str]) -> str:
    decay, share = own.get("optimizer.decay", "constant"), own.get("optimizer.decay_fraction", "1")
    if decay == "constant":
        return "none"
    over = "after the warm-up" if float(share) == 1 else f"over the last {float(share):.0%}"
    return f"{decay}, {over}"


def _sparsity(own: Mapping[str, str]) -> str:
    """The penalty's coefficient and target, and how long it grows; "" where there is none."""
    values = {name: own.get(f"model.{name}", "null") for name in PENALTIES}
    found = [f"{name}={value}" for name, value in values.items() if value != "null"]
    steps = own.get("optimizer.sparsity_warmup_steps", "0")
    if found and steps != "0":
        found.append(f"growing over {int(steps):,} steps")
    return ", ".join(found)
