"""Makes the eleven datasets at toy size, for trying the benchmark without the real ones.

    python tests/data/eleven/builders.py FOLDER [--layout coop|official] [--only dtd food101]
    CLIPSAE_DATA=FOLDER python run.py task=data

Real JPEG files, the real annotation formats, a few of the real classes; a class is a colour and a
grain, so that something can be learned from it.
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    from tests.data.eleven.toys import BUILDERS, LAYOUTS

    parser = argparse.ArgumentParser(description="Make the eleven datasets at toy size.")
    parser.add_argument("folder", type=Path, help="the data folder; what CLIPSAE_DATA should be")
    parser.add_argument("--layout", choices=LAYOUTS, default="coop")
    parser.add_argument("--only", nargs="+", choices=sorted(BUILDERS), default=sorted(BUILDERS))
    options = parser.parse_args()
    for name in options.only:
        built = BUILDERS[name](options.folder, options.layout)
        counts = ", ".join(f"{len(labels)} {split}" for split, labels in built.labels.items())
        print(f"{name}: {counts}")


if __name__ == "__main__":
    main()
