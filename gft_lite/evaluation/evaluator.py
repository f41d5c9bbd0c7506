"""`evaluate`: accuracy, pass@k or likelihood of models on the benchmarks of a suite."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from gft_lite.data.problems import Loaded, distinct_notes, is_ungraded
from gft_lite.data.prompts import PromptFormat
from gft_lite.evaluation.evaluation_folder import EvaluationFolder, Keys
from gft_lite.evaluation.examples import Examples
from gft_lite.evaluation.likelihood import measure_likelihood, scoring
from gft_lite.evaluation.metrics import distinct, measure
from gft_lite.evaluation.response_cache import BenchmarkDraw, CachedSampler
from gft_lite.evaluation.results import make_results
from gft_lite.evaluation.sets import open_scorer
from gft_lite.evaluation.suites import Suite, find_file, load_benchmark
from gft_lite.evaluation.targets import (
    Target,
    base_identity,
    find_targets,
    group_by_base,
    identity,
)
from gft_lite.policy import kl
from gft_lite.policy.base import Policy
from gft_lite.policy.batching import Row
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.figures import figure_of, main_figure
from gft_lite.rewards.judge_client import FILE as JUDGEMENTS
from gft_lite.rewards.scorer import Scorer
from gft_lite.rollout.base import RolloutEngine, RolloutError, Sampling
from gft_lite.rollout.policy_engine import PolicyEngine
from gft_lite.rollout.prompt_check import check_chat_templates
from gft_lite.rollout.registry import find_engine, start_engine
from gft_lite.rollout.sampling import make_prompt_format
from gft_lite.types import Group, Problem
from gft_lite.utils.cpu import set_threads
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.files import check_output_path
from gft_lite.utils.progress import Phase, show_phase, stderr_console


@dataclass
class _Evaluation:
    """An evaluation in progress: its settings, and the results so far by target."""

    suite: Suite
    folder: EvaluationFolder
    data_dir: Path | None
    scorer: Scorer
    console: Console
    targets: dict[str, dict[str, Any]] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    examples: Examples = field(default_factory=Examples)
    sampled: int = 0
    reused: int = 0

    def grade(
        self, label: str, model: str, benchmark: str, groups: Sequence[Group], keys: Keys
    ) -> dict[str, Any]:
        """Grade the responses to a benchmark, write the grades, and return the results."""
        scored = self.scorer.score(groups)
        self.folder.write_problems(model, benchmark, scored, keys)
        for group in scored:
            self.examples.add(self.suite.title(benchmark), label, group)
        samples = min(len(group) for group in scored)
        ks = [k for k in self.suite.ks if k <= samples]
        marker = self.suite.reward.functions[0].parameters.get("marker")
        return {**measure(scored, ks), "distinct": distinct(scored, marker)}


def evaluate(
    suite: Suite,
    targets: Sequence[str | Target],
    out: str | Path | None = None,
    *,
    data_dir: str | Path | None = None,
    regrade: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate models by a suite, compare them, and return the content of `results.json`.

    Responses that are already in `out` are not sampled again. With `regrade` none is sampled and
    no model is loaded. Raises: UserError for a wrong target, suite, folder or data.
    """
    started = time.perf_counter()
    found = find_targets(targets, suite.policy)
    folder = Path(out) if out is not None else _default_folder(suite, found)
    check_output_path(folder if out is None else out)
    data = None if data_dir is None else Path(data_dir)
    console = console or stderr_console()
    if not regrade:  # Checks that need no model come before one is loaded.
        find_file(data, "any")
        find_engine(suite.rollout.engine)
    log = partial(console.print, markup=False, soft_wrap=True)
    with open_scorer(suite.reward, conversational=suite.prompt.style == "chat", log=log) as scorer:
        if scorer.judge is not None:
            scorer.judge.keep(folder / JUDGEMENTS)
        work = _Evaluation(suite, EvaluationFolder(folder), data, scorer, console)
        work.folder.targets()  # A damaged file is found before anything is sampled.
        if regrade:
            _regrade(work, found)
        else:
            sampling = {"temperature", "top_p", "top_k", "max_tokens", "stop"}
            work.sampling = {**suite.rollout.model_dump(include=sampling), "seed": suite.seed}
            for group in group_by_base(found):
                _evaluate_group(work, group)
    results = make_results(suite, [t.label for t in found], work.targets) | {
        "folder": str(folder),
        "data": work.data,
        "sampled": work.sampled,
        "reused": work.reused,
        "seconds": time.perf_counter() - started,
        **({} if scorer.judge is None else {"judge": scorer.judge.take_usage()}),
    }
    work.folder.write_results(results, work.examples)
    return results


def _default_folder(suite: Suite, targets: Sequence[Target]) -> Path:
    """`eval/SUITE` of the run if exactly one run is evaluated, else `evals/SUITE`."""
    runs = {target.run for target in targets}
    run = runs.pop() if len(runs) == 1 else None
    return run / "eval" / suite.name if run else Path("evals") / suite.name


