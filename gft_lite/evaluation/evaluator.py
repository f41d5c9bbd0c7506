"""Accuracy and pass@k of whatever an engine serves: training's sets, and suites of benchmarks."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from gft_lite.data.prompts import PromptFormat
from gft_lite.evaluation.examples import Examples
from gft_lite.evaluation.metrics import average, compare, distinct, measure
from gft_lite.evaluation.response_cache import ResponseCache, Sampler
from gft_lite.evaluation.sets import open_scorer
from gft_lite.evaluation.suites import Suite, find_file, load_benchmark
from gft_lite.evaluation.tables import tables, to_csv
from gft_lite.evaluation.targets import Target, base_identity, find_targets, group_by_base, identity
from gft_lite.policy import kl as drift
from gft_lite.policy.base import Policy
from gft_lite.policy.batching import Row
from gft_lite.policy.registry import load_policy
from gft_lite.rewards.scorer import Scorer
from gft_lite.rollout.base import RolloutEngine, Sampling
from gft_lite.rollout.policy_engine import PolicyEngine
from gft_lite.rollout.registry import find_engine, start_engine
from gft_lite.rollout.sampling import make_prompt_format
from gft_lite.runs.folder import RunFolder
from gft_lite.types import Group, Problem
from gft_lite.utils.errors import RecipeError

# --- suites ----------------------------------------------------------------------------------


@dataclass
class _Work:
    """An evaluation while it runs: what it was asked for, and what it has found by target."""

    suite: Suite
    folder: Path
    data_dir: Path | None
    scorer: Scorer
    console: Console
    targets: dict[str, dict[str, Any]] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    examples: Examples = field(default_factory=Examples)
    sampled: int = 0
    reused: int = 0

    def cache(self, model: str, name: str) -> ResponseCache:
        """The responses of one model to one benchmark."""
        return ResponseCache(self.folder / "responses" / model / f"{name}.jsonl")

    def problems_file(self, model: str, name: str) -> Path:
        """Where a model's verdicts on one benchmark are kept, a problem a line."""
        return self.folder / "problems" / model / f"{name}.jsonl"


