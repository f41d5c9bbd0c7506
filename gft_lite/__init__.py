"""Group Fine-Tuning (GFT, arXiv 2604.14258) of language models on one GPU: the public API.

The names are imported on first use (PEP 562), so that `import gft_lite` imports neither torch nor
transformers. Nothing inside the package imports this module's names.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gft_lite.version import __version__

if TYPE_CHECKING:
    from gft_lite.distillation.pipeline import distill
    from gft_lite.evaluation.evaluator import evaluate
    from gft_lite.evaluation.suites import Suite
    from gft_lite.experiments.sweep_config import Sweep
    from gft_lite.experiments.sweep_results import SweepFolder
    from gft_lite.experiments.sweep_runner import sweep
    from gft_lite.recipe import Recipe, RecipeError
    from gft_lite.runs.folder import RunFolder as Run
    from gft_lite.training.run import train

__all__ = [
    "Recipe", "RecipeError", "Run", "Suite", "Sweep", "SweepFolder", "__version__",
    "distill", "evaluate", "sweep", "train",
]  # fmt: skip

_MODULES = {
    "Recipe": "gft_lite.recipe.schema:Recipe",
    "RecipeError": "gft_lite.utils.errors:RecipeError",
    "Run": "gft_lite.runs.folder:RunFolder",
    "Suite": "gft_lite.evaluation.suites:Suite",
    "Sweep": "gft_lite.experiments.sweep_config:Sweep",
    "SweepFolder": "gft_lite.experiments.sweep_results:SweepFolder",
    "distill": "gft_lite.distillation.pipeline:distill",
    "evaluate": "gft_lite.evaluation.evaluator:evaluate",
    "sweep": "gft_lite.experiments.sweep_runner:sweep",
    "train": "gft_lite.training.run:train",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'gft_lite' has no attribute {name!r}")
    module, attribute = _MODULES[name].split(":")
    return getattr(importlib.import_module(module), attribute)
