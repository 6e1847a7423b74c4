"""The paper's tables beside ours, plots, and one page with them all, from finished results.

collect (all that the store holds) -> select (what fills a cell) -> make_report (tables, plots,
sentences, gaps) -> write_report (files)
"""

from clipsae.report.collect import Collected, collect
from clipsae.report.missing import Commands
from clipsae.report.report import Report, make_report
from clipsae.report.select import Selection, Wanted, select
from clipsae.report.table import Table, to_frame
from clipsae.report.write import write_report

__all__ = [
    "Collected",
    "Commands",
    "Report",
    "Selection",
    "Table",
    "Wanted",
    "collect",
    "make_report",
    "select",
    "to_frame",
    "write_report",
]
