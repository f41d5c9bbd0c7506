"""Groups sampled and scored before training (`gft-lite groups`), read as training needs them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gft_lite.policy.base import Policy, evaluating
from gft_lite.policy.batching import Row
from gft_lite.recipe.effects import Affects, differences, values_affecting
from gft_lite.recipe.schema import Recipe
from gft_lite.runs.base_cache import BASE_EVALUATION, KL_SET, base_inputs, copy_base_files
from gft_lite.runs.folder import RunFolder, presampled_recipe
from gft_lite.training.visits import ProblemVisit, presampled_visits
from gft_lite.types import Group, Problem, Response
from gft_lite.utils.errors import RecipeError, short_repr
from gft_lite.utils.jsonl import JsonlFile

GROUPS = "groups.jsonl"


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """A line of the file: the problem as it was, its epoch, and the graded responses."""

    problem: Problem
    epoch: int
    responses: tuple[Response, ...]

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> StoredGroup:
        responses = tuple(_response(r) for r in entry["responses"])
        return cls(Problem.from_json(entry["problem"]), int(entry["visit"]), responses)


class SourceTotals(NamedTuple):
    """Responses, graded responses, their rewards and the tokens of one source."""

    responses: int = 0
    graded: int = 0
    reward: float = 0.0
    tokens: int = 0


class PresampledGroups:
    """Scored groups by problem and epoch, a JSON line each.

    The groups stay on the disk; their byte offsets are in memory. `flat` counts groups whose
    rewards are all equal.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.flat = 0
        self._file = JsonlFile(
            self.folder / GROUPS, StoredGroup.from_json, "must be a group", "Sample others."
        )
        self._offsets: dict[tuple[str, int], int] = {}
        self._epochs = Counter[str]()
        self._totals: dict[str, SourceTotals] = {}
        for offset, stored in self._file.entries():
            self._index(offset, stored.problem.id, stored.epoch, stored.responses)

    def __contains__(self, visit: ProblemVisit) -> bool:
        return (visit.problem.id, visit.epoch) in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def by_source(self) -> dict[str, dict[str, float]]:
        """Responses, mean reward and tokens of each source."""
        return {
            source: {
                "responses": totals.responses,
                "mean reward": totals.reward / totals.graded if totals.graded else 0.0,
                "tokens": totals.tokens,
            }
            for source, totals in self._totals.items()
        }

    def add(self, visits: Sequence[ProblemVisit], groups: Sequence[Group]) -> None:
        """Append graded groups to the file."""
        pairs = list(zip(visits, groups, strict=True))
        offsets = self._file.append([_to_json(visit, group) for visit, group in pairs])
        for offset, (visit, group) in zip(offsets, pairs, strict=True):
            self._index(offset, visit.problem.id, visit.epoch, group.responses)

    def groups(self, visits: Sequence[ProblemVisit]) -> list[Group]:
        """The groups of these visits; an epoch that was not sampled has an earlier one's.

        Raises: RecipeError for a problem with another text or answer.
        """
        return [self._read(visit) for visit in visits]

    def describe(self, recipe: Recipe, problems: Sequence[Problem]) -> str:
        """One line for the log."""
        line = (
            f"{len(self)} groups in {self.folder}; their self responses are from before training, "
            "not from the policy as it learns (off-policy)"
        )
        visits = (recipe.steps or 0) * recipe.train.problems_per_step
        epochs = max(self._epochs.values(), default=0)
        stored = sum(visit in self for visit in presampled_visits(recipe, problems, epochs))
        repeated = visits - stored
        if not repeated:
            return line
        return f"{line}; {repeated} of {visits} visits use the group of an earlier epoch"

    def begin(
        self, recipe: Recipe, run: RunFolder | None, policy: Policy, problems: Sequence[Problem]
    ) -> None:
        """Check that the groups fit the run, and copy to it what was computed with the same base.

        Raises: RecipeError if groups are missing or were sampled from another base.
        """
        self._check_complete(recipe, problems)
        self._check_base(policy, problems, recipe.rollout.probe_limit)
        source = RunFolder(self.folder)
        sampled_by = Recipe.load(source.path / "recipe.yaml")
        if run and base_inputs(sampled_by) == base_inputs(recipe):
            missing = [
                name
                for name in (KL_SET, BASE_EVALUATION)
                if (source.path / name).exists() and not (run.path / name).exists()
            ]
            copy_base_files(run, recipe, source, missing)

    def _check_complete(self, recipe: Recipe, problems: Sequence[Problem]) -> None:
        visited = {visit.problem.id for visit in presampled_visits(recipe, problems, 1)}
        if missing := visited - self._epochs.keys():
            raise RecipeError(
                [f"group.offline: must have the groups of all {len(visited)} problems that the "
                 f"steps visit, got {str(self.folder)!r} without {len(missing)} of them. Sample "
                 f"them: gft-lite groups RECIPE --out {self.folder}"]
            )  # fmt: skip

    def _check_base(self, policy: Policy, problems: Sequence[Problem], limit: float) -> None:
        """The policy at its start must give a sample the log-probs it was sampled with.

        `limit` is in nats per token.
        """
        first = next((p for p in problems if self._epochs[p.id]), None)
        [group] = self.groups([ProblemVisit(first, 1, 0)]) if first else [()]
        sample = next((r for r in group if r.logprobs), None)
        if first is None or sample is None:
            return
        [batch] = policy.batches([Row(first.prompt_ids, sample.token_ids)], 1)
        adapter = nullcontext() if policy.settings.adapter else policy.base()
        with torch.no_grad(), evaluating(policy), adapter:
            logprobs = policy.token_scores(batch).logprobs.cpu()
        gap = (logprobs - torch.tensor(sample.logprobs)).abs().mean().item()
        if not gap <= limit:
            raise RecipeError(
                [f"group.offline: must be samples of this base, got {str(self.folder)!r}, whose "
                 f"log-probs are {gap:.2g} nats per token away (rollout.probe_limit is {limit}). "
                 "Sample others with gft-lite groups."]
            )  # fmt: skip

    def _index(
        self, offset: int, problem_id: str, epoch: int, responses: Sequence[Response]
    ) -> None:
        self._offsets[problem_id, epoch] = offset
        self._epochs[problem_id] += 1
        rewards = [r.reward for r in responses if r.reward is not None]
        self.flat += len(set(rewards)) <= 1
        for r in responses:
            totals = self._totals.get(r.source, SourceTotals())
            self._totals[r.source] = SourceTotals(
                totals.responses + 1,
                totals.graded + (r.reward is not None),
                totals.reward + (r.reward or 0.0),
                totals.tokens + len(r.token_ids),
            )

    def _read(self, visit: ProblemVisit) -> Group:
        problem = visit.problem
        epoch = visit.epoch % self._epochs[problem.id]
        stored = self._file.read_at(self._offsets[problem.id, epoch])
        if stored.problem.to_json() != problem.to_json():
            raise RecipeError(
                [f"group.offline: must be of the same data, got {str(self.folder)!r}, where "
                 f"problem {problem.id} is {short_repr(stored.problem.text)}, "
                 f"{short_repr(stored.problem.answer)}. Sample others with gft-lite groups."]
            )  # fmt: skip
        return Group(problem, stored.responses)