def evaluate(
    suite: Suite,
    targets: Sequence[str],
    out: str | Path | None = None,
    *,
    data_dir: str | Path | None = None,
    regrade: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate models by a suite and compare them; returns what `results.json` then holds.

    Responses that `out` has already are not sampled again; `regrade` samples none at all and
    loads no model. Raises: RecipeError for a target, a suite or data that are wrong.
    """
    started = time.perf_counter()
    found = find_targets(targets, suite.policy)
    folder = Path(out) if out is not None else _default_folder(suite, found)
    data = None if data_dir is None else Path(data_dir)
    console = console or Console(stderr=True)
    if not regrade:
        _check_before_loading(suite, data)
    with open_scorer(suite.reward, conversational=suite.prompt.style == "chat") as scorer:
        work = _Work(suite, folder, data, scorer, console)
        if regrade:
            _regrade(work, found)
        else:
            asked = {"temperature", "top_p", "top_k", "max_tokens", "stop"}
            work.sampling = {**suite.rollout.model_dump(include=asked), "seed": suite.seed}
            for group in group_by_base(found):
                _evaluate_group(work, group)
    results = _results(work, found, time.perf_counter() - started)
    _write(folder, results, work.examples)
    return results


def _check_before_loading(suite: Suite, data_dir: Path | None) -> None:
    """What can be wrong without a model is told before one is loaded."""
    find_file(data_dir, "any")
    find_engine(suite.rollout.engine)


def _default_folder(suite: Suite, targets: Sequence[Target]) -> Path:
    """`eval/SUITE` of the one run that is evaluated, else `evals/SUITE`."""
    runs = {target.run for target in targets}
    run = runs.pop() if len(runs) == 1 else None
    return run / "eval" / suite.name if run else Path("evals") / suite.name


def _evaluate_group(work: _Work, targets: Sequence[Target]) -> None:
    """Sample, grade and measure the targets that share a base: one policy, one engine."""
    suite, scratch = work.suite, work.folder / "engine"
    adapters = [target for target in targets if target.adapter is not None]
    settings = (adapters or targets)[0].policy
    if settings.threads:
        torch.set_num_threads(settings.threads)
    policy = load_policy(settings, suite.seed, suite.rollout)
    base = base_identity(policy)
    problems, formats = _load(work, policy)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        engine = start_engine(suite.rollout, policy, scratch / base)
        stack.callback(engine.close)
        model = _Model(work, policy, engine, formats, problems, base)
        served = PolicyEngine(engine, policy, scratch / base / "adapters")
        served.start_checks(model.probe_row(), suite.rollout.probe_limit)
        base_rows = model.first_samples(base) if adapters else []
        # The base is served until the first sync, so it comes first.
        for target in sorted(targets, key=lambda target: target.adapter is not None):
            if target.adapter is not None:
                policy.load_adapter(target.adapter)
                served.sync(1 + adapters.index(target))
            model.evaluate(target, base_rows)
        work.sampled += model.sampler.sampled
        work.reused += model.sampler.reused


def _load(
    work: _Work, policy: Policy
) -> tuple[dict[str, tuple[Problem, ...]], dict[str, PromptFormat]]:
    """The problems of every benchmark in this policy's tokens, and how they are written.

    Raises: RecipeError with the errors of all benchmarks.
    """
    problems, formats, wrong = {}, {}, []
    for name in work.suite.names:
        prompt = work.suite.prompt_of(name)
        try:
            formats[name] = make_prompt_format(policy, prompt, f"definitions.{name}.prompt")
            loaded = load_benchmark(work.suite, name, formats[name], policy.context, work.data_dir)
        except RecipeError as error:
            wrong += error.problems
            continue
        problems[name] = loaded.problems
        work.data[name] = loaded.describe()
        work.console.print(f"{name}: {loaded.describe()}", markup=False)
    if wrong:
        raise RecipeError(wrong)
    return problems, formats


class _Model:
    """A loaded base with what it is asked, serving one target after another."""

    def __init__(
        self,
        work: _Work,
        policy: Policy,
        engine: RolloutEngine,
        formats: Mapping[str, PromptFormat],
        problems: Mapping[str, Sequence[Problem]],
        base: str,
    ) -> None:
        rollout = work.suite.rollout
        self.work, self.policy, self.base = work, policy, base
        self.formats, self.problems = formats, problems
        self.sampling = Sampling(rollout.temperature, rollout.top_p, rollout.top_k,
                                 rollout.max_tokens, tuple(rollout.stop))  # fmt: skip
        # Large enough to keep the engine busy, small enough to lose little when interrupted.
        self.sampler = Sampler(engine, self.sampling, policy.context, 4 * rollout.rows)
        self.room = self._room()

    def probe_row(self) -> Row:
        """A prompt and its gold answer, which trainer and engine must agree on."""
        name, [problem, *_] = next(iter(self.problems.items()))
        ids, _ = self.formats[name].response_ids(problem.answer or "?", 16)
        return Row(problem.prompt_ids, ids)

    def first_samples(self, model: str) -> list[Row]:
        """One response to each of the first problems of every benchmark."""
        few = self.work.suite.drift
        return [
            row
            for name in self.problems
            for row in drift.group_rows(self._respond(model, name, few, 1)[0])
        ]

    def evaluate(self, target: Target, base_rows: Sequence[Row]) -> None:
        """Sample, grade and measure what is served now."""
        suite, policy = self.work.suite, self.policy
        model = identity(self.base, target.adapter)
        rows: list[Row] = []
        figures = {}
        for name in self.problems:
            with self._progress(f"{target.label} on {name}"):
                groups, keys = self._respond(model, name, None, suite.samples)
            few = groups[: suite.drift]
            rows += drift.group_rows(Group(g.problem, g.responses[:1]) for g in few)
            figures[name] = _grade(self.work, target.label, model, name, groups, keys)
        self.sampler.engine.sleep()
        far = _drift(policy, target, base_rows, rows, suite.micro_batch_tokens)
        self.sampler.engine.wake()
        self.work.targets[target.label] = {
            "model": target.policy.model,
            "adapter": None if target.adapter is None else str(target.adapter),
            "identity": model,
            "engine": self.sampler.engine.name,
            "max_tokens": self.room,
            "sampling": self.work.sampling,
            "data": self.work.data,
            "benchmarks": figures,
            "drift": far,
        }

    def _respond(
        self, model: str, name: str, first: int | None, samples: int
    ) -> tuple[list[Group], list[list[str]]]:
        # Engines draw differently from the same seed, as may the base they serve.
        who = f"{model}/{self.sampler.engine.name}/{self.work.suite.rollout.base}"
        return self.sampler.respond(
            who, self.formats[name], self.problems[name][:first], samples,
            (self.work.suite.seed, "eval", name), self.work.cache(model, name),
        )  # fmt: skip

    @contextmanager
    def _progress(self, what: str) -> Iterator[None]:
        with self.work.console.status(what) as status:

            def show(done: int, total: int) -> None:
                status.update(f"{what}: {done:,} of {total:,} responses")

            self.sampler.on_chunk = show
            yield

    def _room(self) -> list[int]:
        """The fewest and the most tokens a response may have; says so if that is not enough."""
        asked, context = self.sampling.max_tokens, self.policy.context
        longest = [len(p.prompt_ids) for problems in self.problems.values() for p in problems]
        least, most = (min(asked, context - f(longest)) for f in (max, min))
        if least < asked:
            self.work.console.print(
                f"max_tokens: the model's context of {context} tokens leaves responses {least} to "
                f"{most} of the {asked} tokens asked for", markup=False, soft_wrap=True,
            )  # fmt: skip
        return [least, most]


def _drift(
    policy: Policy, target: Target, base_rows: Sequence[Row], rows: Sequence[Row], budget: int
) -> dict[str, float | None]:
    """How far an adapter went: forward KL on the base's responses, reverse KL on its own."""
    if target.adapter is None:
        with policy.base():
            return {"entropy": drift.entropy(policy, rows, budget)}
    forward = drift.divergence(policy, base_rows, budget, samples_of="reference")
    reverse = drift.divergence(policy, rows, budget, samples_of="policy")
    return {
        "forward": forward.get("forward"),
        "reverse": reverse.get("reverse"),
        "entropy": drift.entropy(policy, rows, budget),
    }


def _evaluated(folder: Path) -> dict[str, Any]:
    """Every target that was ever evaluated in a folder, as it was last."""
    file = folder / "targets.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _regrade(work: _Work, targets: Sequence[Target]) -> None:
    """Grade what was sampled before; everything but the grades stays."""
    evaluated = _evaluated(work.folder)
    unknown = [t.label for t in targets if t.label not in evaluated]
    if unknown:
        there = ", ".join(evaluated) or "nothing"
        raise RecipeError(
            [f"--regrade: must find an evaluation of {label} in {work.folder}, which has {there}."
             for label in unknown]
        )  # fmt: skip
    for target in targets:
        entry = evaluated[target.label]
        work.data, work.sampling = entry["data"], entry["sampling"]
        model = entry["identity"]
        figures = {}
        for name in work.suite.names:
            if name in entry["benchmarks"]:
                lines = work.problems_file(model, name).read_text(encoding="utf-8").splitlines()
                kept = [json.loads(line) for line in lines]
                problems = [Problem(k["id"], k["text"], k["answer"], columns=k["columns"])
                            for k in kept]  # fmt: skip
                keys = [k["keys"] for k in kept]
                groups = work.cache(model, name).groups(problems, keys)
                figures[name] = _grade(work, target.label, model, name, groups, keys)
        work.reused += sum(f["samples"] for f in figures.values())
        work.targets[target.label] = {**entry, "benchmarks": figures}


def _grade(
    work: _Work, label: str, model: str, name: str,
    groups: Sequence[Group], keys: Sequence[Sequence[str]],
) -> dict[str, Any]:  # fmt: skip
    """The figures of one benchmark; keeps the verdict on every response."""
    scored = work.scorer.score(groups)
    file = work.problems_file(model, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as out:
        for group, named in zip(scored, keys, strict=True):
            problem = group.problem
            graded = [(r.text, r.correct) for r in group if r.correct is not None]
            shown = (problem.id, problem.text, problem.answer or "")
            work.examples.see(work.suite.title(name), shown, label, graded)
            line = {
                "id": problem.id, "text": problem.text, "answer": problem.answer,
                "columns": dict(problem.columns),
                "correct": sum(right for _, right in graded) if graded else None,
                "samples": len(group), "scores": [r.reward for r in group],
                "verdicts": [r.verdict for r in group], "keys": list(named),
            }  # fmt: skip
            out.write(json.dumps(line, default=str) + "\n")
    samples = min(len(group) for group in scored)
    ks = [k for k in work.suite.ks if k <= samples]
    marker = work.suite.reward.functions[0].parameters.get("marker")
    return {**measure(scored, ks), "distinct": distinct(scored, marker)}


# --- results ---------------------------------------------------------------------------------


def _results(work: _Work, targets: Sequence[Target], seconds: float) -> dict[str, Any]:
    suite = work.suite
    entries = {t.label: work.targets[t.label] for t in targets}
    ran = [figures for entry in entries.values() for figures in entry["benchmarks"].values()]
    for entry in entries.values():
        entry["average"] = average(entry["benchmarks"])
    return {
        "suite": suite.name,
        "folder": str(work.folder),
        "benchmarks": {name: suite.title(name) for name in suite.names},
        "protocol": {
            "samples": min(f["samples"] // f["problems"] for f in ran),
            "k": [k for k in suite.ks if all(f"pass@{k}" in f for f in ran)],
            **work.sampling,
            "reward": [function.name for function in suite.reward.functions],
        },
        "data": work.data,
        "targets": entries,
        "pairs": [
            {
                "a": a,
                "b": b,
                "differences": compare(entries[a]["benchmarks"], entries[b]["benchmarks"]),
            }
            for a, b in combinations(entries, 2)
        ],
        "sampled": work.sampled,
        "reused": work.reused,
        "seconds": seconds,
    }


def _write(folder: Path, results: Mapping[str, Any], examples: Examples) -> None:
    made = tables(results)
    RunFolder(folder).write_json("results.json", results)
    RunFolder(folder).write_json("targets.json", {**_evaluated(folder), **results["targets"]})
    (folder / "results.csv").write_text(to_csv(results), encoding="utf-8")
    (folder / "results.md").write_text(
        "\n".join(table.markdown() for table in made), encoding="utf-8"
    )
    (folder / "results.tex").write_text(
        "\n".join(table.latex() for table in made), encoding="utf-8"
    )
    (folder / "examples.md").write_text(examples.markdown(), encoding="utf-8")
