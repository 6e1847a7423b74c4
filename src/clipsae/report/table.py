"""A table of the report: cells of ours, published and their difference."""

import math
from dataclasses import dataclass, field

MINUS = "\u2212"


@dataclass(frozen=True)
class Cell:
    """One figure.

    Attributes:
        ours: mean over seeds; None: not there.
        std: over seeds (n - 1); None for one seed.
        seeds: how many.
        published: the paper's figure as a number; None: it has none.
        printed: the same as the paper prints it.
    """

    ours: float | None = None
    std: float | None = None
    seeds: int = 0
    published: float | None = None
    printed: str = ""

    @property
    def difference(self) -> float | None:
        """Ours minus published, where there are both."""
        if self.ours is None or self.published is None:
            return None
        return self.ours - self.published


@dataclass(frozen=True)
class Column:
    """A column of figures.

    Attributes:
        key: of `Row.cells`.
        title: its heading.
        digits: after the point, of ours and of the difference.
        best: "max" or "min" is the better end; "": neither.
    """

    key: str
    title: str
    digits: int = 2
    best: str = "max"


@dataclass(frozen=True)
class Row:
    """A line: labels, one for each of the table's heads, and cells by column key.

    Attributes:
        model: whose colour it takes; "": nobody's.
    """

    labels: tuple[str, ...]
    cells: dict[str, Cell]
    model: str = ""


@dataclass(frozen=True)
class Table:
    """A table with everything that its files and its place on the page need.

    Attributes:
        name: of its files.
        title, caption: plain text.
        heads: headings of the labels.
    """

    name: str
    title: str
    caption: str
    heads: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...] = field(default=())

    @property
    def has_published(self) -> bool:
        return any(c.published is not None for row in self.rows for c in row.cells.values())

    @property
    def empty(self) -> bool:
        """Whether it has not one figure of ours."""
        return all(c.ours is None for row in self.rows for c in row.cells.values())

    def best(self, column: Column) -> float | None:
        """The best figure of ours in a column, as it is shown; None: none, or none to compare."""
        values = [
            round(cell.ours, column.digits)
            for row in self.rows
            if (cell := row.cells.get(column.key)) is not None and cell.ours is not None
        ]
        if len(values) < 2 or not column.best:
            return None
        return max(values) if column.best == "max" else min(values)

    def is_best(self, cell: Cell, column: Column) -> bool:
        return cell.ours is not None and round(cell.ours, column.digits) == self.best(column)


def number(value: float, digits: int, *, signed: bool = False) -> str:
    """A figure with a real minus; zero never has a sign; "" for NaN."""
    if math.isnan(value):
        return ""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    if value < 0:
        return MINUS + text
    return f"+{text}" if signed else text


def shown(cell: Cell, column: Column) -> dict[str, str]:
    """The texts of a cell: "ours", "std", "published", "difference"; "" for what is not there."""
    difference = cell.difference
    return {
        "ours": "" if cell.ours is None else number(cell.ours, column.digits),
        "std": "" if cell.std is None else number(cell.std, column.digits),
        "published": cell.printed,
        "difference": "" if difference is None else number(difference, column.digits, signed=True),
    }
