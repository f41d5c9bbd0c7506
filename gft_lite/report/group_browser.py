"""The groups in a report: responses side by side, each token with p and its coefficient."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from gft_lite.data.token_texts import token_texts
from gft_lite.objective.losses import LossInputs
from gft_lite.objective.method import call_with_parameters
from gft_lite.objective.methods import METHODS, find_method
from gft_lite.recipe.method_parameters import bind_method
from gft_lite.recipe.schema import Recipe
from gft_lite.report.loading import Run
from gft_lite.runs import checkpoint
from gft_lite.types import SOURCES, Problem
from gft_lite.utils.errors import UserError
from gft_lite.utils.user_code import user_errors_as

if TYPE_CHECKING:
    from gft_lite.evaluation.targets import Target
    from gft_lite.policy.base import Policy


_TOKEN_BUDGET = 8192
_TEXT_BUDGET = 4_000_000  # Characters of groups without p on a page, all runs together.
Tokens = dict[str, Any]


@dataclass(slots=True)
class StepGroups:
    """Groups of one step of a run, and the policy that computes p of their tokens.

    `adapter` is None for the base; `policy` describes the policy in words. `tokens` has the texts,
    p and coefficients of each response of each group, None if they were not computed. `ledger` has
    what the step recorded of its first groups (`log.tokens`), empty if it recorded nothing.
    """

    run: Run
    step: int
    adapter: Path | None
    policy: str
    groups: Sequence[Mapping[str, Any]]
    ledger: Sequence[Mapping[str, Any]] = ()
    tokens: list[list[Tokens]] | None = None


def select_steps(run: Run, groups: int) -> list[StepGroups]:
    """The first `groups` groups of the steps whose policy was saved, and of the last step.

    The policy of step 1 is the base; a checkpoint is the policy of the step after it.
    """
    steps = run.folder.group_steps()
    if not steps:
        return []
    start = run.recipe.policy.adapter
    saved = {int(c.name.removeprefix("step-")): c / "adapter"
             for c in checkpoint.list_checkpoints(run.folder.checkpoints)}  # fmt: skip
    adapters: dict[int, tuple[Path | None, str]] = {}
    if steps[0] == 1:
        which = "adapter" if start else "base"
        adapters[1] = Path(start) if start else None, f"the {which}, where step 1 began"
    for step, adapter in saved.items():
        if step + 1 in steps:
            adapters[step + 1] = adapter, f"step {step}'s checkpoint, where step {step + 1} began"
    last = steps[-1]
    if saved and last not in adapters:
        newest = max(saved)
        why = f"step {newest}'s checkpoint: the policy with which step {last} began was not kept"
        adapters[last] = saved[newest], why
    return [
        _read_step(run, step, groups, adapter, policy)
        for step, (adapter, policy) in adapters.items()
    ]


def other_steps(run: Run, shown: Sequence[StepGroups], groups: int, runs: int) -> list[StepGroups]:
    """The steps that kept groups but not their policy: all, or evenly spread ones of `runs` runs.

    p of their tokens is not computed.
    """
    taken = {step.step for step in shown}
    left = [step for step in run.folder.group_steps() if step not in taken]
    if not left:
        return []
    newest = _read_step(run, left[-1], groups)
    size = len(json.dumps([newest.groups, newest.ledger]))
    count = min(len(left), max(_TEXT_BUDGET // runs // size, 1))
    return [_read_step(run, left[i * len(left) // count], groups) for i in range(count)]


def _read_step(
    run: Run, step: int, groups: int, adapter: Path | None = None, policy: str = ""
) -> StepGroups:
    ledger = (run.folder.tokens(step) or {"groups": []})["groups"]
    return StepGroups(run, step, adapter, policy, run.folder.groups(step)[:groups], ledger)


def score_tokens(steps: Sequence[StepGroups], console: Console) -> list[str]:
    """Compute p and coefficients of all tokens; returns the reasons why some could not be."""
    from gft_lite.evaluation.targets import Target, group_by_base

    plain: dict[str, Any] = {
        "reference": "base", "gradient_checkpointing": False, "offload_checkpoints": False,
        "offload_embedding": False,
    }  # fmt: skip
    by_label: dict[str, StepGroups] = {}
    targets: list[Target] = []
    for number, step in enumerate(steps):
        settings = step.run.recipe.policy.model_copy(
            update={**plain, "adapter": step.adapter and str(step.adapter)}
        )
        targets.append(Target(str(number), settings, step.adapter))
        by_label[str(number)] = step
    failures = []
    for group in group_by_base(targets):
        try:
            _score_with_one_base(group, by_label, console)
        except (UserError, OSError, RuntimeError) as error:  # No such model, no memory for it.
            failures.append(f"{group[0].policy.model}: {error}")
            console.print(f"no p of the tokens: {failures[-1]}", markup=False, soft_wrap=True)
    return failures


def _score_with_one_base(
    targets: Sequence[Target], steps: Mapping[str, StepGroups], console: Console
) -> None:
    """Score the steps whose policies are adapters of one base, which is loaded once."""
    from gft_lite.policy.registry import load_policy

    adapted = next((t for t in targets if t.adapter is not None), targets[0])
    policy = load_policy(adapted.policy)
    for target in targets:
        step = steps[target.label]
        console.print(f"{step.run.label}, step {step.step}: p of each token", markup=False)
        if target.adapter is None:
            with policy.base():
                step.tokens = _tokens(policy, step)
        else:
            policy.load_adapter(target.adapter)
            step.tokens = _tokens(policy, step)


def _tokens(policy: Policy, step: StepGroups) -> list[list[Tokens]]:
    from gft_lite.policy.batching import Row
    from gft_lite.rollout.sampling import make_prompt_format

    recipe = step.run.recipe
    format = make_prompt_format(policy, recipe.data.prompt)
    progress = (step.step - 1) / (recipe.steps or 1)
    rows, contexts = [], []
    for group in step.groups:
        prompt = format.problem_ids(Problem.from_json(group["problem"]))
        share = _success_share(group["responses"])
        for response in group["responses"]:
            rows.append(Row(prompt, tuple(response["token_ids"])))
            contexts.append(TokenContext(response["source"], share, progress))
    scored = iter(
        {
            "text": token_texts(policy.tokenizer, row.response_ids),
            "p": _rounded(scores.probabilities),
            "c": _rounded(coefficients(recipe, scores, context)),
        }
        for row, scores, context in zip(rows, _scores(policy, rows), contexts, strict=True)
    )
    return [[next(scored) for _ in group["responses"]] for group in step.groups]


@dataclass(frozen=True, slots=True)
class Scores:
    """p and the entropy in nats of each token of a response, under one policy."""

    probabilities: Sequence[float]
    entropy: Sequence[float]


@dataclass(frozen=True, slots=True)
class TokenContext:
    """What a loss can read of the response and the step that tokens belong to."""

    source: str = "self"
    success_share: float = 0.0
    progress: float = 0.0


def _success_share(responses: Sequence[Mapping[str, Any]]) -> float:
    own = [r for r in responses if r["source"] == "self"]
    return sum(r["advantage"] > 0 for r in own) / len(own) if own else 0.0


def _scores(policy: Policy, rows: Sequence[Any]) -> list[Scores]:
    """The policy's p and entropy of each response token of each row."""
    import torch

    from gft_lite.policy.base import evaluating

    found: list[list[tuple[float, float]]] = [[] for _ in rows]
    with torch.no_grad(), evaluating(policy):
        for batch in policy.batches(rows, _TOKEN_BUDGET):
            scores = policy.token_scores(batch)
            values = zip(scores.logprobs.exp().tolist(), scores.entropy.tolist(), strict=True)
            for row, value in zip(batch.row.tolist(), values, strict=True):
                found[row].append(value)
    return [Scores([p for p, _ in row], [h for _, h in row]) for row in found]


