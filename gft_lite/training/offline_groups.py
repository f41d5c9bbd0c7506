"""Offline groups: sampled and scored before training, on the disk, read as training needs them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gft_lite.data.problems import problems_of_step
from gft_lite.policy.base import Policy, evaluating
from gft_lite.policy.batching import Row
from gft_lite.recipe.schema import Recipe
from gft_lite.runs.base_cache import BASE_EVALUATION, KL_SET, base_inputs, copy_base_files
from gft_lite.runs.folder import RunFolder
from gft_lite.types import Group, Problem, Response
from gft_lite.utils.errors import RecipeError, short_repr
from gft_lite.utils.files import fsync
from gft_lite.utils.tables import flatten

GROUPS = "groups.jsonl"
# What of a recipe decides which groups are sampled, and how they are scored.
_DECIDES: dict[str, Any] = {
    "policy": {"model", "revision", "adapter", "quantization", "double_quantization", "context"},
    "data": ...,
    "group": {"expert", "teacher", "self", "shortfall"},
    "reward": {"functions"},
    "rollout": {"temperature", "top_p", "top_k", "max_tokens", "stop"},
}


@dataclass(frozen=True, slots=True)
class Turn:
    """A problem in the step that visits it, for the `visit`-th time (from 0)."""

    problem: Problem
    step: int
    visit: int


def turns(recipe: Recipe, problems: Sequence[Problem], step: int) -> list[Turn]:
    """The problems of a step (from 1), in their order."""
    per_step = recipe.train.problems_per_step
    first = (step - 1) * per_step
    found = problems_of_step(problems, step - 1, per_step, recipe.seed)
    return [Turn(p, step, (first + i) // len(problems)) for i, p in enumerate(found)]


def all_turns(recipe: Recipe, problems: Sequence[Problem], visits: int) -> Iterator[Turn]:
    """What the recipe's steps visit, each problem at most `visits` times."""
    most = math.ceil(visits * len(problems) / recipe.train.problems_per_step)
    for step in range(1, min(recipe.steps or most, most) + 1):
        yield from (t for t in turns(recipe, problems, step) if t.visit < visits)


