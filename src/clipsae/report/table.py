"""A table of the report, cells of ours beside published ones, and its formats: Markdown, CSV, LaTeX
(the page has its own template)."""

import math
import re
from dataclasses import dataclass

import pandas as pd

from clipsae.evaluation.numbers import Number

MINUS = "\u2212"
_LATEX = {
    "\\": r"\textbackslash{}",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "²": r"\textsuperscript{2}",
    MINUS: r"$-$",
}


@dataclass(frozen=True)
class Cell:
    """One figure."""

    ours: float | None = None  # mean over seeds
    std: float | None = None  # over seeds (n - 1); None for one seed
    seeds: int = 0
    published: float | None = None
    printed: str = ""  # the same as the paper prints it

    @property
    def difference(self) -> float | None:
        """Ours minus published, where there are both."""
        if self.ours is None or self.published is None:
            return None
        return self.ours - self.published

    def record(self) -> dict[str, float | str | None]:
        """Numbers in full precision, the published one as printed."""
        return {
            "ours": self.ours,
            "std": self.std,
            "seeds": self.seeds or None,
            "published": self.printed or None,
            "difference": self.difference,
        }

    def texts(self, column: Number) -> dict[str, str]:
        """How it is shown: "ours", "std", "published", "difference"; "" for what is not there."""
        return {
            "ours": number(self.ours, column.digits),
            "std": number(self.std, column.digits),
            "published": self.printed,
            "difference": number(self.difference, column.digits, signed=True),
        }


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    labels: tuple[str, ...]  # one for each of the table's heads
    cells: dict[str, Cell]  # by the column's key
    model: str = ""  # whose colour it takes; "": nobody's

    def cell(self, column: Number) -> Cell:
        return self.cells.get(column.key, Cell())


@dataclass(frozen=True)
class Table:
    """A table with everything that its files and its place on the page need."""

    name: str  # of its files
    title: str  # plain text, as the caption
    caption: str
    columns: tuple[Number, ...]
    rows: tuple[Row, ...]
    heads: tuple[str, ...] = ("model",)  # headings of the labels

    @property
    def has_published(self) -> bool:
        return any(c.published is not None for row in self.rows for c in row.cells.values())

    @property
    def empty(self) -> bool:
        """Whether it has not one figure of ours."""
        return all(c.ours is None for row in self.rows for c in row.cells.values())

    def is_best(self, row: Row, column: Number) -> bool:
        """Whether ours is the best of its column, as it is shown, where there is one to compare."""
        ours = [r.cell(column).ours for r in self.rows]
        values = [round(x, column.digits) for x in ours if x is not None]
        value = row.cell(column).ours
        if value is None or len(values) < 2 or not column.better:
            return False
        return round(value, column.digits) == {"max": max, "min": min}[column.better](values)

    @property
    def headings(self) -> list[str]:
        """Those of `lines`."""
        between = [""] * self.has_published
        return [*self.heads, *between, *(column.label for column in self.columns)]

    def lines(self, row: Row) -> list[list[str]]:
        """A row as text: ours, and where there are published figures two lines more."""
        cells = [row.cell(column).texts(column) for column in self.columns]
        ours = [f"{c['ours']} ± {c['std']}" if c["std"] else c["ours"] for c in cells]
        if not self.has_published:
            return [[*row.labels, *ours]]
        lines = [[*row.labels, "ours", *ours]]
        if any(c["published"] for c in cells):
            blank = [""] * len(row.labels)
            lines += [[*blank, n, *(c[n] for c in cells)] for n in ("published", "difference")]
        return lines


def number(value: float | None, digits: int, *, signed: bool = False) -> str:
    """A figure with a real minus; zero never has a sign; "" for None and NaN."""
    if value is None or math.isnan(value):
        return ""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    if value < 0:
        return MINUS + text
    return f"+{text}" if signed else text


def to_markdown(table: Table) -> str:
    """Title, table and caption; three lines a model where there are published figures."""
    rules = ["---:"] * len(table.columns)
    rules = ["---"] * (len(table.headings) - len(rules)) + rules
    lines = [
        [markdown(text) for text in line]
        for line in (table.headings, *(line for row in table.rows for line in table.lines(row)))
    ]
    body = [f"| {' | '.join(line)} |" for line in (lines[0], rules, *lines[1:])]
    return "\n".join([f"## {markdown(table.title)}", "", *body, "", markdown(table.caption), ""])


def to_frame(table: Table) -> pd.DataFrame:
    """A line a row; each figure as up to five columns: on_5, on_5_std, on_5_seeds,
    on_5_published (as printed) and on_5_difference; those that are empty throughout are left out.
    """
    rows = []
    for row in table.rows:
        line: dict[str, object] = dict(zip(table.heads, row.labels, strict=True))
        for column in table.columns:
            record = row.cell(column).record()
            record["seeds"] = None if record["seeds"] == 1 else record["seeds"]
            line[column.label] = record.pop("ours")
            line |= {f"{column.label}_{name}": value for name, value in record.items()}
        rows.append(line)
    frame = pd.DataFrame(rows)
    return frame[[n for n in frame if n in table.headings or frame[n].notna().any()]]


def to_csv(table: Table) -> str:
    """`to_frame` as CSV, numbers in full precision."""
    return to_frame(table).to_csv(index=False, lineterminator="\n")


def to_latex(table: Table) -> str:
    """A booktabs table (`\\usepackage{booktabs}`), the best of ours in bold."""
    labels = len(table.headings) - len(table.columns)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex(f'{table.title}. {table.caption}')}}}",
        rf"\label{{tab:{table.name}}}",
        rf"\begin{{tabular}}{{{'l' * labels}{'r' * len(table.columns)}}}",
        r"\toprule",
        " & ".join(map(latex, table.headings)) + r" \\",
        r"\midrule",
    ]
    for at, row in enumerate(table.rows):
        if at and table.has_published:
            lines.append(r"\addlinespace")
        ours, *published = ([latex(text) for text in line] for line in table.lines(row))
        for i, column in enumerate(table.columns, start=labels):
            if table.is_best(row, column):
                ours[i] = rf"\textbf{{{ours[i]}}}"
        lines += [" & ".join(line) + r" \\" for line in (ours, *published)]
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def latex(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(_LATEX.get(letter, letter) for letter in text)


def markdown(text: str) -> str:
    """Text that Markdown shows as it is, in a table as well."""
    return re.sub(r"([\\|*_<>\[\]`])", r"\\\1", text)
