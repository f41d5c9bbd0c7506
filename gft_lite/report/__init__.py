"""The report: one self-contained HTML page for a run or a sweep.

May import `evaluation` and everything below it.
"""

from gft_lite.report.page import write_report

__all__ = ["write_report"]
