"""The fenced blocks of a page, and the commands within its sentences."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?$")
_COMMAND = re.compile(r"    (\$ )?(python|clipsae|cd|wandb|pip|export|from \w+ import) ")

RUN = ("bash", "python")
FILES = ("python", "yaml")  # with a title: a file of that name
SHOWN = ("text",)  # output, layouts: nothing to run


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        line: the number of its fence in the page.
        title: the name of the file that it is; None: it is run.
    """

    line: int
    language: str
    title: str | None
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page in order.

    Raises:
        ValueError: a block whose language or form the tests would not run.
    """
    lines = page.read_text().splitlines()
    i = 0
    while i < len(lines):
        if not lines[i].lstrip().startswith(("```", "~~~")):
            if _COMMAND.match(lines[i]):
                raise ValueError(f"{page.name}:{i + 1}: an indented command is not run: fence it")
            i += 1
            continue
        match = _FENCE.fullmatch(lines[i])
        end = next(j for j in range(i + 1, len(lines)) if lines[j].lstrip() == "```")
        known = match and match["language"] in (FILES if match["title"] else RUN + SHOWN)
        if not known:
            raise ValueError(
                f"{page.name}:{i + 1}: {lines[i]!r} must be bash, python or text, or python or "
                'yaml with title="file"'
            )
        yield Block(i + 1, match["language"], match["title"], "\n".join(lines[i + 1 : end]) + "\n")
        i = end + 1


def inline_commands(page: Path) -> list[str]:
    """Commands of run.py and of clipsae within sentences."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    found = re.findall(r"(?<!`)`((?:python run\.py|clipsae)\s[^`]+)`(?!`)", prose)
    return [" ".join(command.split()) for command in found]
