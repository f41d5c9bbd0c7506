"""The problems of a run by their difficulty: the share of right answers sampled before training.

What the first start of a run reads from the folder is written to the run's difficulty.json, and a
resumed run reads that, so that it visits the same problems whatever happens to the folder.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from gft_lite.data.problems import problem_key
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import DifficultySettings
from gft_lite.runs.folder import RunFolder
from gft_lite.training.presampled_groups import GROUPS
from gft_lite.types import RIGHT_ABOVE, Problem
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.files import read_json
from gft_lite.utils.jsonl import JsonlFile

RECORD = "difficulty.json"
_FIELD = "data.difficulty.from"


@dataclass(frozen=True)
class Difficulty:
    """The success shares of problems, by a hash of each; `is_recorded` if the run has them."""

    settings: DifficultySettings
    shares: Mapping[str, float]
    is_recorded: bool = False

    def select(self, problems: Sequence[Problem], console: Console) -> tuple[Problem, ...]:
        """The problems whose success share is in the range, with their shares.

        Raises: RecipeError if there are none.
        """
        s = self.settings
        found = [replace(p, success=self.shares.get(_key(p))) for p in problems]
        known = [p for p in found if p.success is not None]
        if not known:
            raise RecipeError(
                [f"{_FIELD}: must have answers to the training problems, got {s.folder!r} with "
                 f"those to {len(self.shares)} others. {_advice(s)}"]
            )  # fmt: skip
        kept = tuple(p for p in known if s.low <= (p.success or 0.0) <= s.high)
        below = sum((p.success or 0.0) < s.low for p in known)
        # A newcomer samples with the steps of the training, and loses all other problems.
        why = " (gft-lite groups samples what the steps visit: give it more train.steps)"
        dropped = (
            f"dropped {below} below, {len(known) - len(kept) - below} above, "
            f"{len(found) - len(known)} without sampled answers"
            + (why if len(known) < len(found) else "")
        )
        if not kept:
            raise RecipeError(
                [f"data.difficulty: must keep problems with a success share from {s.low:g} to "
                 f"{s.high:g}, got none: {dropped}. Lower data.difficulty.low, or raise high."]
            )  # fmt: skip
        console.print(
            f"data.difficulty: {len(kept)} of {len(problems)} problems kept, with a success share "
            f"from {s.low:g} to {s.high:g}; {dropped}", markup=False, soft_wrap=True,
        )  # fmt: skip
        return kept


def open_difficulty(recipe: Recipe, folder: RunFolder, console: Console) -> Difficulty | None:
    """The difficulties that a run has recorded, or those in the folder of `data.difficulty`.

    Raises: RecipeError for a folder without sampled answers.
    """
    settings = recipe.data.difficulty
    if settings is None:
        return None
    record = folder.path / RECORD
    if record.exists():
        rule = "must have the success share of each problem"
        advice = "Restore the file from a copy, or start the run again."
        return Difficulty(settings, read_json(record, _recorded, rule, advice), is_recorded=True)
    source = Path(settings.folder)
    right, sampled = Counter[str](), Counter[str]()
    for key, correct, samples in _answers(source, settings):
        right[key] += correct
        sampled[key] += samples
    shares = {key: right[key] / count for key, count in sampled.items() if count}
    if not shares:
        raise RecipeError(
            [f"{_FIELD}: must have sampled answers, got {settings.folder!r} with none. "
             f"{_advice(settings)}"]
        )  # fmt: skip
    for model in _models(source) - {recipe.policy.model}:
        console.print(
            f"{_FIELD}: the answers are those of {model!r}, while policy.model is "
            f"{recipe.policy.model!r}: problems may be easier or harder for it",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    return Difficulty(settings, shares)


def record_difficulty(difficulty: Difficulty | None, folder: RunFolder) -> None:
    """Write the success shares to the folder of a run that does not have them yet."""
    if difficulty and not difficulty.is_recorded:
        content = {"from": difficulty.settings.folder, "shares": dict(difficulty.shares)}
        folder.write_json(RECORD, content)


def _key(problem: Problem) -> str:
    """A hash of a problem's text and answer: data sets and suites have ids of their own."""
    content = json.dumps([problem_key(problem), problem.answer])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _answers(folder: Path, settings: DifficultySettings) -> Iterator[tuple[str, int, int]]:
    """For each group of a folder: the problem's key, and its right and all sampled answers.

    Raises: RecipeError for a folder that is not of `gft-lite groups` or `gft-lite eval`.
    """
    rule, advice = "must be a problem with graded answers", "Remove it to do without it."
    if (folder / GROUPS).is_file():
        yield from JsonlFile(folder / GROUPS, _of_group, rule, advice)
        return
    files = sorted((folder / "problems").rglob("*.jsonl"))
    models = {file.parent for file in files}
    if len(models) != 1:
        got = f"that of {len(models)} models" if models else "another"
        raise RecipeError(
            [f"{_FIELD}: must be a folder of gft-lite groups, or of gft-lite eval with one model, "
             f"got {settings.folder!r}, {got}. {_advice(settings)}"]
        )  # fmt: skip
    for file in files:
        yield from JsonlFile(file, _of_evaluation, rule, advice)


def _of_group(entry: Mapping[str, Any]) -> tuple[str, int, int]:
    own = [r for r in entry["responses"] if r["source"] == "self"]
    graded = [
        bool(r["correct"]) if r["correct"] is not None else r["reward"] > RIGHT_ABOVE
        for r in own
        if r["correct"] is not None or r["reward"] is not None
    ]
    return _key(Problem.from_json(entry["problem"])), sum(graded), len(graded)


def _of_evaluation(entry: Mapping[str, Any]) -> tuple[str, int, int]:
    key = _key(Problem.from_json(entry))
    if entry["correct"] is not None:
        return key, int(entry["correct"]), int(entry["samples"])
    graded = [score > RIGHT_ABOVE for score in entry["scores"] if score is not None]
    return key, sum(graded), len(graded)


def _models(folder: Path) -> set[str]:
    """The models whose answers a folder has, as far as it says so."""
    if (folder / "recipe.yaml").is_file():
        return {Recipe.load(folder / "recipe.yaml").policy.model}
    file, rule = folder / "targets.json", "must have the results of each target"
    if not file.is_file():
        return set()
    return read_json(
        file, lambda value: {str(entry["model"]) for entry in value.values()}, rule, "Remove it."
    )


def _recorded(value: Any) -> dict[str, float]:
    return {str(key): float(share) for key, share in value["shares"].items()}


def _advice(settings: DifficultySettings) -> str:
    return f"Sample them: gft-lite groups RECIPE data.difficulty=null --out {settings.folder}"
