"""The table of back ends, and `load_policy`, which calls the one that the recipe names."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gft_lite.policy.base import Policy
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.imports import uncompiled_functions
from gft_lite.utils.library_output import hide_library_messages, is_verbose
from gft_lite.utils.paths import PACKAGE

if TYPE_CHECKING:
    from gft_lite.policy.kept_base import KeptBase
    from gft_lite.recipe.sections import PolicySettings, RolloutSettings


@dataclass(frozen=True, slots=True)
class BackendEntry:
    """A back end: the module with its `load`, and the optional package that it requires.

    A back end with `needs` also requires a CUDA GPU; the extra has the package's name.
    """

    module: str
    needs: str | None = None


# Importing this table does not import the back ends.
BACKENDS: dict[str, BackendEntry] = {
    "transformers": BackendEntry("gft_lite.policy.qlora"),
    "unsloth": BackendEntry("gft_lite.policy.unsloth_policy", needs="unsloth"),
}


def load_policy(
    settings: PolicySettings,
    seed: int = 0,
    rollout: RolloutSettings | None = None,
    kept: KeptBase | None = None,
) -> Policy:
    """Load the recipe's base with a new adapter, or with `policy.adapter`.

    `rollout` is for back ends that also serve the base, `kept` may have the base already.
    Raises: RecipeError.
    """
    entry = BACKENDS[settings.backend]
    _check_available(entry, settings, rollout)
    hide_library_messages()
    if entry.needs is None:
        with uncompiled_functions():
            importlib.import_module("bitsandbytes")
    if not is_verbose():  # Our phases say what is loaded or written.
        importlib.import_module("transformers.utils.logging").disable_progress_bar()
    return importlib.import_module(entry.module).load(settings, seed, rollout, kept)


def _check_available(
    entry: BackendEntry, settings: PolicySettings, rollout: RolloutSettings | None
) -> None:
    """Check GPU and package of the back end before importing it. Raises: RecipeError."""
    backend = settings.backend
    if entry.needs is None:
        if rollout and rollout.engine == "unsloth":
            rule = "must be another one than unsloth, which requires policy.backend unsloth"
            raise RecipeError([f"rollout.engine: {rule}, with policy.backend {backend}."])
        return
    import torch

    gpu = torch.cuda.is_available()
    if not gpu or settings.resolved_device(cuda_available=gpu) == "cpu":
        raise RecipeError(
            [f"policy.backend: must be transformers without a CUDA GPU, got {backend}, which needs "
             "one. Leave it out."]
        )  # fmt: skip
    if importlib.util.find_spec(entry.needs) is None:
        raise RecipeError(
            [f"policy.backend: {entry.needs} is not installed. "
             f'pip install "gft-lite[{entry.needs}]", or set policy.backend=transformers.']
        )  # fmt: skip


def model_location(model: str) -> str:
    """The folder or hub id behind a recipe's `policy.model`; `lab` is the packaged base."""
    return str(PACKAGE / "lab" / "base") if model == "lab" else model
