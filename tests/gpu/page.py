"""The page that says what the GPU tests found."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

HEADS = ("", "found", "goal or prediction")


class Page:
    """Tables of what was found, one a section, in the order in which they come.

    Attributes:
        sections: rows of a name, what was found, and what was wanted or expected.
    """

    def __init__(self) -> None:
        self.sections: dict[str, list[tuple[str, str, str]]] = {}

    def section(self, title: str) -> Callable[..., None]:
        """What adds a row to a section."""
        rows = self.sections.setdefault(title, [])

        def add(name: str, found: str, wanted: str = "") -> None:
            rows.append((name, found, wanted))

        return add

    def text(self, about: str, outcome: str) -> str:
        """Markdown.

        Args:
            about: the card and the versions.
            outcome: how many tests passed and failed.
        """
        parts = ["# What the GPU tests found", about, outcome]
        for title, rows in self.sections.items():
            parts.append(f"## {title}")
            lines = [HEADS, ("---",) * len(HEADS), *rows]
            parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
        return "\n\n".join(parts) + "\n"

    def write(self, file: Path, about: str, outcome: str) -> str:
        """Write it to a file; the text."""
        text = self.text(about, outcome)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return text


def card() -> str:
    """The GPU and the versions, in a line."""
    properties = torch.cuda.get_device_properties(0)
    packages = ("clipsae", "torch", "triton", "lightning", "sae-lens")
    versions = ", ".join(f"{name} {_version(name)}" for name in packages)
    memory = f"{properties.total_memory / 1e9:.0f} GB"
    processors = f"{properties.multi_processor_count} multiprocessors"
    return f"{properties.name}, {memory}, {processors}; CUDA {torch.version.cuda}, {versions}."


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
