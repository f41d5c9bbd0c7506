"""TODO: gft_lite/policy/registry.py"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gft_lite.policy.base import Policy
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.paths import PACKAGE

if TYPE_CHECKING:
    from gft_lite.recipe.sections import PolicySettings, RolloutSettings


@dataclass(frozen=True, slots=True)
class BackendEntry:
    """The module whose `load` makes the policy, and the package and extra that it needs, with a
    CUDA GPU, beside ours."""

    module: str
    needs: str | None = None


# Importing this table imports no back end.
BACKENDS: dict[str, BackendEntry] = {
    "transformers": BackendEntry("gft_lite.policy.qlora"),
    "unsloth": BackendEntry("gft_lite.policy.unsloth_policy", needs="unsloth"),
}


def load_policy(
    settings: PolicySettings, seed: int = 0, rollout: RolloutSettings | None = None
) -> Policy:
    """Load the base that the recipe names and put a fresh, or the given, adapter on it.

    `rollout` is for a back end that can serve the base as well. Raises: RecipeError.
    """
    entry = BACKENDS[settings.backend]
    _refuse_missing(entry, settings, rollout)
    # bitsandbytes reports every cast of every forward, and at import a package we don't use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return importlib.import_module(entry.module).load(settings, seed, rollout)


def _refuse_missing(
    entry: BackendEntry, settings: PolicySettings, rollout: RolloutSettings | None
) -> None:
    """What the back end needs and is not there, told before anything heavy is imported."""
    backend = settings.backend
    if entry.needs is None:
        if rollout and rollout.engine == "unsloth":
            rule = "must be another one than unsloth, which serves policy.backend unsloth alone"
            raise RecipeError([f"rollout.engine: {rule}, with policy.backend {backend}."])
        return
    import torch

    if settings.device == "cpu" or not torch.cuda.is_available():
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
