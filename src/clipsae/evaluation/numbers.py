"""A record of each number of an evaluation: what tables, cards, pages and plots show of it.

A metric declares its `numbers`; `clipsae.evaluation.metrics.NUMBERS` has all. No torch is imported.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

# Settings of top-n classification.
SETTINGS = {
    "no_sae": "CLIP without an SAE",
    "on": "only the class's n latents",
    "off": "all but the class's n latents",
    "self": "the image's own n latents (label-free)",
}


@dataclass(frozen=True)
class Number:
    """One number of a result.

    Attributes:
        key: its name in `metrics.csv`, and with the prefix `measure/` in W&B.
        label: its name for a reader.
        meaning: a definition; "": the label says it.
        format: such as ".3f" or ".1%".
        better: "max", "min", or "" where neither end is better by itself.
        table: the report's table that has it: "sparsity" (the paper's Table 5), "interpretability"
            (Table 6), "recovery", "probing", "towers"; "": none.
        paper: its column in the paper's Table 5 or 6; "": the paper does not have it.
        headline: whether the terminal and the model card show it.
        floor: key of the number that an untrained SAE, or chance, reaches on the same rows; "":
            none.
        ceiling: key of the number that a supervised probe, or CLIP itself, reaches on the same
            rows; "": none. The gap closed is (value - floor) / (ceiling - floor).
    """

    key: str
    label: str
    meaning: str = ""
    format: str = ".3f"
    better: str = "max"
    table: str = "sparsity"
    paper: str = ""
    headline: bool = False
    floor: str = ""
    ceiling: str = ""

    def shown(self, values: Mapping[str, float]) -> str:
        """The number, and what is reached by others where it has a floor or a ceiling: "58.0%
        (random 0.0%, untrained 0.0%, probe 87.9%)".

        Args:
            values: the numbers of a result by key, this one among them; `{key}_{other}` is what
                another reaches.
        """
        text = format(values[self.key], self.format)
        start = f"{self.key}_"
        others = [
            f"{key.removeprefix(start)} {value:{self.format}}"
            for key, value in values.items()
            if key.startswith(start) and (self.floor or self.ceiling)
        ]
        return f"{text} ({', '.join(others)})" if others else text

    @property
    def digits(self) -> int:
        """After the point, where it is not shown in percent."""
        digits = int(self.format.strip(".%f"))
        return digits + 2 if self.format.endswith("%") else digits


def suffixed(numbers: Iterable[Number], suffix: str) -> tuple[Number, ...]:
    """The same numbers of another code: keys with a suffix."""
    return tuple(
        replace(n, key=f"{n.key}{suffix}", headline=False, floor="", ceiling="") for n in numbers
    )


def current_names(values: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a result by the names that they have now.

    In clipsae 0.1 `l0` was the share of zeros and `active` the number of active latents. Its
    results have no `zero_fraction`, which stands beside every `l0` of today. What was `absorption`
    then is `merging` now, which stands beside every `absorption` of today.
    """
    new = {
        f"{level}_{old}": f"{level}_{name}"
        for level in ("patch", "image")
        for old, name in (("coverage", "concepts_found"), ("absorption", "merging"))
        if f"{level}_merging" not in values
    }
    for suffix in ("", "_dense"):
        if f"zero_fraction{suffix}" not in values:
            new |= {f"l0{suffix}": f"zero_fraction{suffix}", f"active{suffix}": f"l0{suffix}"}
    return {new.get(name, name): value for name, value in values.items()}