def open_presampled(recipe: Recipe) -> PresampledGroups | None:
    """The groups that `group.offline` names, if any.

    Raises: RecipeError if there are none, or for each field in which the recipe that sampled them
    differs with an effect on groups.
    """
    folder = recipe.group.offline
    if folder is None:
        return None
    check_sampling_recipe(folder, recipe, "group.offline")
    return PresampledGroups(folder)


def check_sampling_recipe(
    folder: str | Path, recipe: Recipe, field: str, *, compare_seed: bool = False
) -> Recipe:
    """The recipe that a folder's groups were sampled by, which must agree with `recipe`.

    Raises: RecipeError for each field with an effect on groups that differs.
    """
    file = presampled_recipe(folder, field)
    sampled_by = Recipe.load(file)
    if differing := [
        f"{name}: must be {short_repr(old)} as in {file}, by which the groups were sampled, "
        f"got {short_repr(new)}. Change it, or sample others."
        for name, old, new in _differences(sampled_by, recipe)
        if compare_seed or name != "seed"
    ]:
        raise RecipeError(differing)
    return sampled_by


def _differences(old: Recipe, new: Recipe) -> Iterator[tuple[str, Any, Any]]:
    return differences(*(values_affecting(recipe, Affects.GROUPS) for recipe in (old, new)))


def _to_json(visit: ProblemVisit, group: Group) -> dict[str, Any]:
    responses = [asdict(r) for r in group]
    for r in responses:
        # Six digits are the precision of an engine's float32.
        r["logprobs"] = r["logprobs"] and [round(x, 6) for x in r["logprobs"]]
    return {"problem": group.problem.to_json(), "visit": visit.epoch, "responses": responses}


def _response(entry: Mapping[str, Any]) -> Response:
    ids, logprobs = tuple(entry["token_ids"]), entry["logprobs"]
    return Response(**{**entry, "token_ids": ids, "logprobs": logprobs and tuple(logprobs)})
