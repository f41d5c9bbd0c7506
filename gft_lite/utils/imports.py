"""The user's own code by dotted path: what a recipe may name beside our tables."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

from gft_lite.utils.user_code import user_errors_as


def load_dotted(path: str) -> Any:
    """The object at "pkg.mod:name" or "pkg.mod.name"; looks in the working directory as well.

    Raises: ValueError that says what is missing.
    """
    module_name, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    if not module_name or not attribute:
        raise ValueError("must be written as pkg.module:name")
    if (cwd := os.getcwd()) not in sys.path:
        sys.path.append(cwd)  # A console script starts without the user's own directory.
    missing: ModuleNotFoundError | None = None
    with user_errors_as(
        lambda error: ValueError(
            f"importing {module_name} must not fail, got {error}. Fix that module."
        )
    ):
        try:
            found = import_module(module_name)
        except ModuleNotFoundError as error:
            missing = error
    if missing is not None:
        raise ValueError(
            f"module must be importable, got {missing}. "
            "Run from the directory that holds it, or install it."
        ) from missing
    try:
        return getattr(found, attribute)
    except AttributeError:
        raise ValueError(
            f"must be a name in {module_name}, got no such name. Check the spelling."
        ) from None
