"""Engines that fail, show progress and sleep, written as a user would write them."""

from __future__ import annotations

import re
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import RolloutSettings
from gft_lite.rollout.base import EngineFailed, Request, RolloutError, Sampling
from gft_lite.rollout.restarting_engine import RestartingEngine
from gft_lite.rollout.transformers_engine import TransformersEngine
from gft_lite.training.run import train

REQUESTS = [Request((5, 6, 7), (1, 2, 3)), Request((8, 9, 10), (1, 4, 5)), Request((5, 6), ())]
SAMPLING = Sampling(max_tokens=6)


class Fragile(TransformersEngine):
    """Fails at the batches numbered in `breaks`, and records what it has sampled."""

    def __init__(self, policy, breaks, sampled):
        super().__init__(RolloutSettings(batch_size=2), policy, Path())
        self.breaks, self.sampled = breaks, sampled

    def _decode(self, samples, sampling):
        keys = [(sample.prompt_ids, sample.seed) for sample in samples]
        super()._decode(samples, sampling)
        self.breaks[0] -= 1
        if self.breaks[0] == 0:
            self.breaks.pop(0)
            raise EngineFailed("out of luck.")
        self.sampled += keys


def test_a_restarted_engine_samples_only_the_missing_completions(lab_policy):
    expected = Fragile(lab_policy, [99], []).generate(REQUESTS, SAMPLING)
    breaks, sampled, seen = [2, 99], [], []
    output = StringIO()
    engine = RestartingEngine(lambda: Fragile(lab_policy, breaks, sampled), Console(file=output))
    found = engine.generate(REQUESTS, SAMPLING, lambda *call: seen.append(call))
    assert found == expected
    # The batch that broke is sampled again, the one before it is not.
    assert len(sampled) == len(set(sampled)) == 6
    assert len(seen) == 6
    keys = [(r.prompt_ids, seed) for r in REQUESTS for seed in r.seeds]
    answers = [completion for group in found for completion in group]
    assert sorted(seen) == sorted((*key, c) for key, c in zip(keys, answers, strict=True))
    assert "out of luck. Starting it again." in output.getvalue()


def test_the_second_failure_of_a_call_is_raised(lab_policy):
    breaks = [2, 1, 99]
    engine = RestartingEngine(lambda: Fragile(lab_policy, breaks, []), Console(quiet=True))
    with pytest.raises(EngineFailed):
        engine.generate(REQUESTS, SAMPLING)


class Lost(TransformersEngine):
    """Fails at the next call named in `at`, as a lost server does; records its syncs."""

    def __init__(self, policy, at, synced):
        super().__init__(RolloutSettings(), policy, Path())
        self.at, self.synced = at, synced

    def sync(self, adapter, version):
        self._fail("sync")
        self.synced.append(version)
        super().sync(adapter, version)

    def wake(self):
        self._fail("wake")

    def _fail(self, call):
        if self.at == [call]:
            self.at.clear()
            raise EngineFailed("gone.")


def test_an_engine_that_failed_during_training_is_started_again(lab_policy, tmp_path):
    adapters = [lab_policy.save_adapter(tmp_path / f"v{n}") for n in (1, 2)]
    at, synced, checked = [], [], []
    engine = RestartingEngine(lambda: Lost(lab_policy, at, synced), Console(quiet=True))
    engine.check = lambda fresh: checked.append(fresh) or 0.0
    engine.sync(adapters[0], 1)
    at.append("wake")
    engine.wake()
    at.append("sync")
    engine.sync(adapters[1], 2)
    # The trainer has gone on: what is served again after `wake` is not what it would check.
    assert (synced, checked) == ([1, 1, 2], [])


def test_an_engine_may_ignore_the_callback(lab_policy):
    class Silent(TransformersEngine):
        def generate(self, requests, sampling, seen=None):
            return super().generate(requests, sampling)

    settings = RolloutSettings(batch_size=2)
    expected = TransformersEngine(settings, lab_policy, Path()).generate(REQUESTS, SAMPLING)
    engine = RestartingEngine(lambda: Silent(settings, lab_policy, Path()), Console(quiet=True))
    assert engine.generate(REQUESTS, SAMPLING) == expected


def test_a_terminal_shows_responses_and_tokens_per_second(lab_policy, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")  # On a dumb one nothing is drawn over.
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    engine = RestartingEngine(lambda: Fragile(lab_policy, [99], []), console)
    found = engine.generate(REQUESTS, SAMPLING)
    tokens = sum(len(completion.token_ids) for group in found for completion in group)
    assert re.search(
        rf"6 of 6 responses, \d+ s, {tokens} tokens, [\d,]+ tokens/s", screen.getvalue()
    )
    plain = StringIO()
    engine = RestartingEngine(lambda: Fragile(lab_policy, [99], []), Console(file=plain))
    engine.generate(REQUESTS, SAMPLING)
    assert plain.getvalue() == ""


class Sleeper(TransformersEngine):
    """A user's engine that rejects calls while asleep, and records its calls."""

    name = "sleeper"
    calls: list[str] = []  # noqa: RUF012

    def _record(self, call):
        if self.calls[-1:] == ["sleep"]:
            raise RolloutError(f"{call} of an engine that is asleep")
        self.calls.append(call)

    def generate(self, *args):
        self._record("generate")
        return super().generate(*args)

    def score(self, *args):
        self._record("score")
        return super().score(*args)

    def sync(self, *args):
        self._record("sync")
        super().sync(*args)

    def sleep(self):
        self.calls.append("sleep")

    def wake(self):
        if self.calls[-1:] == ["sleep"]:
            self.calls.append("wake")


def test_the_engine_sleeps_while_the_trainer_trains(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sleeper", sys.modules[__name__])
    Sleeper.calls.clear()
    recipe = Recipe.load("recipes/lab.yaml", [
        "rollout.engine=sleeper:Sleeper", "train.steps=2", "train.problems_per_step=2",
        "data.problems=20", "data.holdout=2", "monitor.every=1", "monitor.problems=1",
        "eval.samples=1", "eval.k=[1]", "eval.sets.test.problems=2",
        "eval.sets.retention.problems=2",
    ])  # fmt: skip
    output = StringIO()
    run = train(recipe, tmp_path / "run", console=Console(file=output, width=200))
    assert run.summary()["steps"] == 2
    assert "engine: sleeper, base the trainer's own, log-prob gap " in output.getvalue()
    calls = Sleeper.calls[Sleeper.calls.index("sleep") :]
    # The dry step; two steps; the trained policy on two sets. Each sync is probed right after.
    nap = ["sleep", "wake", "sync", "score"]
    assert calls == [*nap, *(["generate", *nap] * 2), "generate", "generate"]