class OfflineGroups:
    """Scored groups by problem and visit, a JSON line each, appended as they come.

    The file stays on the disk but for where each group is in it. `flat` counts groups whose
    rewards are all equal.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.file = self.folder / GROUPS
        self.flat = 0
        self._places: dict[tuple[str, int], int] = {}
        self._visits = Counter[str]()
        self._sums: dict[str, list[float]] = {}
        self._end = 0
        if self.file.exists():
            with self.file.open("rb") as lines:
                for line in lines:
                    if line.endswith(b"\n"):  # A kill leaves half a line.
                        self._note(line)

    def __contains__(self, turn: Turn) -> bool:
        return (turn.problem.id, turn.visit) in self._places

    def __len__(self) -> int:
        return len(self._places)

    def by_source(self) -> dict[str, dict[str, float]]:
        """Responses, mean reward and tokens of each source."""
        return {
            source: {"responses": count, "mean reward": reward / count, "tokens": tokens}
            for source, (count, reward, tokens) in self._sums.items()
        }

    def add(self, turns: Sequence[Turn], groups: Sequence[Group]) -> None:
        """Keep a chunk of groups; they survive whatever ends the process afterwards."""
        with self.file.open("ab") as file:
            file.truncate(self._end)
            for turn, group in zip(turns, groups, strict=True):
                line = json.dumps(_to_json(turn, group)).encode() + b"\n"
                file.write(line)
                self._note(line)
        fsync(self.file)

    def groups(self, turns: Sequence[Turn]) -> list[Group]:
        """The groups of these turns; a visit for which none were sampled has an earlier one's.

        Raises: RecipeError for a problem that reads differently there.
        """
        with self.file.open("rb") as file:
            return [self._read(file, turn) for turn in turns]

    def describe(self, recipe: Recipe, problems: Sequence[Problem]) -> str:
        """One line for the log."""
        line = (
            f"{len(self)} groups in {self.folder}; their self responses are from before training, "
            "not from the policy as it learns (off-policy)"
        )
        asked = [t for step in range(1, (recipe.steps or 0) + 1)
                 for t in turns(recipe, problems, step)]  # fmt: skip
        again = sum(turn not in self for turn in asked)
        return f"{line}; {again} of {len(asked)} visits find an earlier one's" if again else line

    def begin(
        self, recipe: Recipe, run: RunFolder | None, policy: Policy,
        problems: Sequence[Problem], limit: float,
    ) -> None:  # fmt: skip
        """Check that training can go by these groups, and begin its run, if it is this process's,
        with what the base was asked for them, where the run would ask the same.

        `limit` is in nats per token. Raises: RecipeError.
        """
        self._refuse_gaps(recipe, problems)
        self._refuse_other_base(policy, problems, limit)
        there = RunFolder(self.folder)
        theirs = Recipe.load(there.path / "recipe.yaml")
        if run and base_inputs(theirs) == base_inputs(recipe):
            files = [f for f in (KL_SET, BASE_EVALUATION)
                     if (there.path / f).exists() and not (run.path / f).exists()]  # fmt: skip
            copy_base_files(run, recipe, there, files)

    def _refuse_gaps(self, recipe: Recipe, problems: Sequence[Problem]) -> None:
        """Every problem that the steps visit must be there."""
        asked = {turn.problem.id for turn in all_turns(recipe, problems, 1)}
        if missing := asked - self._visits.keys():
            raise RecipeError(
                [f"group.offline: must have the groups of all {len(asked)} problems that the steps "
                 f"visit, got {str(self.folder)!r} without {len(missing)} of them. Sample them: "
                 f"gft-lite groups RECIPE --out {self.folder}"]
            )  # fmt: skip

    def _refuse_other_base(self, policy: Policy, problems: Sequence[Problem], limit: float) -> None:
        """The policy, as it starts, must give a sample the log-probs that it was drawn with."""
        first = next((p for p in problems if self._visits[p.id]), None)
        [group] = self.groups([Turn(first, 1, 0)]) if first else [()]
        sample = next((r for r in group if r.logprobs), None)
        if first is None or sample is None:
            return
        [batch] = policy.batches([Row(first.prompt_ids, sample.token_ids)], 1)
        adapter = nullcontext() if policy.settings.adapter else policy.base()
        with torch.no_grad(), evaluating(policy), adapter:
            own = policy.token_scores(batch).logprobs.cpu()
        gap = (own - torch.tensor(sample.logprobs)).abs().mean().item()
        if not gap <= limit:
            raise RecipeError(
                [f"group.offline: must be samples of this base, got {str(self.folder)!r}, whose "
                 f"log-probs are {gap:.2g} nats per token away (rollout.probe_limit is {limit}). "
                 "Sample others with gft-lite groups."]
            )  # fmt: skip

    def _note(self, line: bytes) -> None:
        """Count a line and remember its place."""
        try:
            entry = json.loads(line)
            place = entry["problem"]["id"], entry["visit"]
            responses = [_response(r) for r in entry["responses"]]
        except (ValueError, KeyError, TypeError) as error:
            raise RecipeError(
                [f"group.offline: must be a folder that gft-lite groups filled, got "
                 f"{str(self.folder)!r} with a line in {GROUPS} that is no group: {line[:40]!r}."]
            ) from error  # fmt: skip
        self._places[place] = self._end
        self._visits[place[0]] += 1
        self._end += len(line)
        self.flat += len({r.reward for r in responses}) == 1
        for r in responses:
            sums = self._sums.setdefault(r.source, [0, 0.0, 0])
            for i, amount in enumerate((1, r.reward or 0.0, len(r.token_ids))):
                sums[i] += amount

    def _read(self, file: Any, turn: Turn) -> Group:
        problem = turn.problem
        file.seek(self._places[problem.id, turn.visit % self._visits[problem.id]])
        entry = json.loads(file.readline())
        kept = entry["problem"]
        if (kept["text"], kept["answer"]) != (problem.text, problem.answer):
            raise RecipeError(
                [f"group.offline: must be of the same data, got {str(self.folder)!r}, where "
                 f"problem {problem.id} is {short_repr(kept['text'])}, "
                 f"{short_repr(kept['answer'])}. "
                 "Sample others with gft-lite groups."]
            )  # fmt: skip
        return Group(problem, tuple(_response(r) for r in entry["responses"]))


def _to_json(turn: Turn, group: Group) -> dict[str, Any]:
    problem = group.problem
    responses = [asdict(r) for r in group]
    for r in responses:
        # Six digits are what an engine's float32 has.
        r["logprobs"] = r["logprobs"] and [round(x, 6) for x in r["logprobs"]]
    asked = {"id": problem.id, "text": problem.text, "answer": problem.answer}
    return {"problem": asked, "visit": turn.visit, "responses": responses}


def _response(entry: dict[str, Any]) -> Response:
    ids, logprobs = tuple(entry["token_ids"]), entry["logprobs"]
    return Response(**entry | {"token_ids": ids, "logprobs": logprobs and tuple(logprobs)})


# --- the folder's recipe ---------------------------------------------------------------------


def open_offline(recipe: Recipe) -> OfflineGroups | None:
    """The groups that `group.offline` names, if it names any.

    Raises: RecipeError if there are none, or if they were sampled by a recipe that differs in
    what decides about groups, with each such field.
    """
    folder = recipe.group.offline
    if folder is None:
        return None
    refuse_other_recipe(folder, recipe, "group.offline")
    return OfflineGroups(folder)


def refuse_other_recipe(
    folder: str | Path, recipe: Recipe, field: str, *, seed: bool = False
) -> Recipe:
    """The recipe that a folder's groups were sampled by, which must agree with this one.

    Raises: RecipeError with every field that decides about groups, and on request the seed, and
    that differs.
    """
    file = Path(folder) / "recipe.yaml"
    if not file.is_file():
        raise RecipeError(
            [f"{field}: must be a folder that gft-lite groups filled, got {str(folder)!r}. "
             f"Fill it: gft-lite groups RECIPE --out {folder}"]
        )  # fmt: skip
    theirs = Recipe.load(file)
    decides = _DECIDES | {"seed": ...} if seed else _DECIDES
    old, new = (_decisions(r, decides) for r in (theirs, recipe))
    if differing := [name for name in old | new if old.get(name) != new.get(name)]:
        raise RecipeError(
            [f"{name}: must be {short_repr(old.get(name))} as in {file}, by which the groups were "
             f"sampled, got {short_repr(new.get(name))}. Change it, or sample others."
             for name in differing]
        )  # fmt: skip
    return theirs


def _decisions(recipe: Recipe, decides: Mapping[str, Any]) -> dict[str, Any]:
    tree = recipe.model_dump(mode="json", include=decides)
    return {name.replace("/", "."): value for name, value in flatten(tree).items()}
