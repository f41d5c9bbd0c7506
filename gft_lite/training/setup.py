"""Set-up of a run: data, policy, engine, learner and evaluation from a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from gft_lite.data.prompts import PromptFormat
from gft_lite.evaluation.sets import SetEvaluator, open_scorer
from gft_lite.evaluation.suites import sampling_of
from gft_lite.objective.methods import find_method
from gft_lite.planning.planner import Plan, resolve
from gft_lite.planning.tables import assumptions
from gft_lite.policy.attention import describe_layout
from gft_lite.policy.base import Policy
from gft_lite.policy.batching import Row
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.schema import Recipe
from gft_lite.rewards.scorer import Scorer
from gft_lite.rollout.base import RolloutEngine, Sampling
from gft_lite.rollout.distributed_engine import DistributedEngine
from gft_lite.rollout.policy_engine import PolicyEngine
from gft_lite.rollout.prompt_check import check_chat_templates
from gft_lite.rollout.registry import find_engine, start_engine
from gft_lite.rollout.sampling import Draw, make_prompt_format, sample
from gft_lite.runs import checkpoint
from gft_lite.runs.base_cache import BASE_EVALUATION, KL_SET, read_base_evaluation, read_kl_set
from gft_lite.runs.checkpoint import list_checkpoints, step_of
from gft_lite.runs.folder import RunFolder
from gft_lite.runs.metrics import training_seconds
from gft_lite.runs.trackers import Trackers, check_trackers
from gft_lite.training.collapse_guard import CollapseGuard
from gft_lite.training.difficulty import open_difficulty, record_difficulty
from gft_lite.training.evaluation_schedule import EvaluationSchedule
from gft_lite.training.grading import Grading
from gft_lite.training.groups import GroupBuilder
from gft_lite.training.kl_monitor import KlMonitor
from gft_lite.training.learner import Learner
from gft_lite.training.presampled_groups import open_presampled
from gft_lite.training.run_data import check_demonstrations, load_run_data
from gft_lite.training.shared_parts import SharedParts
from gft_lite.training.teacher_model import TeacherModel
from gft_lite.types import Problem
from gft_lite.utils.cpu import set_threads
from gft_lite.utils.distributed import Distributed
from gft_lite.utils.memory import GIB, free_ram, trim_heap
from gft_lite.utils.progress import show_phase


@dataclass(frozen=True)
class TrainingRun:
    """The parts of a run; each owns its state, the loop only composes them.

    `evaluate` gives the figures of what the engine serves on every evaluation set; `base=True`
    says that it is the base.
    """

    recipe: Recipe
    folder: RunFolder
    distributed: Distributed
    console: Console
    policy: Policy
    engine: PolicyEngine
    grading: Grading
    builder: GroupBuilder
    learner: Learner
    monitor: KlMonitor
    trackers: Trackers
    evaluate: Callable[..., dict[str, Any]]
    eval_sets: Mapping[str, Sequence[Problem]]
    schedule: EvaluationSchedule
    guard: CollapseGuard
    plan: Plan | None

    def evaluate_base(self) -> dict[str, Any]:
        """The figures of the base, computed once in a run's folder."""
        return self.distributed.cached_json(
            self.folder.path / BASE_EVALUATION,
            partial(self.evaluate, base=True),
            lambda file: read_base_evaluation(file, self.eval_sets, self.recipe.eval.k),
        )

    def save_checkpoint(self, step: int) -> None:
        """Write a checkpoint from the main process; what a rollback may need is kept."""
        if not self.distributed.is_main:
            return
        best = self.schedule.best_step
        protected = set() if best is None else {best}
        if self.guard.settings.action == "rollback":
            steps, good = self._saved_steps(step)
            protected |= {s for s in steps if s not in good[:-1]}
        self.learner.save(self.folder.checkpoints, step, protected)

    def restore(self) -> int:
        """Return to the newest valid checkpoint; its step, 0 if there is none yet."""
        saved = self.distributed.broadcast_from_main(
            lambda: checkpoint.newest_valid(self.folder.checkpoints, self.print)
        )
        step = self.learner.restore(saved) if saved else 0
        self.folder.truncate_after(step)
        metrics = self.distributed.broadcast_from_main(self.folder.metrics)
        self.learner.response_tokens = sum(m["tokens"] for m in metrics)
        self.count_seconds(metrics)
        self.guard.resume(metrics)
        self.learner.lr_scale = self.guard.lr_scale
        return step

    def count_seconds(self, steps: Sequence[Mapping[str, Any]]) -> None:
        """Add the time of steps to that spent: in all processes that of the main one."""
        seconds = self.distributed.broadcast_from_main(lambda: [*map(training_seconds, steps)])
        self.learner.step_seconds += seconds

    def is_over(self, step: int) -> bool:
        """True if no step follows `step`: the budget is spent, or early stop or guard ended it."""
        metrics = self.distributed.broadcast_from_main(self.folder.metrics)
        stopped = bool(metrics) and "stopped" in metrics[-1]
        return stopped or self.learner.budget_fraction(step) >= 1

    def roll_back(self, step: int) -> int:
        """Return to the policy and optimiser of a checkpoint of before `step`; its step.

        It is the best, or else the newest from before the guard's window, or else the oldest.
        """
        saved = self.distributed.broadcast_from_main(lambda: self._last_good(step))
        restored = self.learner.restore(saved)
        self.engine.sync(step)
        return restored

    def _last_good(self, step: int) -> Path:
        folder, best = self.folder.checkpoints, self.schedule.best_step
        if best is not None:
            return checkpoint.of_step(folder, best)
        steps, good = self._saved_steps(step)
        return checkpoint.of_step(folder, (good or steps[:1])[-1])

    def _saved_steps(self, step: int) -> tuple[list[int], list[int]]:
        """The steps of all checkpoints, and of those from before the guard's window at `step`."""
        steps = [step_of(saved) for saved in list_checkpoints(self.folder.checkpoints)]
        return steps, [s for s in steps if s <= step - self.guard.settings.window]

    def load_final(self, last: int) -> int:
        """Serve the policy that `checkpoint.adapter` names, and return its step."""
        best = self.schedule.best_step
        if self.recipe.checkpoint.adapter == "last" or best is None or best == last:
            return last
        saved = self.distributed.broadcast_from_main(
            lambda: checkpoint.of_step(self.folder.checkpoints, best)
        )
        self.policy.load_adapter(saved / "adapter")
        self.engine.sync(best)
        return best

    def print(self, text: str) -> None:
        """Print a line as it is, without markup."""
        self.console.print(text, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Place:
    """Where a run happens; `stack` closes what must be closed.

    `shared` has parts of earlier runs, and gets those of this one.
    """

    folder: RunFolder
    distributed: Distributed
    console: Console
    stack: ExitStack
    shared: SharedParts | None = None


def setup_run(recipe: Recipe, place: Place) -> TrainingRun:
    """Put a run together.

    Raises: RecipeError for what only shows when data and model meet.
    """
    folder, distributed, console = place.folder, place.distributed, place.console
    saved, presampled, stack = recipe, open_presampled(recipe), place.stack
    difficulty = open_difficulty(recipe, folder, console)
    recipe = recipe.with_needed_engine()
    scorer = stack.enter_context(_load_user_code(recipe, console))
    recipe, plan = distributed.broadcast_from_main(lambda: _plan(recipe, place))
    recipe = _settings_of_rank(recipe, distributed)
    sets = {f"eval.sets.{name}.prompt": data.prompt for name, data in recipe.eval.sets.items()}
    with show_phase(console, f"loading {recipe.policy.model}"):
        check_chat_templates(recipe.policy, {"data.prompt": recipe.data.prompt, **sets})
        policy = _load_policy(recipe, place)
    format = make_prompt_format(policy, recipe.data.prompt)
    grade = Grading(scorer, folder, distributed)
    with show_phase(console, "reading the data"):
        data = load_run_data(recipe, policy, console, difficulty)
        check_demonstrations(recipe, data.problems, format, grade, console)
    teacher, problems = _load_teacher(recipe, policy, format, data.problems, console)
    stack.enter_context(folder.lock())
    folder.create(saved.to_yaml())
    folder.check_data(data.fingerprints)
    record_difficulty(difficulty, folder)
    grade.keep_judgements()
    if presampled:
        own_folder = folder if distributed.is_main else None
        presampled.begin(saved, own_folder, policy, data.problems)
        described = presampled.describe(recipe, data.problems)
        console.print(f"group.offline: {described}", markup=False, soft_wrap=True)
    console.print(f"run folder: {folder.path}")
    console.print(f"layout of micro-batches: {describe_layout(policy)}", soft_wrap=True)
    monitored = (data.held_out or data.problems)[: recipe.monitor.problems]
    engine, kl_rows = _start_engine(recipe, place, policy, format, monitored)
    names = recipe.log.trackers if distributed.is_main else []
    trackers = Trackers(names, recipe, folder.path)
    stack.callback(trackers.close)
    sampler = engine.sampler
    evaluator = SetEvaluator(recipe, format, grade, sampling_of(recipe), policy)
    evaluate = partial(evaluator.evaluate, sampler)
    return TrainingRun(
        recipe=recipe,
        folder=folder,
        distributed=distributed,
        console=console,
        policy=policy,
        engine=engine,
        grading=grade,
        builder=GroupBuilder(recipe, problems, sampler, format, grade, presampled),
        learner=Learner(policy, recipe, distributed, console, teacher),
        monitor=KlMonitor(policy, recipe, kl_rows),
        trackers=trackers,
        evaluate=partial(evaluate, data.eval_sets),
        eval_sets=data.eval_sets,
        schedule=EvaluationSchedule(recipe, folder, distributed, policy, data.eval_sets, evaluate),
        guard=CollapseGuard(recipe.guard, compares=find_method(recipe.method).group_advantages),
        plan=plan,
    )


def _start_engine(
    recipe: Recipe, place: Place, policy: Policy, format: PromptFormat,
    monitored: Sequence[Problem],
) -> tuple[PolicyEngine, list[Row]]:  # fmt: skip
    """The engine, checked against the policy, and the KL set that it sampled."""
    folder, console = place.folder, place.console
    starter = place.shared.start_engine if place.shared else start_engine
    start = partial(starter, recipe.rollout, policy, folder.scratch)
    with show_phase(console, "starting the rollout engine"):
        sampler = DistributedEngine(start, console, place.distributed)
        trim_heap()
    engine = PolicyEngine(sampler, policy, folder.scratch / "adapters")
    place.stack.push(partial(_end_engine, engine, place.shared))
    vocabulary = policy.model.get_input_embeddings().num_embeddings
    with show_phase(console, "sampling the KL set", announce=False):
        kl_rows = place.distributed.cached_json(
            folder.path / KL_SET,
            lambda: _sample_kl_set(recipe, sampler, format, monitored),
            lambda file: read_kl_set(file, monitored, vocabulary),
        )
    with show_phase(console, "comparing the engine's log-probs", announce=False):
        engine.start_checks(kl_rows[0], recipe.rollout.probe_limit)
    sampler.on_restart = engine.check
    console.print(engine.about, soft_wrap=True)
    if place.shared:
        console.print(place.shared.about)
    return engine, kl_rows


def _end_engine(
    engine: PolicyEngine, shared: SharedParts | None, failure: type[BaseException] | None, *_: Any
) -> None:
    """Close the engine, or hand it on if the run has ended well."""
    if shared and failure is None:
        shared.keep()
    else:
        engine.close()


def _load_policy(recipe: Recipe, place: Place) -> Policy:
    shared, threads = place.shared, set_threads(recipe.policy.threads)
    if recipe.policy.threads is None:
        place.console.print(f"CPU threads: {threads}; policy.threads sets another number")
    load = shared.load_policy if shared else load_policy
    policy = load(recipe.policy, recipe.seed, recipe.rollout)
    policy.model.train()
    trim_heap()
    return policy


def _settings_of_rank(recipe: Recipe, distributed: Distributed) -> Recipe:
    """The recipe with the GPU and the servers of this process."""
    policy, rollout = recipe.policy, recipe.rollout
    if (
        distributed.world_size > 1
        and policy.device in ("auto", "cuda")
        and torch.cuda.is_available()
    ):
        policy = policy.model_copy(update={"device": f"cuda:{distributed.local_rank}"})
    # One process a server: each loads its own adapters.
    if servers := distributed.shard(rollout.servers):
        rollout = rollout.model_copy(update={"servers": servers})
    return recipe.model_copy(update={"policy": policy, "rollout": rollout})


def _plan(recipe: Recipe, place: Place) -> tuple[Recipe, Plan | None]:
    """The recipe with each `auto` of the memory plan set for the free memory of this device."""
    distributed, console = place.distributed, place.console
    device = recipe.policy.resolved_device(cuda_available=torch.cuda.is_available())
    on_gpu = device != "cpu" and torch.cuda.is_available()

    def measure() -> tuple[int, int]:
        if on_gpu:
            return torch.cuda.mem_get_info(device)
        return free_ram() // distributed.local_world_size, 0

    free, card = place.shared.free_memory(measure) if place.shared else measure()
    settled, plan = resolve(recipe, free, "cuda" if on_gpu else "cpu", card)
    if plan:
        if estimate := assumptions(plan.model):
            console.print(f"memory plan: {estimate}", soft_wrap=True)
        for name in sorted(plan.chosen):
            console.print(f"memory plan: {name}={plan.settings[name]}")
        for problem in plan.problems:
            console.print(f"memory plan: {problem}, and {free / GIB:.1f} GiB are free")
    else:
        unplanned = "the model is not one that can be planned; auto settings have their defaults"
        console.print(f"memory plan: none, as {unplanned}", soft_wrap=True)
    return settled, plan


def _load_teacher(
    recipe: Recipe, policy: Policy, format: PromptFormat, problems: Sequence[Problem],
    console: Console,
) -> tuple[TeacherModel | None, Sequence[Problem]]:  # fmt: skip
    """The teacher of a method that learns from one, and the problems that it can be shown."""
    method = find_method(recipe.method)
    if "teacher_logprobs" not in method.needs:
        return None, problems
    sees = method.teacher_sees_demonstration
    with show_phase(console, f"loading the teacher, {recipe.teacher.model}"):
        teacher = TeacherModel(policy, recipe, format, sees_demonstration=sees)
        usable = teacher.usable(problems)
    if dropped := len(problems) - len(usable):
        console.print(f"teacher.template: {dropped} problems with too long a prompt dropped")
    return teacher, usable


def _load_user_code(recipe: Recipe, console: Console) -> Scorer:
    """The scorer; it, engine and trackers are looked up before anything large is loaded."""
    find_engine(recipe.rollout.engine)
    check_trackers(recipe.log.trackers)
    log = partial(console.print, markup=False, soft_wrap=True)
    return open_scorer(recipe.reward, conversational=recipe.data.prompt.style == "chat", log=log)


def _sample_kl_set(
    recipe: Recipe, engine: RolloutEngine, format: PromptFormat, problems: Sequence[Problem]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompts and the reference's own responses to them, which KL is measured on."""
    # The engine serves the base until its first sync.
    if recipe.policy.reference == "adapter":
        engine.sync(Path(recipe.policy.adapter or ""), 0)
    sampling = Sampling(max_tokens=recipe.rollout.max_tokens, stop=tuple(recipe.rollout.stop))
    draws = [Draw(problem, 1, (recipe.seed, "kl")) for problem in problems]
    responses = sample(engine, format, draws, sampling)
    return [(p.prompt_ids, r.token_ids) for p, [r] in zip(problems, responses, strict=True)]
