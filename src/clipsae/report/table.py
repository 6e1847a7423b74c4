"""A table of the report, cells of ours beside published ones, and its formats: Markdown, CSV, LaTeX
(the page has its own template)."""

import math
import re
from dataclasses import dataclass
from itertools import groupby

import pandas as pd

from clipsae.evaluation.numbers import Number
from clipsae.report.noise import told_apart

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
    # What an SAE reaches that has learned nothing, and what is the most that could be reached.
    floor: float | None = None
    ceiling: float | None = None

    @property
    def difference(self) -> float | None:
        """Ours minus published, where there are both."""
        if self.ours is None or self.published is None:
            return None
        return self.ours - self.published

    @property
    def gap(self) -> float | None:
        """(ours - floor) / (ceiling - floor): the share of the gap between the two that training
        closes, below 0 where it makes things worse; None where there is no gap."""
        if self.ours is None or self.floor is None or self.ceiling is None:
            return None
        if not abs(self.ceiling - self.floor) > 1e-9:
            return None
        return (self.ours - self.floor) / (self.ceiling - self.floor)

    def differs(self, other: "Cell") -> bool | None:
        """`told_apart` of the two means; None: not known."""
        if self.ours is None or other.ours is None:
            return None
        mine = self.ours, self.std, self.seeds
        return told_apart(mine, (other.ours, other.std, other.seeds))

    def record(self) -> dict[str, float | str | None]:
        """Numbers in full precision, the published one as printed."""
        return {
            "ours": self.ours,
            "std": self.std,
            "seeds": self.seeds or None,
            "published": self.printed or None,
            "difference": self.difference,
            "floor": self.floor,
            "ceiling": self.ceiling,
            "gap": self.gap,
        }

    def texts(self, column: Number) -> dict[str, str]:
        """How it is shown: "ours", "std", "published", "difference", "range" (from floor to
        ceiling), "gap"; "" for what is not there."""
        ends = [number(end, column.digits) for end in (self.floor, self.ceiling)]
        return {
            "ours": number(self.ours, column.digits),
            "std": number(self.std, column.digits),
            "published": self.printed,
            "difference": number(self.difference, column.digits, signed=True),
            "range": " to ".join(ends) if self.gap is not None else "",
            "gap": "" if self.gap is None else f"{number(100 * self.gap, 0)} %",
        }


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    labels: tuple[str, ...]  # one for each of the table's heads
    cells: dict[str, Cell]  # by the column's key
    model: str = ""  # whose colour it takes; "": nobody's
    block: str = ""  # the heading over it and the rows after it with the same; "": none

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

    @property
    def has_gaps(self) -> bool:
        return any(c.gap is not None for row in self.rows for c in row.cells.values())

    @property
    def blocks(self) -> list[tuple[str, list[Row]]]:
        """The rows below each heading."""
        return [(name, list(rows)) for name, rows in groupby(self.rows, key=lambda row: row.block)]

    def is_best(self, row: Row, column: Number) -> bool:
        """Whether ours is the best in its block of the column, as it is shown, where there is one
        to compare, or cannot be told apart from that (`told_apart`)."""
        cell, others = row.cell(column), [r.cell(column) for r in self.rows if r.block == row.block]
        values = [c.ours for c in others if c.ours is not None]
        if cell.ours is None or len(values) < 2 or not column.better:
            return False
        best = {"max": max, "min": min}[column.better](values)
        if round(cell.ours, column.digits) == round(best, column.digits):
            return True
        return any(c.ours == best and cell.differs(c) is False for c in others)

    @property
    def headings(self) -> list[str]:
        """Those of `lines`."""
        between = [""] * (self.has_published or self.has_gaps)
        return [*self.heads, *between, *(column.label for column in self.columns)]

    def lines(self, row: Row) -> list[list[str]]:
        """A row as text: ours, and where there are published figures or gaps two lines more for
        each."""
        cells = [row.cell(column).texts(column) for column in self.columns]
        ours = [f"{c['ours']} ± {c['std']}" if c["std"] else c["ours"] for c in cells]
        if not self.has_published and not self.has_gaps:
            return [[*row.labels, *ours]]
        lines, blank = [[*row.labels, "ours", *ours]], [""] * len(row.labels)
        below = {"published": "published", "difference": "difference"}
        of_gap = {"range": "floor to ceiling", "gap": "gap closed"}
        for kind, names in (("published", below), ("gap", of_gap)):
            if any(c[kind] for c in cells):
                lines += [[*blank, names[n], *(c[n] for c in cells)] for n in names]
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
    """Title, table and caption; several lines a model where there are published figures or gaps,
    and a line in italics over a block."""
    rules = ["---:"] * len(table.columns)
    rules = ["---"] * (len(table.headings) - len(rules)) + rules
    lines = [[markdown(text) for text in table.headings], rules]
    for block, rows in table.blocks:
        if block:
            lines.append([f"*{markdown(block)}*", *[""] * (len(rules) - 1)])
        lines += [list(map(markdown, line)) for row in rows for line in table.lines(row)]
    body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([f"## {markdown(table.title)}", "", *body, "", markdown(table.caption), ""])


def to_frame(table: Table) -> pd.DataFrame:
    """A line a row; each figure as up to eight columns: on_5, on_5_std, on_5_seeds, on_5_published
    (as printed), on_5_difference, on_5_floor, on_5_ceiling and on_5_gap; those that are empty
    throughout are left out.
    """
    rows = []
    for row in table.rows:
        line: dict[str, object] = dict(zip(table.heads, row.labels, strict=True))
        line["block"] = row.block or None
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
    """A booktabs table (`\\usepackage{booktabs}`), the best of ours in bold (`is_best`)."""
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
        if row.block and (not at or row.block != table.rows[at - 1].block):
            over = rf"\multicolumn{{{len(table.headings)}}}{{l}}{{\emph{{{latex(row.block)}}}}} \\"
            lines += [*[r"\midrule"] * bool(at), over]
        elif at and (table.has_published or table.has_gaps):
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