def _evaluate_group(work: _Evaluation, targets: Sequence[Target]) -> None:
    """Evaluate the targets that share a base with one policy and one engine."""
    suite, scratch = work.suite, work.folder.path / "engine"
    adapters = [target for target in targets if target.adapter is not None]
    settings = (adapters or targets)[0].policy
    set_threads(settings.threads)
    prompts = {f"definitions.{name}.prompt": suite.prompt_of(name) for name in suite.names}
    check_chat_templates(settings, prompts)
    with show_phase(work.console, f"loading {settings.model}"):
        policy = load_policy(settings, suite.seed, suite.rollout)
        base = base_identity(policy)
    with show_phase(work.console, "reading the benchmarks"):
        problems, formats = _load_benchmarks(work, policy)
    with ExitStack() as stack:
        stack.push(partial(_remove_unless_failed, scratch))
        with show_phase(work.console, "starting the rollout engine"):
            sampler = start_engine(suite.rollout, policy, scratch / base)
        stack.callback(sampler.close)
        served = _ServedBase(work, policy, sampler, formats, problems)
        engine = PolicyEngine(sampler, policy, scratch / base / "adapters")
        engine.start_checks(served.check_row(), suite.rollout.probe_limit)
        work.console.print(engine.about, soft_wrap=True)
        base_rows = served.first_samples(base) if adapters else []
        # The engine serves the base until the first sync, so the base is evaluated first.
        for target in sorted(targets, key=lambda target: target.adapter is not None):
            if target.adapter is not None:
                policy.load_adapter(target.adapter)
                engine.sync(1 + adapters.index(target))
            served.evaluate(target, identity(base, target.adapter), base_rows)
        work.sampled += served.sampler.sampled
        work.reused += served.sampler.reused


def _remove_unless_failed(scratch: Path, kind: type[BaseException] | None, *_: object) -> None:
    """Remove the engine's files, but leave the log of a server that failed, which errors name."""
    if kind is None or not issubclass(kind, RolloutError):
        shutil.rmtree(scratch, ignore_errors=True)


def _load_benchmarks(
    work: _Evaluation, policy: Policy
) -> tuple[dict[str, tuple[Problem, ...]], dict[str, PromptFormat]]:
    """The problems of every benchmark in this policy's tokens, and the prompt formats.

    Raises: RecipeError with the errors of all benchmarks.
    """
    found: dict[str, Loaded] = {}
    formats, errors = {}, []
    for name in work.suite.names:
        prompt = work.suite.prompt_of(name)
        try:
            formats[name] = make_prompt_format(policy, prompt, f"definitions.{name}.prompt")
            found[name] = load_benchmark(
                work.suite, name, formats[name], policy.context, work.data_dir
            )
        except RecipeError as error:
            errors += error.problems
            continue
        work.data[name] = found[name].describe()
        work.console.print(f"{name}: {work.data[name]}", markup=False)
    ungraded = [name for name, loaded in found.items()
                if is_ungraded(loaded.problems, work.suite.reward)]  # fmt: skip
    if ungraded and len(ungraded) < len(found):
        rule = "benchmarks: must all have answers, or none, as figures are averaged"
        errors.append(f"{rule}, got {', '.join(ungraded)} without. Evaluate them apart.")
    if errors:
        raise RecipeError(errors)
    for note in distinct_notes(found.values()):
        work.console.print(note, markup=False, soft_wrap=True)
    return {name: loaded.problems for name, loaded in found.items()}, formats


