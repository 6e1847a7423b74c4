"""`python -m clipsae.pretraining`: train the built-in CLIP, some 40 minutes on one core.

Stopped, the same command continues. The weights end in <output>/weights.safetensors.
"""

import argparse
import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipsae.pretraining.train import PretrainConfig, train


def parse(arguments: Sequence[str] | None = None) -> tuple[PretrainConfig, int, Path]:
    """The options of a command line, the seed, and the folder of the weights."""
    parser = argparse.ArgumentParser(
        "python -m clipsae.pretraining",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    outputs = Path(os.environ.get("CLIPSAE_OUTPUT", "outputs"))
    parser.add_argument("--output", type=Path, default=outputs / "pretrain", help="a folder")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the scenes")
    for field in dataclasses.fields(PretrainConfig):
        options: dict[str, Any] = {"help": field.metadata["help"]}
        if field.name == "weights":
            options |= {"type": _weight, "nargs": "+", "default": [], "metavar": "NAME=WEIGHT"}
            options["help"] += f" ({PretrainConfig().weights})"
        elif field.name == "counts":
            options |= {"type": float, "nargs": 3, "default": field.default}
        else:
            options |= {"type": field.metadata.get("type", field.type), "default": field.default}
        parser.add_argument(f"--{field.name.replace('_', '-')}", **options)
    given = vars(parser.parse_args(arguments))
    seed, output = given.pop("seed"), given.pop("output")
    given["weights"] = PretrainConfig().weights | dict(given["weights"])
    try:
        return PretrainConfig(**{**given, "counts": tuple(given["counts"])}), seed, output
    except ValueError as error:
        parser.error(str(error))


def _weight(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    return name, float(value)


if __name__ == "__main__":
    logging.basicConfig(format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    train(*parse())
