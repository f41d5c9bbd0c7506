"""Accuracy, pass@k and drift of models, adapters and runs on benchmarks and evaluation sets.

May import `rollout`, `runs` and everything below them.

Adding a benchmark:
1. Add a definition to `configs/suites/benchmarks.yaml`: source, columns, type of answers.
2. Name it under `benchmarks` in a suite of `configs/suites/`.
Adding a suite: write `configs/suites/NAME.yaml`; `gft-lite eval --suite NAME` then finds it.
A user's own suite needs no edit here: `--suite FILE.yaml`.

Adding a figure of a set: `recipe/figures.py` says how. All packages read its line there.
"""

from gft_lite.evaluation.metrics import average, compare, measure
from gft_lite.evaluation.suites import Benchmark, Suite

__all__ = ["Benchmark", "Suite", "average", "compare", "measure"]
