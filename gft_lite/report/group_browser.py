"""The groups a report shows: responses side by side, each token with p and its coefficient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from gft_lite.objective.losses import LossInputs
from gft_lite.objective.methods import find_method
from gft_lite.recipe.method_parameters import bind_method
from gft_lite.recipe.schema import Recipe
from gft_lite.report.loading import Run
from gft_lite.runs import checkpoint
from gft_lite.types import SOURCES
from gft_lite.utils.errors import RecipeError

if TYPE_CHECKING:
    from gft_lite.evaluation.targets import Target
    from gft_lite.policy.base import Policy


_TOKEN_BUDGET = 8192
Tokens = dict[str, Any]


@dataclass(slots=True)
class Moment:
    """Groups of one step of a run, as it wrote them, and the policy that says p.

    `adapter` None is the base; `seen` tells in words whose p it is, and `tokens` holds what it
    says of each response of each group, None where it was not asked.
    """

    run: Run
    step: int
    adapter: Path | None
    seen: str
    groups: Sequence[Mapping[str, Any]]
    tokens: list[list[Tokens]] | None = None


def moments(run: Run, groups: int) -> list[Moment]:
    """The first `groups` groups of the steps whose policy is still there, and of the last step.

    Those are step 1, which began from the base, and the steps right after a checkpoint.
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
        Moment(run, step, adapter, seen, run.folder.groups(step)[:groups])
        for step, (adapter, seen) in adapters.items()
    ]


def score(shown: Sequence[Moment], console: Console) -> list[str]:
    """Have the runs' policies say p of every token; returns why some could not."""
    from gft_lite.evaluation.targets import Target, group_by_base

    plain: dict[str, Any] = {
        "reference": "base", "gradient_checkpointing": False, "offload_checkpoints": False,
        "offload_embedding": False,
    }  # fmt: skip
    by_label: dict[str, Moment] = {}
    targets: list[Target] = []
    for number, moment in enumerate(shown):
        settings = moment.run.recipe.policy.model_copy(
            update={**plain, "adapter": moment.adapter and str(moment.adapter)}
        )
        targets.append(Target(str(number), settings, moment.adapter))
        by_label[str(number)] = moment
    failures = []
    for group in group_by_base(targets):
        try:
            _score_together(group, by_label, console)
        except (RecipeError, OSError, RuntimeError) as error:  # No such model, no memory for it.
            failures.append(f"{group[0].policy.model}: {error}")
            console.print(f"no p of the tokens: {failures[-1]}", markup=False, soft_wrap=True)
    return failures


def _score_together(
    targets: Sequence[Target], moments: Mapping[str, Moment], console: Console
) -> None:
    """Score the moments whose policies are one base with another adapter each."""
    from gft_lite.policy.registry import load_policy

    adapted = next((t for t in targets if t.adapter is not None), targets[0])
    policy = load_policy(adapted.policy)
    for target in targets:
        moment = moments[target.label]
        console.print(f"{moment.run.label}, step {moment.step}: p of each token", markup=False)
        if target.adapter is None:
            with policy.base():
                moment.tokens = _tokens(policy, moment)
        else:
            policy.load_adapter(target.adapter)
            moment.tokens = _tokens(policy, moment)


def _tokens(policy: Policy, moment: Moment) -> list[list[Tokens]]:
    from gft_lite.data.prompts import PromptFormat
    from gft_lite.policy.batching import Row

    recipe = moment.run.recipe
    format = PromptFormat(policy.tokenizer, recipe.data.prompt)
    rows = [
        Row(format.prompt_ids(group["problem"]["text"]), tuple(response["token_ids"]))
        for group in moment.groups
        for response in group["responses"]
    ]
    scored = iter(
        {
            "text": token_texts(policy.tokenizer, row.response_ids),
            "p": _rounded(probabilities),
            "c": _rounded(coefficients(recipe, probabilities)),
        }
        for row, probabilities in zip(rows, _probabilities(policy, rows), strict=True)
    )
    return [[next(scored) for _ in group["responses"]] for group in moment.groups]


def _probabilities(policy: Policy, rows: Sequence[Any]) -> list[list[float]]:
    """The policy's p of each response token of each row."""
    import torch

    from gft_lite.policy.base import evaluating

    found: list[list[float]] = [[] for _ in rows]
    with torch.no_grad(), evaluating(policy):
        for batch in policy.batches(rows, _TOKEN_BUDGET):
            probabilities = policy.token_scores(batch).logprobs.exp().tolist()
            for row, p in zip(batch.row.tolist(), probabilities, strict=True):
                found[row].append(p)
    return found


def coefficients(recipe: Recipe, probabilities: Sequence[float]) -> list[float]:
    """What the method's loss makes of p: `-d loss / d log p` of each token at advantage 1.

    For GFT that is C(p) of Eq. 5, for SFT 1, for DFT p; a KL term is left out, and the policy
    is that of the rollout.
    """
    import torch

    method = find_method(recipe.method)
    logprobs = torch.tensor(probabilities, dtype=torch.float64).log().requires_grad_()
    zeros = torch.zeros_like(logprobs)
    inputs = LossInputs(
        logprobs,
        torch.ones_like(logprobs),
        source=torch.full(logprobs.shape, SOURCES.index("self")),
        engine_logprobs=logprobs.detach(),
        entropy=zeros,
        reference_logprobs=logprobs.detach(),
        reference_kl=zeros,
        success_share=zeros,
        progress=0.5,
    )
    loss = method.loss(inputs, **bind_method(recipe)).per_token
    [gradient] = torch.autograd.grad(loss.sum(), logprobs)
    return (-gradient).tolist()


def token_texts(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """Each token's own part of the text; a character of several tokens is the last one's."""
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(tokenizer.backend_tokenizer, i) or "" for i in ids]


def _rounded(values: Iterable[float]) -> list[float | None]:
    """Three digits say enough, and JSON has no NaN."""
    return [float(f"{value:.3g}") if math.isfinite(value) else None for value in values]


def page_groups(shown: Iterable[Moment]) -> list[dict[str, Any]]:
    """The groups as the page's script reads them."""
    return [_page_group(m, place) for m in shown for place in range(len(m.groups))]


def _page_group(moment: Moment, place: int) -> dict[str, Any]:
    recipe, group = moment.run.recipe, moment.groups[place]
    method = find_method(recipe.method)
    tokens = moment.tokens and moment.tokens[place]
    responses = [
        {
            **{key: response[key] for key in ("source", "reward", "advantage", "verdict", "text")},
            "cut": response["finish_reason"] == "length",
            "tokens": tokens[i] if tokens else None,
        }
        for i, response in enumerate(group["responses"])
    ]
    rewards = {response["reward"] for response in responses}
    return {
        "run": moment.run.label,
        "step": moment.step,
        "seen": moment.seen if tokens else None,
        "loss": method.formula or recipe.method,
        "tau": recipe.objective.tau if "tau" in method.parameters else None,
        **group["problem"],
        "flat": method.group_advantages and len(rewards) == 1,
        "responses": responses,
    }
