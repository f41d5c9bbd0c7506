"""`train`: a run with or without stages."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from gft_lite.recipe.method_parameters import complete_objective
from gft_lite.recipe.schema import Recipe
from gft_lite.runs.folder import RunFolder, find_folder
from gft_lite.runs.model_card import write_card
from gft_lite.training.optim import settle_rate
from gft_lite.training.shared_parts import SharedParts
from gft_lite.training.single_run import train_single
from gft_lite.training.stages import train_stages
from gft_lite.utils.distributed import init_distributed
from gft_lite.utils.progress import stderr_console


def train(
    recipe: Recipe, out: str | Path | None = None, *, resume: bool = False,
    console: Console | None = None, shared: SharedParts | None = None,
) -> RunFolder:  # fmt: skip
    """Train as the recipe says and return the run's folder.

    `shared` has base and engine of an earlier run of this process, and gets those of this one.

    Raises: RecipeError if the recipe or `out` is wrong, TrainError if training failed.
    """
    distributed = init_distributed(recipe.policy.device)
    console = console or stderr_console()
    console = console if distributed.is_main else Console(quiet=True)
    recipe = settle_rate(complete_objective(recipe), console)
    if distributed.world_size > 1:  # The processes would have to agree on what fits.
        shared = None
    if not recipe.stages:
        return train_single(
            recipe, out, resume=resume, distributed=distributed, console=console, shared=shared
        )
    folder = find_folder(recipe, out, resume=resume, distributed=distributed)
    with folder.lock(), ExitStack() as stack:
        if shared is None and distributed.world_size == 1:
            shared = stack.enter_context(SharedParts())
        train_stages(recipe, folder, distributed, console, shared)
        if distributed.is_main:
            write_card(folder)
    return folder