def coefficients(
    recipe: Recipe, scores: Scores, context: TokenContext = TokenContext()
) -> list[float]:
    """The loss's coefficient of each token: `-d loss / d log p` at advantage 1.

    It is C(p) of Eq. 5 for GFT, 1 for SFT, p for DFT; the sum over the parts of a loss. The policy
    is taken to be that of the rollout and the reference, so that a KL term adds nothing.

    Raises: UserError if a user's own loss fails.
    """
    import torch

    method = find_method(recipe.method)
    parameters = bind_method(recipe)
    logprobs = torch.tensor(scores.probabilities, dtype=torch.float64).log().requires_grad_()
    fixed, entropy = logprobs.detach(), torch.tensor(scores.entropy, dtype=torch.float64)
    known: dict[str, Any] = {
        "source": torch.full_like(fixed, SOURCES.index(context.source), dtype=torch.long),
        "old_logprobs": None,
        "engine_logprobs": fixed,
        "entropy": entropy,
        "row_entropy": entropy.mean().expand_as(fixed),
        "entropy_quantile": torch.ones_like(fixed),
        "reference_logprobs": fixed,
        "teacher_logprobs": fixed,
        "correct": torch.ones_like(fixed),
        "reference_kl": torch.zeros_like(fixed),
        "success_share": torch.full_like(fixed, context.success_share),
        "progress": context.progress,
    }
    needed = {need: known[need] for need in method.needs}
    inputs = LossInputs(logprobs, torch.ones_like(fixed), **needed)
    with user_errors_as(lambda text: UserError([f"method: {recipe.method}: {text}"])):
        per_token = call_with_parameters(method.loss, inputs, parameters=parameters).per_token
        inside = [context.source in part.sources for part in method.parts]
        loss = (per_token[inside] if method.parts else per_token).sum()
        [gradient] = torch.autograd.grad(loss, logprobs)
    return (-gradient).tolist()


def _rounded(values: Iterable[float]) -> list[float | None]:
    """Values with three digits, None for NaN and infinity, which JSON does not have."""
    return [float(f"{value:.3g}") if math.isfinite(value) else None for value in values]


def page_groups(steps: Iterable[StepGroups]) -> list[dict[str, Any]]:
    """The groups as JSON objects for the page's script."""
    return [_page_group(step, i) for step in steps for i in range(len(step.groups))]


def _page_group(step: StepGroups, index: int) -> dict[str, Any]:
    recipe, group = step.run.recipe, step.groups[index]
    ledger = step.ledger[index]["responses"] if index < len(step.ledger) else []
    method = METHODS.get(recipe.method)  # None for a user's own, which is not imported for this.
    tokens = step.tokens and step.tokens[index]
    responses = [
        {
            **{key: response[key] for key in ("source", "reward", "advantage", "verdict", "text")},
            "cut": response["finish_reason"] == "length",
            "tokens": tokens[i] if tokens else None,
            "ledger": ledger[i] if i < len(ledger) else None,
        }
        for i, response in enumerate(group["responses"])
    ]
    rewards = {r["reward"] for r in responses if r["reward"] is not None}
    return {
        "run": step.run.label,
        "step": step.step,
        "policy": step.policy if tokens else None,
        "loss": (method.formula if method else "") or recipe.method,
        "tau": recipe.objective.tau if method and "tau" in method.parameters else None,
        **group["problem"],
        "flat": (method is None or method.group_advantages) and len(rewards) <= 1,
        "responses": responses,
    }
