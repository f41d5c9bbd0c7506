"""Everything that lives as long as a run: folder, policy, data, engine, scorer, optimiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from gft_lite.data.problems import load_problems, problems_of_step, split_holdout
from gft_lite.data.prompts import PromptFormat
from gft_lite.evaluation.sets import evaluate_sets, open_scorer
from gft_lite.objective.advantages import group_advantages
from gft_lite.objective.methods import find_method
from gft_lite.objective.reduction import token_weights
from gft_lite.planning.planner import Plan, resolve
from gft_lite.policy.base import Policy
from gft_lite.policy.batching import Row
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import DataSettings
from gft_lite.rewards.scorer import Scorer
from gft_lite.rollout.base import RolloutEngine, Sampling
from gft_lite.rollout.distributed_engine import DistributedEngine
from gft_lite.rollout.registry import find_engine, start_engine
from gft_lite.rollout.sampling import sample, sample_seed
from gft_lite.rollout.sync_check import Probe, sync
from gft_lite.runs import checkpoint
from gft_lite.runs.folder import RunFolder, find_folder
from gft_lite.runs.trackers import Trackers
from gft_lite.training.groups import compose
from gft_lite.training.offline_groups import OfflineGroups, open_offline
from gft_lite.training.optim import make_optimizer
from gft_lite.types import Group, Problem
from gft_lite.utils.distributed import SINGLE_PROCESS, Distributed
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.memory import GIB, free_ram, process_memory


@dataclass
class Session:
    """The parts of a run, put together.

    `ranks` are the processes of the run, `offline` has its groups where they were sampled before
    it, `token_budget` is that of a micro-batch, `plan` the memory plan where the model can be
    planned, `resting_memory` the process's bytes before the policy was loaded, `bad_steps`
    counts non-finite steps in a row, `tokens` the response tokens so far.
    """

    recipe: Recipe
    run: RunFolder
    distributed: Distributed
    console: Console
    policy: Policy
    format: PromptFormat
    problems: Sequence[Problem]
    eval_sets: Mapping[str, Sequence[Problem]]
    engine: RolloutEngine
    scorer: Scorer
    optimizer: torch.optim.Optimizer
    trackers: Trackers
    kl_rows: Sequence[Row]
    probe: Probe
    offline: OfflineGroups | None
    token_budget: int
    plan: Plan | None
    resting_memory: int
    bad_steps: int = 0
    tokens: int = 0

    def problems_of(self, step: int, attempt: int = 0) -> tuple[Problem, ...]:
        """The problems of a step (from 1); each further attempt has others."""
        per_step = self.recipe.train.problems_per_step
        seed = sample_seed(self.recipe.seed, "attempt", attempt) if attempt else self.recipe.seed
        return problems_of_step(self.problems, step - 1, per_step, seed)

    @property
    def sampling(self) -> Sampling:
        """How the self responses are drawn."""
        r = self.recipe.rollout
        return Sampling(r.temperature, r.top_p, r.top_k, r.max_tokens, tuple(r.stop))

    def evaluate(self) -> dict[str, Any]:
        """The figures of what the engine serves on every evaluation set."""
        tokens = self.recipe.eval.max_tokens or self.recipe.rollout.max_tokens
        return evaluate_sets(
            self.engine, self.format, self.score, self.eval_sets, self.recipe.eval, tokens,
            self.recipe.seed,
        )  # fmt: skip

    def spent(self, steps: float, tokens: float = 0) -> float:
        """The share of the budget that is spent after so many steps, or `tokens` more tokens."""
        if self.recipe.budget.tokens:
            return (self.tokens + tokens) / self.recipe.budget.tokens
        return steps / (self.recipe.steps or 1)

    def advantages(self, group: Group) -> list[float]:
        """The K advantages of a scored group; ones for methods that know no rewards."""
        if not find_method(self.recipe.method).group_advantages:
            return [1.0] * len(group)
        objective = self.recipe.objective
        return group_advantages(group.rewards, std=objective.std, eps=objective.eps).tolist()

    def score(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with rewards, graded by all processes."""
        return self.distributed.all_gather(self.scorer.score(self.distributed.shard(groups)))

    def token_weights(self, lengths: Sequence[int]) -> list[float]:
        """The weight of each token of each row of one update."""
        reduction = self.recipe.objective.reduction
        return token_weights(lengths, reduction, self.recipe.rollout.max_tokens)

    def say(self, text: str) -> None:
        """Tell the user, with paths as they are."""
        self.console.print(text, markup=False, soft_wrap=True)

    def save(self, step: int) -> None:
        """Write a checkpoint."""
        if not self.distributed.is_main:
            return
        keep = self.recipe.checkpoint.keep
        checkpoint.save(
            self.run.checkpoints, step, self.policy, self.optimizer, keep, bad_steps=self.bad_steps
        )

    def sync(self, step: int) -> float:
        """Have the engine serve the policy; returns the gap in nats. Raises: RolloutError."""
        sync(self.engine, self.policy, self.run.scratch / "adapters", step)
        return self.probe.check(self.engine)

    def restore(self) -> int:
        """Go back to the newest whole checkpoint; returns its step, 0 if there is none yet."""
        saved = self.distributed.broadcast_from_main(
            lambda: checkpoint.newest_valid(self.run.checkpoints, self.say)
        )
        step = 0
        if saved:
            step, counters = checkpoint.restore(saved, self.policy, self.optimizer)
            self.bad_steps = counters["bad_steps"]
        self.run.truncate_after(step)
        self.tokens = self.distributed.broadcast_from_main(
            lambda: sum(m["tokens"] for m in self.run.metrics())
        )
        return step


