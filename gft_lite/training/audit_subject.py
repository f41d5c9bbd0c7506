"""What `gft-lite audit` computes with: a policy in fp32, and the groups of one step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from gft_lite.policy.base import Policy
from gft_lite.policy.model_checks import check_model
from gft_lite.policy.model_config import report_errors
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.method_parameters import complete_objective
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import PolicySettings
from gft_lite.rollout.base import Sampling
from gft_lite.rollout.sampling import make_prompt_format
from gft_lite.rollout.transformers_engine import TransformersEngine
from gft_lite.runs.metrics import PhaseTimer
from gft_lite.training.groups import GroupBuilder
from gft_lite.training.run_data import load_run_data
from gft_lite.training.step_loss import choose_importance
from gft_lite.types import Group, Problem, Response, ScoredGroup
from gft_lite.utils.cpu import set_threads
from gft_lite.utils.errors import RecipeError

MIN_GROUPS, MIN_ROWS = 5, 15
# Texts are cut: the arithmetic of a step does not depend on what they say.
MAX_CHARACTERS, MAX_PROMPT, MAX_SAMPLED = 160, 64, 24
ADAPTER_NOISE = 0.05
PROGRESS = 0.3
# Of a small model; each is set where the architecture's config has it.
_SMALL = {
    "hidden_size": 64, "n_embd": 64, "num_hidden_layers": 2, "n_layer": 2,
    "num_attention_heads": 4, "n_head": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 128, "moe_intermediate_size": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """The recipe with the settings of an audit, its policy, and the scored groups of one step."""

    recipe: Recipe
    policy: Policy
    groups: Sequence[ScoredGroup]


def prepare_subject(recipe: Recipe, folder: Path) -> Subject:
    """The policy of the recipe in fp32 with an adapter that does something, and a step's groups.

    Any other model than the lab's is replaced by a small random one of its architecture, which
    is written to `folder`. Rewards are invented, so that all sources and both signs of the
    advantage occur: the base alone often gives flat groups only.

    Raises: RecipeError.
    """
    recipe = _audit_settings(complete_objective(recipe))
    if recipe.policy.model != "lab":
        settings = _with_small_model(recipe.policy, folder / "model")
        recipe = recipe.model_copy(update={"policy": settings})
    set_threads(recipe.policy.threads)
    policy = load_policy(recipe.policy, recipe.seed)
    policy.model.train()
    groups = _build_groups(recipe, policy, folder)
    move_adapter(policy)
    return Subject(recipe, policy, groups)


def move_adapter(policy: Policy, scale: float = ADAPTER_NOISE) -> None:
    """Add the same noise to the adapter at every call: a new one would leave the base as it is."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def _audit_settings(recipe: Recipe) -> Recipe:
    """The recipe in plain fp32 on the CPU, without what is random or bound to a run."""
    policy = {
        "backend": "transformers", "device": "cpu", "dtype": "float32", "quantization": "none",
        "adapter": None, "reference": "base", "layout": "auto", "gradient_checkpointing": False,
        "offload_checkpoints": False, "offload_embedding": False,
    }  # fmt: skip
    # The noise on the adapter would untie the blocks of pissa and olora.
    lora = {"dropout": 0.0, "init": "default"}
    groups = max(MIN_GROUPS, math.ceil(MIN_ROWS / recipe.group.size))
    # As with the recipe's own engine: with the audit's, `auto` would be none.
    importance = {"mode": choose_importance(recipe).mode}
    updates: dict[str, dict[str, Any]] = {
        "policy": policy | {"lora": recipe.policy.lora.model_copy(update=lora)},
        "group": {"offline": None},
        "objective": {"importance": recipe.objective.importance.model_copy(update=importance)},
        "rollout": {"engine": "transformers", "resample": 0},
        # A step that is large beside the rounding of the weights.
        "optim": {"name": "adamw", "lr": 0.01, "schedule": "constant", "warmup": 0.0},
        "train": {"problems_per_step": groups},
        "eval": {"sets": {}},
    }
    sections = {n: getattr(recipe, n).model_copy(update=values) for n, values in updates.items()}
    return recipe.model_copy(update=sections)


def _with_small_model(settings: PolicySettings, folder: Path) -> PolicySettings:
    """The settings with a small random model of the same architecture, vocabulary and tokenizer.

    Raises: RecipeError.
    """
    checked = check_model(settings)
    transformers.utils.logging.disable_progress_bar()
    with report_errors(settings.model):
        config: Any = transformers.AutoConfig.from_pretrained(
            checked.location, **checked.hub_options
        )
        config.update({name: size for name, size in _SMALL.items() if hasattr(config, name)})
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
        config.quantization_config = None
        config.dtype = "float32"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(
                config, trust_remote_code=settings.trust_remote_code
            )
            # Weights large enough that attention and the distribution of tokens are not uniform.
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder)
        checked.tokenizer.save_pretrained(folder)
    return settings.model_copy(update={"model": str(folder), "revision": None})


def _build_groups(recipe: Recipe, policy: Policy, folder: Path) -> list[ScoredGroup]:
    format = make_prompt_format(policy, recipe.data.prompt)
    problems = [_cut(p) for p in load_run_data(recipe, policy, Console(quiet=True)).problems]
    engine = TransformersEngine(recipe.rollout, policy, folder)
    builder = GroupBuilder(recipe, problems, engine, format, _grade)
    # Hot samples, for tokens of all probabilities: the lab's base is sure of its own.
    builder.sampling = Sampling(temperature=2.0, max_tokens=MAX_SAMPLED)
    groups = builder.build(1, PhaseTimer(), PROGRESS).groups
    if not any(response.token_ids for scored in groups for response, _ in scored):
        raise RecipeError(["data: must give responses to train on, got none."])
    return groups


def _cut(problem: Problem) -> Problem:
    return replace(
        problem,
        prompt_ids=problem.prompt_ids[-MAX_PROMPT:],
        experts=tuple(text[:MAX_CHARACTERS] for text in problem.experts),
        teachers=tuple(text[:MAX_CHARACTERS] for text in problem.teachers),
    )


def _grade(groups: Sequence[Group]) -> list[Group]:
    """The groups with invented rewards: two mixed ones, self samples wrong, right, all right."""
    return [
        Group(group.problem, tuple(_graded(r, i, number) for i, r in enumerate(group)))
        for number, group in enumerate(groups)
    ]


def _graded(response: Response, index: int, number: int) -> Response:
    own = response.source == "self"
    kind = number % MIN_GROUPS
    right = {2: not own, 3: own or index % 2 == 0, 4: True}.get(kind, (index + number) % 2 == 0)
    # No two advantages of a group are equal, unless the group is flat.
    reward = 1.0 if kind == 4 else right + index / 64
    # Samples end at the audit's own limit; some stay truncated, for objective.mask_truncated.
    cut = response.truncated and index % 3 == 0
    return replace(response, reward=reward, correct=right, verdict="ok",
                   finish_reason="length" if cut else "stop")  # fmt: skip
