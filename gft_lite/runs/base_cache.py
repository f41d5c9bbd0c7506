"""Results of the base that runs with the same base share: its evaluation and the KL set."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gft_lite.recipe.effects import Affects, values_affecting
from gft_lite.recipe.figures import figure_of, main_figure
from gft_lite.recipe.schema import Recipe
from gft_lite.runs.folder import DATA_IDENTITY, RunFolder
from gft_lite.runs.folder_forms import Evaluation, parse_evaluation
from gft_lite.types import Problem
from gft_lite.utils.files import atomic_write, read_json

if TYPE_CHECKING:
    from gft_lite.policy.batching import Row

BASE_EVALUATION, KL_SET = "eval/base.json", "kl_set.json"
_RECOMPUTE = "Remove the file: --resume then computes it again."


def base_inputs(recipe: Recipe) -> str:
    """Everything that the base evaluation and the KL set are computed from, as text to compare.

    The seed is part of it, as the samples are drawn by it.
    """
    values = values_affecting(recipe, Affects.BASE)
    if not recipe.data.holdout:  # The KL set has training problems then, selected by both.
        groups = values_affecting(recipe, Affects.GROUPS)
        values |= {name: groups[name] for name in groups if name.startswith("group.")}
        if recipe.data.difficulty:
            values["data.difficulty"] = recipe.data.difficulty.model_dump()
    return json.dumps(values, sort_keys=True)


def copy_base_files(run: RunFolder, recipe: Recipe, donor: RunFolder, files: Sequence[str]) -> None:
    """Create a run with files of another run, and with the fingerprints of the same data."""
    run.create(recipe.to_yaml())
    identity = [DATA_IDENTITY] if (donor.path / DATA_IDENTITY).exists() else []
    for name in (*files, *identity):
        with atomic_write(run.path / name) as partial:
            shutil.copy2(donor.path / name, partial)  # Keeps the time of the evaluation.


def read_base_evaluation(
    file: Path, sets: Mapping[str, Sequence[Problem]], ks: Sequence[int]
) -> Evaluation:
    """The base's results on each evaluation set; `ks` are the k of its pass@k.

    Raises: UserError unless the file has exactly these sets with all their problems and figures.
    """

    def parse(value: Any) -> Evaluation:
        found = parse_evaluation(value)
        if found.keys() != sets.keys():
            raise ValueError("results of other sets")
        for name, problems in sets.items():
            results, ids = found[name], {p.id for p in problems}
            main = figure_of(main_figure(results))
            for figure in main.names(ks):
                if not math.isfinite(results[figure]):
                    raise ValueError(f"{figure} of {name} is not finite")
            # `rewards` leaves out problems to whose responses no reward function applies, and
            # `nats` those without demonstrations.
            same = not main.by_k or results[main.values[0]].keys() == ids
            if not same or results["problems"] != len(problems):
                raise ValueError(f"results of other problems of {name}")
        return found

    rule = "must have the base's results on " + (", ".join(sets) or "no set")
    return read_json(file, parse, rule, _RECOMPUTE)


def read_kl_set(file: Path, problems: Sequence[Problem], vocabulary: int) -> list[Row]:
    """The responses to these problems on which the KL to the reference is measured.

    Raises: UserError unless the file has one response to each, of tokens below `vocabulary`.
    """

    def token(value: Any) -> int:
        if not isinstance(value, int) or not 0 <= value < vocabulary:
            raise TypeError(f"{value!r} is not a token id")
        return value

    from gft_lite.policy.batching import Row  # Needs torch.

    def parse(value: Any) -> list[Row]:
        rows = [Row(tuple(map(token, prompt)), tuple(map(token, response)))
                for prompt, response in value]  # fmt: skip
        if [row.prompt_ids for row in rows] != [p.prompt_ids for p in problems]:
            raise ValueError("responses to other problems")
        if not all(row.response_ids for row in rows):
            raise ValueError("an empty response")
        return rows

    rule = f"must have one response to each of the {len(problems)} problems of the KL set"
    return read_json(file, parse, rule, _RECOMPUTE)
