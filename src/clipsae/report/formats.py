"""Tables as Markdown, CSV and LaTeX."""

import io

import pandas as pd

from clipsae.report.table import MINUS, Cell, Row, Table, shown

_LINES = ("ours", "published", "difference")
_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "²": r"\textsuperscript{2}",
    MINUS: r"$-$",
}


def to_markdown(table: Table) -> str:
    """Title, table and caption; three lines a model where there are published figures."""
    head = [*table.heads, *([""] if table.has_published else []), *(c.title for c in table.columns)]
    labels = len(head) - len(table.columns)
    lines = [
        f"## {_markdown(table.title)}",
        "",
        _markdown_row(head),
        _markdown_row(["---"] * labels + ["---:"] * len(table.columns)),
        *(_markdown_row(line) for row in table.rows for line in _text_lines(table, row)),
        "",
        _markdown(table.caption),
    ]
    return "\n".join(lines) + "\n"


def to_frame(table: Table) -> pd.DataFrame:
    """A line a row; each figure as up to five columns: on_5, on_5_std, on_5_seeds,
    on_5_published (as printed) and on_5_difference; those that are empty throughout are left out.
    """
    rows = []
    for row in table.rows:
        line: dict[str, object] = dict(zip(table.heads, row.labels, strict=True))
        for column in table.columns:
            cell = row.cells.get(column.key, Cell())
            line[column.title] = cell.ours
            line[f"{column.title}_std"] = cell.std
            line[f"{column.title}_seeds"] = cell.seeds if cell.seeds > 1 else None
            line[f"{column.title}_published"] = cell.printed or None
            line[f"{column.title}_difference"] = cell.difference
        rows.append(line)
    frame = pd.DataFrame(rows)
    kept = [
        name
        for name in frame.columns
        if name in table.heads
        or name in {c.title for c in table.columns}
        or frame[name].notna().any()
    ]
    return frame[kept]


def to_csv(table: Table) -> str:
    """`to_frame` as CSV, numbers in full precision."""
    text = io.StringIO()
    to_frame(table).to_csv(text, index=False, lineterminator="\n")
    return text.getvalue()


def to_latex(table: Table) -> str:
    """A booktabs table (`\\usepackage{booktabs}`), the best of ours in bold."""
    published = table.has_published
    heads = [*table.heads, *([""] if published else []), *(c.title for c in table.columns)]
    labels = len(heads) - len(table.columns)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex(f'{table.title}. {table.caption}')}}}",
        rf"\label{{tab:{table.name}}}",
        rf"\begin{{tabular}}{{{'l' * labels}{'r' * len(table.columns)}}}",
        r"\toprule",
        " & ".join(latex(head) for head in heads) + r" \\",
        r"\midrule",
    ]
    for at, row in enumerate(table.rows):
        if at and published:
            lines.append(r"\addlinespace")
        for line, texts in enumerate(_text_lines(table, row)):
            cells = [latex(text) for text in texts]
            if line == 0:
                for i, column in enumerate(table.columns):
                    if table.is_best(row.cells.get(column.key, Cell()), column):
                        cells[labels + i] = rf"\textbf{{{cells[labels + i]}}}"
            lines.append(" & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def latex(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _text_lines(table: Table, row: Row) -> list[list[str]]:
    """The lines of a row: ours, and with published figures the other two."""
    cells = [shown(row.cells.get(column.key, Cell()), column) for column in table.columns]
    ours = [f"{c['ours']} ± {c['std']}" if c["std"] else c["ours"] for c in cells]
    if not table.has_published:
        return [[*row.labels, *ours]]
    lines = [[*row.labels, _LINES[0], *ours]]
    if any(c["published"] for c in cells):
        blank = [""] * len(row.labels)
        lines += [[*blank, name, *(c[name] for c in cells)] for name in _LINES[1:]]
    return lines


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(_markdown(cell) for cell in cells) + " |"


def _markdown(text: str) -> str:
    """Text that Markdown shows as it is, in a table as well."""
    for letter in "\\|*_<>[]`":
        text = text.replace(letter, "\\" + letter)
    return text
