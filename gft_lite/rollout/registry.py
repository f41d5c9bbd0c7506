"""The table of rollout engines; importing it imports no engine."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gft_lite.rollout.base import RolloutEngine
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.imports import load_dotted

if TYPE_CHECKING:
    from gft_lite.policy.base import Policy
    from gft_lite.recipe.sections import RolloutSettings


@dataclass(frozen=True, slots=True)
class EngineEntry:
    """The dotted path of an engine's class, and the package (and extra) that it requires."""

    path: str
    needs: str | None = None


# "auto" is vllm if vllm and a GPU are available, else transformers.
ENGINES: dict[str, EngineEntry | None] = {
    "auto": None,
    "transformers": EngineEntry("gft_lite.rollout.transformers_engine:TransformersEngine"),
    "vllm": EngineEntry("gft_lite.rollout.vllm_engine:VllmEngine", needs="vllm"),
    "vllm_server": EngineEntry("gft_lite.rollout.vllm_server_engine:VllmServerEngine"),
    "unsloth": EngineEntry("gft_lite.rollout.unsloth_engine:UnslothEngine", needs="unsloth"),
}


def find_engine(name: str) -> EngineEntry:
    """The engine of that name, or a user's engine at a dotted path.

    Raises: RecipeError if the package that the engine requires is not installed.
    """
    if name == "auto":
        import torch

        gpu = torch.cuda.is_available()
        name = "vllm" if gpu and importlib.util.find_spec("vllm") else "transformers"
    entry = ENGINES.get(name) or EngineEntry(name)
    if entry.needs and importlib.util.find_spec(entry.needs) is None:
        raise RecipeError(
            [f"rollout.engine: {entry.needs} is not installed. "
             f'pip install "gft-lite[{entry.needs}]", or set rollout.engine=transformers.']
        )  # fmt: skip
    return entry


def start_engine(settings: RolloutSettings, policy: Policy, scratch: Path) -> RolloutEngine:
    """Start the engine of the recipe; `scratch` is a folder for the engine's own files."""
    scratch.mkdir(parents=True, exist_ok=True)
    return load_dotted(find_engine(settings.engine).path)(settings, policy, scratch)