def open_session(
    recipe: Recipe, out: str | Path | None, *, resume: bool, console: Console,
    stack: ExitStack, distributed: Distributed = SINGLE_PROCESS,
) -> Session:  # fmt: skip
    """Put a run together; what must be closed is left to `stack`.

    Raises: RecipeError for what only shows when data and model meet.
    """
    run = find_folder(recipe, out, resume=resume, distributed=distributed)
    asked, offline = recipe, open_offline(recipe)
    recipe = asked.with_needed_engine()
    scorer = stack.enter_context(_users_own(recipe))
    recipe, plan = distributed.broadcast_from_main(lambda: _planned(recipe, distributed, console))
    recipe = _own_part(recipe, distributed)
    resting = process_memory("VmRSS")
    if recipe.policy.threads:
        torch.set_num_threads(recipe.policy.threads)
    policy = load_policy(recipe.policy, recipe.seed, recipe.rollout)
    policy.model.train()
    format = PromptFormat(policy.tokenizer, recipe.data.prompt)
    policy.eos_ids |= set(format.stop_ids)
    # One token to spare: an engine can't score a completion without generating one more.
    reserve = recipe.rollout.max_tokens + 1
    load = partial(_load, policy=policy, reserve=reserve, console=console)
    problems, held_out = split_holdout(load("data", recipe.data), recipe.data.holdout)
    problems = _composable(problems, recipe, console)
    eval_sets = {n: load(f"eval.sets.{n}", data) for n, data in recipe.eval.sets.items()}
    stack.enter_context(run.lock())
    run.create(asked.to_yaml())
    if offline:
        limit = recipe.rollout.probe_limit
        offline.begin(asked, run if distributed.is_main else None, policy, problems, limit)
        told = f"group.offline: {offline.describe(recipe, problems)}"
        console.print(told, markup=False, soft_wrap=True)
    console.print(f"run folder: {run.path}")
    console.print(f"layout of micro-batches: {policy.layout}")
    start = partial(start_engine, recipe.rollout, policy, run.scratch)
    engine = DistributedEngine(start, console, distributed)
    stack.callback(engine.close)
    names = recipe.log.trackers if distributed.is_main else []
    trackers = Trackers(names, recipe.name, run.path, recipe.model_dump(mode="json"))
    stack.callback(trackers.close)
    monitored = (held_out or problems)[: recipe.monitor.problems]
    kl_rows = _kl_rows(recipe, run, distributed, engine, format, monitored)
    probe = Probe(policy, kl_rows[0], recipe.rollout.probe_limit)
    gap = f"log-prob gap {probe.calibrate(engine):.2g} nats"
    console.print(f"engine: {engine.name}, base {engine.base}, {gap}", soft_wrap=True)
    engine.check = probe.check
    return Session(
        recipe=recipe,
        run=run,
        distributed=distributed,
        console=console,
        policy=policy,
        format=format,
        problems=problems,
        eval_sets=eval_sets or ({"held_out": held_out} if held_out else {}),
        engine=engine,
        scorer=scorer,
        optimizer=make_optimizer(policy, recipe.optim),
        trackers=trackers,
        kl_rows=kl_rows,
        probe=probe,
        offline=offline,
        token_budget=int(recipe.train.micro_batch_tokens),
        plan=plan,
        resting_memory=resting,
    )


