"""The report: one self-contained HTML page about runs and sweeps.

`loading` reads folders, `curves` and `summary` compute what is shown, `group_browser` adds p of
each token, `plots` draws, `charts` has the data of interactive charts (uPlot, in `vendor`), `page`
renders. Reading and rendering import no torch.

May import `evaluation` and everything below it.

Adding a plot or a figure:
1. A metric that a loss reports has a plot already; a title and a unit go into `curves._OBJECTIVE`.
2. Another metric of metrics.jsonl is a line of `curves._METRICS`.
3. A figure of the summary is an entry of `summary.facts_of`, `cost_of` or `scores_of`.
"""

from gft_lite.report.page import write_report

__all__ = ["write_report"]
