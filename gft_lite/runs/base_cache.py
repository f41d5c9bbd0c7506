"""What runs with the same base share: its evaluation, and the samples that KL is measured on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence

from gft_lite.recipe.schema import Recipe
from gft_lite.runs.folder import RunFolder
from gft_lite.utils.files import atomic_write

BASE_EVALUATION, KL_SET = "eval/base.json", "kl_set.json"

_SECTIONS = {"seed", "policy", "data", "reward", "rollout", "monitor", "eval"}
# Of these sections, what only training reads.
_ONLY_TRAINING = {
    "policy": {"lora"},
    "rollout": {"temperature", "top_p", "top_k", "stop", "resample", "probe_limit"},
    "monitor": {"every"},
}


def base_inputs(recipe: Recipe) -> str:
    """Everything that a base's evaluation and KL set are computed from, as text to compare.

    The seed is part of it: it draws the samples.
    """
    tree = recipe.model_dump(mode="json", include=_SECTIONS, exclude=_ONLY_TRAINING)
    if not recipe.data.holdout:  # The KL set's problems are training problems then.
        tree["group"] = recipe.group.model_dump(exclude={"offline"})
    return json.dumps(tree, sort_keys=True)


def copy_base_files(run: RunFolder, recipe: Recipe, donor: RunFolder, files: Sequence[str]) -> None:
    """Begin a run with files of another, so that it does not compute them again."""
    run.create(recipe.to_yaml())
    for name in files:
        with atomic_write(run.path / name) as partial:
            shutil.copy2(donor.path / name, partial)  # With the time of the evaluation.