def _own_part(recipe: Recipe, distributed: Distributed) -> Recipe:
    """The recipe with the GPU and the servers of this one of several processes."""
    policy, rollout = recipe.policy, recipe.rollout
    if (
        distributed.world_size > 1
        and policy.device in ("auto", "cuda")
        and torch.cuda.is_available()
    ):
        policy = policy.model_copy(update={"device": f"cuda:{distributed.local_rank}"})
    # Each loads adapters of its own: servers that several share would swap them all the time.
    if servers := distributed.shard(rollout.servers):
        rollout = rollout.model_copy(update={"servers": servers})
    return recipe.model_copy(update={"policy": policy, "rollout": rollout})


def _planned(
    recipe: Recipe, distributed: Distributed, console: Console
) -> tuple[Recipe, Plan | None]:
    """The recipe with every `auto` of the memory plan settled by what this device has free."""
    where = recipe.policy.device
    on_gpu = where != "cpu" and torch.cuda.is_available()
    device = "cuda" if where == "auto" else where
    free, card = (
        torch.cuda.mem_get_info(device)
        if on_gpu
        else (free_ram() // distributed.local_world_size, 0)
    )
    settled, plan = resolve(recipe, free, "cuda" if on_gpu else "cpu", card)
    if plan:
        for name in sorted(plan.chosen):
            console.print(f"memory plan: {name}={plan.settings[name]}")
        for problem in plan.problems:
            console.print(f"memory plan: {problem}, and {free / GIB:.1f} GiB are free")
    return settled, plan


def _load(
    field: str, settings: DataSettings, *, policy: Policy, reserve: int, console: Console
) -> tuple[Problem, ...]:
    if reserve >= policy.context:
        raise RecipeError(
            [f"rollout.max_tokens: must leave room for a prompt in the model's context of "
             f"{policy.context} tokens, got {reserve - 1}."]
        )  # fmt: skip
    format = PromptFormat(policy.tokenizer, settings.prompt, f"{field}.prompt")
    loaded = load_problems(settings, format, context=policy.context, reserve=reserve, field=field)
    console.print(f"{field}: {loaded.describe()}")
    for example in loaded.examples:
        console.print(f"  {example}", markup=False)
    return loaded.problems


def _composable(
    problems: Sequence[Problem], recipe: Recipe, console: Console
) -> tuple[Problem, ...]:
    """The problems whose demonstrations can fill a group under the shortfall rule."""
    kept = tuple(p for p in problems if compose(p, recipe.group) is not None)
    short = sum(
        len(p.experts) < recipe.group.expert or len(p.teachers) < recipe.group.teacher
        for p in problems
    )
    if short:
        console.print(
            f"group.shortfall: {recipe.group.shortfall}: {short} of {len(problems)} problems have "
            f"fewer demonstrations than the group asks for; {len(problems) - len(kept)} dropped"
        )
    if not kept:
        raise RecipeError(
            [f"group: must find its demonstrations in the data, but none of {len(problems)} "
             "problems has them. Check data.columns.expert and .teacher, or group.shortfall."]
        )  # fmt: skip
    return kept


def _users_own(recipe: Recipe) -> Scorer:
    """Find what the recipe names, the user's own too, before anything large is loaded."""
    try:
        find_method(recipe.method)
    except ValueError as error:
        raise RecipeError([f"method: {error}, got {recipe.method!r}."]) from error
    find_engine(recipe.rollout.engine)
    return open_scorer(recipe.reward, conversational=recipe.data.prompt.style == "chat")


def _kl_rows(
    recipe: Recipe,
    run: RunFolder,
    distributed: Distributed,
    engine: RolloutEngine,
    format: PromptFormat,
    problems: Sequence[Problem],
) -> list[Row]:
    """The reference's own answers to fixed problems, sampled once and kept with the run."""

    def draw() -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        settings = recipe.policy
        # The engine serves the base until its first sync.
        if settings.reference == "adapter":
            engine.sync(Path(settings.adapter or ""), 0)
        sampling = Sampling(max_tokens=recipe.rollout.max_tokens)
        counts = [1] * len(problems)
        answers = sample(engine, format, problems, counts, sampling, (recipe.seed, "kl"))
        return [(p.prompt_ids, r.token_ids) for p, [r] in zip(problems, answers, strict=True)]

    pairs = distributed.cached_json(run.path / "kl_set.json", draw)
    return [Row(tuple(prompt), tuple(response)) for prompt, response in pairs]
