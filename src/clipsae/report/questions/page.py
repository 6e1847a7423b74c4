"""The page of findings as Markdown, and its figures."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

from clipsae.report.plots import STYLE
from clipsae.report.questions import concepts, content, learned, order, thresholds, trust
from clipsae.report.questions.evidence import Evidence
from clipsae.report.questions.question import Question, Table, counted
from clipsae.store.files import write_text

QUESTIONS: tuple[Callable[[Evidence], Question], ...] = (
    learned.ask,
    content.ask,
    concepts.ask,
    trust.ask,
    order.ask,
    thresholds.ask,
)
PAGE = "findings.md"
_UNANSWERED = "The finished results do not answer this yet."


def ask(evidence: Evidence) -> list[Question]:
    """All questions, in the page's order."""
    return [question(evidence) for question in QUESTIONS]


def write_page(evidence: Evidence, folder: Path | str, words: Sequence[str] = ()) -> Path:
    """Write `findings.md` and `images/findings_<name>.svg` into `folder`.

    Args:
        words: of the command line that made the results, behind `run.py`, such as
            ["sweeps=findings"].

    Returns:
        the page's path.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    questions = ask(evidence)
    for question in questions:
        for plot in question.plots:
            path = folder / "images" / f"findings_{plot.name}.svg"
            aside = path.with_name(f".{path.name}.tmp")
            with matplotlib.rc_context({**STYLE, "savefig.facecolor": "white"}):
                plot.figure.savefig(aside, format="svg", metadata={"Date": None, "Creator": None})
            aside.replace(path)
    write_text(folder / PAGE, text(evidence, questions, words))
    return folder / PAGE


def text(evidence: Evidence, questions: Sequence[Question], words: Sequence[str]) -> str:
    """The page."""
    figures = evidence.figures
    parts = [
        "# Findings",
        "Six questions about sparse autoencoders on the built-in world, whose concepts are known, "
        "answered from the results of one sweep. The sentences under *Answer* are computed from "
        "them, with 95 % intervals over seeds; in the tables ± is half of one. The page is written "
        "by the second command. docs/explanation/numbers.md explains each number, "
        "docs/explanation/baselines.md what is frozen, untrained or fitted.",
        _code([words, [*words, "task=findings"]]),
        f"It rests on {evidence.finished} of {counted(evidence.cells, 'cell')} of the sweep: "
        f"{counted(figures.evaluation.nunique(), 'evaluation')} of "
        f"{counted(figures.sae.nunique(), 'SAE')} with {counted(figures.seed.nunique(), 'seed')}, "
        f"{_images(evidence)}made in {_took(evidence.hours(figures))}"
        + (f" with {'; '.join(evidence.versions)}." if evidence.versions else "."),
    ]
    for at, question in enumerate(questions, start=1):
        parts += [f"## {at}. {question.title}", *_section(evidence, question, words)]
    return "\n\n".join(parts) + "\n"


def _images(evidence: Evidence) -> str:
    """On how many images, if all evaluations have the same limit."""
    limits = [limit for limit in evidence.limits if limit is not None]
    return f"on {limits[0]:,} images each, " if len(limits) == len(evidence.limits) == 1 else ""


def _section(evidence: Evidence, question: Question, words: Sequence[str]) -> list[str]:
    grids = f"hydra.sweeper.only=[{','.join(question.grids)}]"
    command = _code([[*words, grids]])
    if not question.answer:
        return [f"{_UNANSWERED} These cells do:", command]
    parts = ["**Answer.** " + " ".join(question.answer)]
    for plot in question.plots:
        parts += [
            f"![{plot.title}](images/findings_{plot.name}.svg)",
            f"*{plot.title}.* {plot.caption}",
        ]
    for table in question.tables:
        parts += [table.caption, _markdown(table)]
    seeds = question.used.groupby("recipe").seed.nunique() if len(question.used) else []
    if len(seeds):
        low, high = int(min(seeds)), int(max(seeds))
        several = counted(high, "seed") if low == high else f"{low} to {counted(high, 'seed')}"
        parts.append(
            f"**Rests on** {counted(question.used.sae.nunique(), 'SAE')} "
            f"({counted(len(seeds), 'recipe')}, {several} each), "
            f"{_took(evidence.hours(question.used))}. To repeat it:"
        )
    parts.append(command)
    parts.append("**What it does not show.** " + " ".join(question.limits))
    return parts


def _code(commands: Sequence[Sequence[str]]) -> str:
    lines = [f"python run.py {shlex.join(words)}  # needs hours" for words in commands]
    return "\n".join(["```bash", *lines, "```"])


def _took(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"


def _markdown(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return "\n".join([line(table.head), line(["---"] * len(table.head)), *map(line, table.rows)])
