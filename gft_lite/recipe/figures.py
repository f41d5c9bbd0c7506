"""The figures of an evaluated set, in one table: names, units, titles and which values are better.

Adding a figure:
1. Add a line to `FIGURES`. With `values`, models are compared by it: it then has an interval and a
   place in checkpoint.best, searches, model cards and reports.
2. Compute it in `evaluation/metrics.py`, with `values` also of each problem, in `by_problem`.
3. Describe it under `eval/` in docs/site/metrics.yaml, with the same unit.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

SHARE, NATS = "share", "nats per token"
NLL, MEAN_REWARD = "nll", "mean_reward"


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of an evaluated set; `@*` in a name stands for every k, as of `pass@8`.

    `values` are the keys of what is known of each problem, of a figure by which models are
    compared. `title` is that of its table, with the samples of a problem as `{}`, and `quantity`
    what other texts call it. `graded` is false for a figure of demonstrations; the mean over
    benchmarks is known of `averaged` ones.
    """

    name: str
    unit: str
    lower_is_better: bool = False
    values: tuple[str, ...] = ()
    title: str = ""
    quantity: str = ""
    graded: bool = True
    averaged: bool = False

    @property
    def by_k(self) -> bool:
        """True if there is one for every k."""
        return self.name.endswith("@*")

    def names(self, ks: Sequence[int]) -> list[str]:
        """Its names for these k."""
        return [self.name.replace("*", str(k)) for k in ks] if self.by_k else [self.name]


FIGURES = (
    Figure("pass@*", SHARE, values=("correct",), quantity="accuracy",
           title="Accuracy (%), the mean over {} samples a problem"),
    Figure(MEAN_REWARD, "reward", values=("rewards",), quantity="mean reward",
           title="Mean reward, the mean over {} samples a problem"),
    Figure(NLL, NATS, True, values=("nats", "tokens"), quantity="nll", graded=False,
           title=f"Negative log-likelihood of the demonstrations (nll; {NATS}, lower is better)"),
    Figure("perplexity", "", True, graded=False),
    Figure("truncated", SHARE, True, averaged=True),
    Figure("no_answer", SHARE, True, averaged=True),
    Figure("length", "tokens", averaged=True),
    Figure("distinct", "count", averaged=True),
    Figure("problems", "count"),
    Figure("samples", "count"),
)  # fmt: skip
COMPARED = tuple(figure for figure in FIGURES if figure.values)
BY_PROBLEM = frozenset(key for figure in COMPARED for key in figure.values)
_BY_NAME = {figure.name: figure for figure in FIGURES}
_FIRST = COMPARED[0].names([1])[0]


def find_figure(name: str) -> Figure | None:
    """The figure of a name such as `pass@8`; None if it is none of the table."""
    return _BY_NAME.get(_of_every_k(name))


def figure_of(name: str) -> Figure:
    """The figure of a name. Raises: KeyError if it is none of the table."""
    return _BY_NAME[_of_every_k(name)]


def _of_every_k(name: str) -> str:
    return re.sub(r"@\d+$", "@*", name)


def compared(names: Iterable[str]) -> list[str]:
    """Those of the names that are figures by which models are compared, in their order."""
    return [name for name in names if find_figure(name) in COMPARED]


def main_figure(figures: Container[str]) -> str:
    """The name of the figure by which a set is compared, at k = 1; `pass@1` if it has none."""
    names = (name for figure in COMPARED for name in figure.names([1]))
    return next((name for name in names if name in figures), _FIRST)


def lower_is_better(metric: object) -> bool:
    """True for a figure, or a set's figure such as `test/nll`, that falls as a policy improves."""
    figure = find_figure(metric.rpartition("/")[2]) if isinstance(metric, str) else None
    return figure is not None and figure.lower_is_better


def label_of(name: str) -> str:
    """The name of a figure in a sentence or at an axis."""
    return name.replace("_", " ")


def check_names(figures: Iterable[str]) -> None:
    """Raises: ValueError if a set has a figure that is not in the table."""
    for name in figures:
        if name not in BY_PROBLEM and find_figure(name.removesuffix("_interval")) is None:
            raise ValueError(f"{name}: must be in FIGURES of gft_lite/recipe/figures.py")
