"""Checks of models, data sets and targets before torch is imported; each takes seconds at most."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from gft_lite.utils.errors import RecipeError, UserError, short_repr

if TYPE_CHECKING:
    from gft_lite.evaluation.targets import Target
    from gft_lite.recipe.schema import Recipe
    from gft_lite.recipe.sections import DataSettings, PolicySettings


def check_inputs(*recipes: Recipe) -> None:
    """Check that the models and data sets of recipes and their stages are there.

    Raises: RecipeError.
    """
    from gft_lite.runs.folder import presampled_recipe

    stages = [
        stage
        for recipe in recipes
        for stage in [recipe.stage(i) for i in range(len(recipe.stages))] or [recipe]
    ]
    _check_models(stage.policy for stage in stages)
    for folder in {recipe.group.offline for recipe in recipes} - {None}:
        presampled_recipe(str(folder), "group.offline")
    sources: dict[str, tuple[DataSettings, str]] = {}
    for stage in stages:
        sources.setdefault(stage.data.source, (stage.data, "data"))
        for name, data in stage.eval.sets.items():
            sources.setdefault(data.source, (data, f"eval.sets.{name}"))
    for data, field in sources.values():
        check_source(data, field)


def check_model(settings: PolicySettings) -> None:
    """Check the files of a base, or that the hub has its config. Raises: RecipeError."""
    from gft_lite.planning.hub_config import read_hub_file
    from gft_lite.policy.model_files import check_config, check_model_files
    from gft_lite.policy.registry import model_location
    from gft_lite.recipe.base import is_hub_id

    adapter = settings.adapter
    if adapter and not os.path.isdir(adapter) and not is_hub_id(adapter):
        rule = "must be the folder of a PEFT adapter, or a hub id"
        raise RecipeError([f"policy.adapter: {rule}, got {short_repr(adapter)}."])
    check_model_files(settings)
    if os.path.isdir(model_location(settings.model)):
        return
    content = read_hub_file(settings.model, "config.json", settings.revision)
    rule = "policy.model: must have a config.json that is a JSON object"
    try:
        raw = json.loads(content or b"")
    except ValueError as error:
        raise RecipeError([f"{rule}, got {settings.model!r} ({error})."]) from None
    if not isinstance(raw, dict):
        raise RecipeError([f"{rule}, got {settings.model!r}."])
    check_config(raw, settings)


def check_source(settings: DataSettings, field: str) -> None:
    """Check that a local source exists, or that the hub answers. Raises: RecipeError."""
    from gft_lite.data.sources import is_local

    if is_local(settings, field):
        return
    from gft_lite.utils.hub import BY_CHOICE, HubUnreachableError, get_from_hub, why_offline

    offline = why_offline()  # Before the import, which reads HF_HUB_OFFLINE.
    from huggingface_hub import constants

    source = settings.source
    cached = Path(constants.HF_HOME) / "datasets" / source.replace("/", "___")
    cache = Path(os.environ.get("HF_DATASETS_CACHE", "")) / source.replace("/", "___")
    if offline == BY_CHOICE or cached.is_dir() or cache.is_dir():
        return
    try:
        if offline:
            raise HubUnreachableError(offline)
        get_from_hub(f"{constants.ENDPOINT}/api/datasets/{source}")
    except HubUnreachableError as error:
        rule = "must be a file, a folder or a data set of the hub"
        raise RecipeError([f"{field}.source: {rule}, got {source!r}, and {error}."]) from None


def check_targets(targets: Iterable[Target]) -> None:
    """Check the bases of targets. Raises: RecipeError."""
    _check_models(target.policy for target in targets)


def _check_models(policies: Iterable[PolicySettings]) -> None:
    """Check each model once."""
    for settings in {
        (p.model, p.revision, p.quantization, p.adapter): p for p in policies
    }.values():
        check_model(settings)


def check_folder(path: str | None, field: str) -> None:
    """Raises: UserError for an input that is given and no folder."""
    if path is not None and not os.path.isdir(path):
        raise UserError([f"{field}: must be a folder, got {short_repr(path)}."])
