"""Group Fine-Tuning on one GPU.

The names below are imported on first use, so that `import gft_lite` costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gft_lite.distill import distill
    from gft_lite.evaluate import evaluate
    from gft_lite.recipe import Recipe, RecipeError
    from gft_lite.runlog import RunFolder as Run
    from gft_lite.suites import Suite
    from gft_lite.sweep import Sweep, SweepFolder, sweep
    from gft_lite.train import train

__version__ = "0.1.0"
__all__ = [
    "Recipe", "RecipeError", "Run", "Suite", "Sweep", "SweepFolder", "__version__",
    "distill", "evaluate", "sweep", "train",
]  # fmt: skip

_HOMES = {
    "Recipe": ("gft_lite.recipe", "Recipe"),
    "RecipeError": ("gft_lite.recipe", "RecipeError"),
    "Run": ("gft_lite.runlog", "RunFolder"),
    "Suite": ("gft_lite.suites", "Suite"),
    "Sweep": ("gft_lite.sweep_grid", "Sweep"),
    "SweepFolder": ("gft_lite.sweep", "SweepFolder"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gft_lite' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def _function(name: str) -> property:
    """`gft_lite.NAME` is the function, although importing its module would put that there."""
    return property(
        lambda _: getattr(importlib.import_module(f"gft_lite.{name}"), name),
        lambda _, module: None,
    )


class _Package(ModuleType):
    distill = _function("distill")
    evaluate = _function("evaluate")
    train = _function("train")
    sweep = _function("sweep")


sys.modules[__name__].__class__ = _Package
