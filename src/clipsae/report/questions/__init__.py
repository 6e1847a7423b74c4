"""The page of findings: six questions about sparse autoencoders, answered from a sweep's results.

read (what the finished cells hold) -> ask (sentences, tables, plots of each question) -> write_page

Every sentence that depends on a result is computed from it, with intervals over seeds.
"""

from clipsae.report.questions.evidence import Evidence, Result, read
from clipsae.report.questions.page import QUESTIONS, Question, ask, write_page

__all__ = ["QUESTIONS", "Evidence", "Question", "Result", "ask", "read", "write_page"]