class _ServedBase:
    """A loaded base with the benchmarks, which serves one target after another."""

    def __init__(
        self,
        work: _Evaluation,
        policy: Policy,
        engine: RolloutEngine,
        formats: Mapping[str, PromptFormat],
        problems: Mapping[str, Sequence[Problem]],
    ) -> None:
        rollout = work.suite.rollout
        self._work, self._policy = work, policy
        self._formats, self._problems = formats, problems
        sampling = Sampling(rollout.temperature, rollout.top_p, rollout.top_k,
                            rollout.max_tokens, tuple(rollout.stop))  # fmt: skip
        # Large enough to keep the engine busy, small enough to lose little at an interrupt.
        self.sampler = CachedSampler(engine, sampling, policy.context, 4 * rollout.rows)
        self._max_tokens = self._limit_tokens()

    def check_row(self) -> Row:
        """A prompt and its gold answer, on which trainer and engine are compared."""
        name, [problem, *_] = next(iter(self._problems.items()))
        ids = self._formats[name].token_ids(problem.answer or "?")[:16]
        return Row(problem.prompt_ids, ids)

    def first_samples(self, model: str) -> list[Row]:
        """One response to each of the first problems of every benchmark."""
        few = self._work.suite.drift
        rows: list[Row] = []
        for name in self._problems:
            with self._phase(f"sampling the base on {name} for KL"):
                rows += kl.group_rows(self._respond(model, name, few, 1)[0])
        return rows

    def evaluate(self, target: Target, model: str, base_rows: Sequence[Row]) -> None:
        """Sample, grade and measure the target that the engine serves; `model` is its identity."""
        suite = self._work.suite
        rows: list[Row] = []
        benchmarks = {}
        for name in self._problems:
            with show_phase(self._work.console, f"{target.label} on {name}"):
                if is_ungraded(self._problems[name], suite.reward):
                    benchmarks[name] = self._score(target, name)
                    groups, _ = self._respond(model, name, suite.drift, 1)
                else:
                    groups, keys = self._respond(model, name, None, suite.samples)
                    graded = self._work.grade(target.label, model, name, groups, keys)
                    benchmarks[name] = graded
            few = groups[: suite.drift]
            rows += kl.group_rows(Group(g.problem, g.responses[:1]) for g in few)
        self.sampler.engine.sleep()
        drift = self._drift(target, base_rows, rows)
        self.sampler.engine.wake()
        self._work.targets[target.label] = {
            "model": target.policy.model,
            "adapter": None if target.adapter is None else str(target.adapter),
            "identity": model,
            "engine": self.sampler.engine.name,
            "max_tokens": self._max_tokens,
            "sampling": self._work.sampling,
            "data": self._work.data,
            "benchmarks": benchmarks,
            "drift": drift,
        }

    def _score(self, target: Target, name: str) -> dict[str, Any]:
        """The likelihood of a benchmark's demonstrations, with the engine's memory."""
        policy, budget = self._policy, self._work.suite.micro_batch_tokens
        with scoring(policy, self.sampler.engine, base=target.adapter is None):
            return measure_likelihood(policy, self._formats[name], self._problems[name], budget)

    def _respond(
        self, model: str, name: str, first: int | None, samples: int
    ) -> tuple[list[Group], list[list[str]]]:
        # Engines, the bases they serve and their dtypes draw differently from the same seed.
        rollout = self._work.suite.rollout
        sampled_by = f"{model}/{self.sampler.engine.name}/{rollout.base}"
        if rollout.dtype != "auto":
            sampled_by += f"/{rollout.dtype}"
        draw = BenchmarkDraw(
            sampled_by, self._formats[name], self._problems[name][:first], samples,
            (self._work.suite.seed, "eval", name),
        )  # fmt: skip
        return self.sampler.respond(draw, self._work.folder.responses(model, name))

    def _drift(
        self, target: Target, base_rows: Sequence[Row], rows: Sequence[Row]
    ) -> dict[str, float | None]:
        """Forward KL on the base's responses, reverse KL and entropy on the target's, in nats."""
        policy, budget = self._policy, self._work.suite.micro_batch_tokens
        alone = policy.base() if target.adapter is None else nullcontext()
        with self._phase(f"entropy of {target.label}"), alone:
            entropy = kl.entropy(policy, rows, budget)
        if target.adapter is None:
            return {"entropy": entropy}
        with self._phase(f"KL of {target.label} on the base's responses"):
            forward = kl.divergence(policy, base_rows, budget, samples_of="reference")
        with self._phase(f"KL of {target.label} on its own responses"):
            reverse = kl.divergence(policy, rows, budget, samples_of="policy")
        return {
            "forward": forward.get("forward"), "reverse": reverse.get("reverse"),
            "entropy": entropy,
        }  # fmt: skip

    def _phase(self, text: str) -> AbstractContextManager[Phase]:
        """A part of the work with a progress of its own."""
        return show_phase(self._work.console, text, announce=False)

    def _limit_tokens(self) -> list[int]:
        """The fewest and the most tokens a response can have; printed if the context limits it."""
        wanted, context = self.sampler.sampling.max_tokens, self._policy.context
        lengths = [len(p.prompt_ids) for problems in self._problems.values() for p in problems]
        least, most = (min(wanted, context - f(lengths)) for f in (max, min))
        if least < wanted:
            self._work.console.print(
                f"max_tokens: the model's context of {context} tokens leaves responses {least} to "
                f"{most} of the {wanted} tokens asked for", markup=False, soft_wrap=True,
            )  # fmt: skip
        return [least, most]


def _regrade(work: _Evaluation, targets: Sequence[Target]) -> None:
    """Grade stored responses again; everything but the grades stays as it is."""
    evaluated = work.folder.targets()
    unknown = [t.label for t in targets if t.label not in evaluated]
    if unknown:
        known = ", ".join(evaluated) or "nothing"
        raise RecipeError(
            [f"--regrade: must find an evaluation of {label} in {work.folder.path}, which has "
             f"{known}." for label in unknown]
        )  # fmt: skip
    for target in targets:
        entry = evaluated[target.label]
        work.data, work.sampling = entry["data"], entry["sampling"]
        model, benchmarks = entry["identity"], {}
        for name in work.suite.names:
            known = entry["benchmarks"].get(name, {})
            if known and not figure_of(main_figure(known)).graded:
                benchmarks[name] = known
            elif known:
                expected = known["problems"]
                groups, keys = work.folder.read_groups(model, name, expected)
                benchmarks[name] = work.grade(target.label, model, name, groups, keys)
        work.reused += sum(f["samples"] for f in benchmarks.values())
        work.targets[target.label] = {**entry, "benchmarks": benchmarks}
