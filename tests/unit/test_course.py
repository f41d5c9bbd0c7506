"""Evaluations while training, early stop and collapse guard, on figures set by hand."""

from __future__ import annotations

import random
from statistics import fmean

import pytest

from gft_lite.evaluation.metrics import by_problem, likelihood, measure, restrict
from gft_lite.recipe.course_sections import EvalSettings, GuardSettings
from gft_lite.recipe.schema import Recipe
from gft_lite.runs.folder import RunFolder
from gft_lite.training.collapse_guard import CollapseGuard, find_alarms
from gft_lite.training.evaluation_schedule import (
    EvaluationSchedule,
    choose_problems,
    size_notes,
)
from gft_lite.types import Group, Problem, Response
from gft_lite.utils.distributed import SINGLE_PROCESS
from gft_lite.utils.errors import RecipeError

QUIET = {"reward": 0.5, "flat_groups": 0.2, "entropy": 0.4, "grad_norm": 1.0, "engine_gap": 0.01,
         "kl": None, "groups": 16}  # fmt: skip


# --- figures ---------------------------------------------------------------------------------


def graded(name, *correct):
    responses = tuple(
        Response((1,), "x", "self", "stop", reward=float(c), correct=bool(c)) for c in correct
    )
    return Group(Problem(name, "q", "1"), responses)


def test_figures_of_some_problems_are_those_of_their_samples():
    groups = [graded("a", 1, 0, 0, 0), graded("b", 1, 1, 1, 1), graded("c", 1, 1, 0, 0)]
    whole = measure(groups, [1, 2])
    part = restrict(whole, ["c", "a"], [1, 2])
    alone = measure([groups[2], groups[0]], [1, 2])
    assert part == {name: alone[name] for name in part}
    assert part["correct"] == {"c": 2, "a": 1}
    assert (part["problems"], part["samples"]) == (2, 8)
    # pass@2 of 4 samples: 1 - C(2,2)/C(4,2) with 2 right, 1 - C(3,2)/C(4,2) with 1.
    assert by_problem(whole, "pass@2") == {"a": 0.5, "b": 1.0, "c": pytest.approx(5 / 6)}
    assert by_problem(whole, "mean_reward") == {}


def test_mean_rewards_of_some_problems():
    whole = {"mean_reward": 0.4, "mean_reward_interval": (0, 1), "problems": 3, "samples": 6,
             "rewards": {"a": 0.5, "c": 0.3}}  # fmt: skip
    part = restrict(whole, ["a", "b"], [1])
    assert (part["mean_reward"], part["rewards"], part["problems"]) == (0.5, {"a": 0.5}, 2)


def test_the_chosen_problems_are_the_same_in_every_run_and_keep_their_order():
    problems = [Problem(str(i), "q", "1") for i in range(50)]
    chosen = choose_problems({"a": problems, "b": problems, "c": problems[:3]}, 5)
    numbers = [int(p.id) for p in chosen["a"]]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) == 5
    assert numbers != [int(p.id) for p in chosen["b"]]
    assert numbers != [0, 1, 2, 3, 4]
    assert chosen == choose_problems({"a": problems, "b": problems, "c": problems[:3]}, 5)
    assert chosen["c"] == problems[:3]
    assert choose_problems({"a": problems}, None)["a"] == problems


def test_a_set_smaller_than_eval_problems_is_said():
    sets = {"a": [Problem(str(i), "q", "1") for i in range(5)], "b": [Problem("0", "q", "1")]}
    every = {"every": 1, "sets": {"a": {"source": "lab"}}}
    assert size_notes(EvalSettings(**every, problems=5), sets) == [
        "eval.problems: is 5, but b has 1 problems, which are all evaluated"
    ]
    assert size_notes(EvalSettings(**every, problems=1), sets) == []
    assert size_notes(EvalSettings(**every), sets) == []
    [note] = size_notes(EvalSettings(problems=1), sets)
    assert note.startswith("eval.problems: has no effect without eval.every")


def test_an_evaluation_is_due_every_n_steps_and_after_the_last_one(tmp_path):
    found = schedule(tmp_path, [], "eval.every=4")
    due = [found.is_due(step, last=False) for step in (3, 4, 5, 8)]
    assert (due, found.is_due(5, last=True)) == ([False, True, False, True], True)
    assert not schedule(tmp_path, [], "eval.every=0").is_due(5, last=True)


@pytest.mark.parametrize(
    ("every", "problems", "expected"),
    [(4, "null", [3, 3, 2, 1, 0]),  # After steps 4, 8 and 10; the last is that of the policy.
     (4, 2, [5, 5, 4, 3, 2]),  # That of all four problems is two of these.
     (0, "null", [1, 1, 1, 1, 1]), (5, "null", [2, 2, 1, 1, 0])],
)  # fmt: skip
def test_the_number_of_evaluations_to_come(tmp_path, every, problems, expected):
    changes = [f"eval.every={every}", f"eval.problems={problems}", "train.steps=10"]
    sets = {"test": [Problem(name, "q", "1") for name in "abcd"]}
    recipe = Recipe.load("recipes/lab.yaml", changes)
    found = EvaluationSchedule(recipe, RunFolder(tmp_path), SINGLE_PROCESS, None, sets, None)
    assert [found.to_come(step) for step in (0, 3, 5, 8, 10)] == expected
    empty = EvaluationSchedule(recipe, RunFolder(tmp_path), SINGLE_PROCESS, None, {}, None)
    assert (empty.to_come(0), empty.share) == (0, 1)


def test_a_resumed_schedule_has_the_evaluations_so_far_of_the_same_adapter(tmp_path):
    base = {"test": measure([graded("a", 1, 0), graded("b", 1, 1)], [1])}
    sets = {"test": [Problem("a", "q", "1")]}
    recipe = Recipe.load("recipes/lab.yaml", ["eval.every=1", "eval.k=[1]"])
    found = EvaluationSchedule(recipe, RunFolder(tmp_path), SINGLE_PROCESS, None, sets, None)
    for step in (1, 2, 3):
        found._write(step, f"adapter {step}", {"test": measure([graded("a", 1, 1)], [1])})
    found.begin(base, 2)
    assert found.values == {0: {"a": 0.5}, 1: {"a": 1.0}, 2: {"a": 1.0}}
    assert found._known(3, "adapter 3")["test"]["pass@1"] == 1.0
    assert found._known(3, "adapter 4") is None
    assert found._known(4, "adapter 4") is None


def test_a_lower_likelihood_figure_is_the_better_one(tmp_path):
    recipe = Recipe.from_tree({"eval": {"every": 1}, "early_stop": {"patience": 2}})
    sets = {"held_out": [Problem("a", "q", None), Problem("b", "q", None)]}
    found = EvaluationSchedule(recipe, RunFolder(tmp_path), SINGLE_PROCESS, None, sets, None)
    tokens = {"a": 1, "b": 3}
    steps = [likelihood({"a": nats, "b": 3 * nats}, tokens) for nats in (4.0, 2.0, 3.0, 5.0)]
    steps = [{**figures, "problems": 2, "samples": 0} for figures in steps]
    found.begin({"held_out": steps[0]}, 0)
    assert found.metric == "held_out/nll"
    for step in (1, 2):
        found.values[step] = found._values({"held_out": steps[step]})
        assert found.stop_reason() is None
    found.values[3] = found._values({"held_out": steps[3]})
    assert "without an improvement of held_out/nll on step 1" in found.stop_reason()
    best = {"checkpoint": {"best": {"metric": "held_out/nll"}}}
    found.recipe = Recipe.from_tree({**recipe.model_dump(), **best})
    assert (found.recipe.checkpoint.best.mode, found.best_step) == ("min", 1)
    again = Recipe.load("recipes/lab.yaml", ["eval.every=1", BEST.replace(", mode: MODE", "")])
    assert again.checkpoint.best.mode == "max"


def test_a_best_step_needs_problems_that_are_evaluated(tmp_path):
    recipe = Recipe.from_tree({"eval": {"every": 1}, "early_stop": {"patience": 2}})
    found = EvaluationSchedule(recipe, RunFolder(tmp_path), SINGLE_PROCESS, None, {}, None)
    with pytest.raises(RecipeError, match=r"data\.holdout: must be problems that can be evaluated"):
        found.begin({}, 0)


# --- the best, and the early stop ------------------------------------------------------------


def schedule(tmp_path, values, *overrides):
    """A schedule after evaluations of 40 problems; `values` are the shares of right answers."""
    recipe = Recipe.load("recipes/lab.yaml", ["eval.every=1", *overrides])
    found = EvaluationSchedule(
        recipe, RunFolder(tmp_path), SINGLE_PROCESS, None, {"test": []}, None
    )
    found.metric = "test/pass@1"
    for step, share in enumerate(values):
        found.values[step] = {str(i): float(i < 40 * share) for i in range(40)}
    return found


BEST = "checkpoint.best={metric: test/pass@1, mode: MODE}"


@pytest.mark.parametrize(
    ("mode", "values", "step"),
    [("max", [0.9, 0.2, 0.5, 0.5, 0.4], 2), ("min", [0.1, 0.5, 0.3, 0.3, 0.4], 2),
     ("max", [0.9], None)],
)  # fmt: skip
def test_the_best_is_the_earliest_of_the_highest_and_never_the_base(mode, values, step, tmp_path):
    found = schedule(tmp_path, values, BEST.replace("MODE", mode))
    assert found.best_step == step
    assert found.is_new_best(2) == (step == 2)
    assert not found.is_new_best(3)
    assert schedule(tmp_path, values).best_step is None


@pytest.mark.parametrize(("mode", "sign"), [("max", 1), ("min", -1)])
def test_an_interval_that_ends_at_the_limit_is_no_improvement(mode, sign, tmp_path):
    # Its lower end is 0, and 2.8e-17 as the resampled means are rounded.
    before, now = [0.3, 0.1, 0.3, 0.3, 0.1, 0.3], [0.4, 0.8, 0.4, 0.1, 0.8, 0.7]
    found = schedule(tmp_path, [0.0], f"checkpoint.best={{metric: test/pass@1, mode: {mode}}}")
    found.values = {
        step: {str(i): sign * value for i, value in enumerate(values)}
        for step, values in enumerate([before, now])
    }
    assert list(found._improvements()) == [0]
    found.values[1] = {str(i): sign * (value + 0.01) for i, value in enumerate(now)}
    assert list(found._improvements()) == [0, 1]


@pytest.mark.parametrize(
    ("values", "settings", "reason"),
    [
        # Small gains add up: 4 of 40 are none, 8 of 40 against the base are one.
        ([0.2, 0.25, 0.4, 0.45, 0.6], "{patience: 2}", None),
        ([0.2, 0.5, 0.5, 0.55], "{patience: 2}", "2 evaluations up to step 3 without an "
         "improvement of test/pass@1 on step 1"),
        ([0.2, 0.5, 0.5, 0.55], "{patience: 3}", None),
        ([0.5, 0.4, 0.6], "{patience: 2, min_delta: 0.2}", "2 evaluations up to step 2 without "
         "an improvement of test/pass@1 on the base"),
        ([0.5, 0.4, 0.9], "{patience: 2, min_delta: 0.2}", None),
        ([0.5, 0.4, 0.3], "{patience: null}", None),
    ],
)  # fmt: skip
def test_early_stop_counts_evaluations_without_a_paired_improvement(
    values, settings, reason, tmp_path
):
    found = schedule(tmp_path, values, f"early_stop={settings}").stop_reason()
    assert found == (reason and f"early_stop: {reason}")


def test_where_less_is_better_an_improvement_is_a_fall(tmp_path):
    best = BEST.replace("MODE", "min")
    falling, stop = [0.9, 0.6, 0.3], "early_stop={patience: 1}"
    assert schedule(tmp_path, falling, stop, best).stop_reason() is None
    assert schedule(tmp_path, falling, stop).stop_reason() is not None


# --- the guard -------------------------------------------------------------------------------


def history(**values):
    """Steps with these values, the last ones of each; the others are those of a quiet run."""
    length = max(map(len, values.values()))
    return [{**QUIET, **{name: of[i] for name, of in values.items()}} for i in range(length)]


ALARMS = {
    # The noise of the first: differences 0 0 0 0 -.4 0 0 0 0, five standard errors .298.
    "reward": (history(reward=[0.8] * 5 + [0.4] * 5), "0.4 on average, from 0.8"),
    "flat_groups": (
        history(reward=[0.5] * 5 + [0.38] * 5, flat_groups=[0.5] * 5 + [0.9, 1, 0.9, 1, 0.9]),
        "94% of the groups",
    ),
    "entropy": (history(entropy=[0.1] * 5 + [0.3] * 5), "0.3 nats per token, from 0.1"),
    "entropy_low": (history(entropy=[0.004] * 5), "0.004 nats per token"),
    "grad_norm": (history(grad_norm=[1.0] * 9 + [120.0]), "24.8 on average, usually 1"),
    "kl": (history(kl=[0.5, None, 1.5, None]), "1.5 nats per token"),
    "engine_gap": (history(engine_gap=[0.01, 0.2]), "0.2 nats per token"),
}


@pytest.mark.parametrize("name", ALARMS)
def test_an_alarm_has_its_text_and_can_be_switched_off(name):
    steps, text = ALARMS[name]
    assert find_alarms(steps, GuardSettings()) == {name: text}
    assert find_alarms(steps, GuardSettings(**{name: None})) == {}


@pytest.mark.parametrize(
    "steps",
    [
        history(reward=[0.8] * 5 + [0.62] * 5),  # Not a quarter lower.
        history(reward=[0.9, 0.2, 0.9, 0.9, 0.9, 0.2, 0.9, 0.2, 0.2, 0.9]),  # Noise.
        history(reward=[-0.5] * 5 + [-1.0] * 5),  # A share of no positive number.
        history(reward=[0.8] * 4),  # Less than a window.
        history(reward=[0.2] * 5 + [0.9] * 5, flat_groups=[1.0] * 10),  # Solved.
        history(flat_groups=[1.0] * 5, groups=[3] * 5),  # 15 groups.
        history(flat_groups=[0.5] * 5 + [1.0] * 5, groups=[16] * 5 + [3] * 5),
        history(entropy=[0.1] * 5 + [0.19] * 5),
        history(kl=[1.5, 0.5], grad_norm=[1.0, 300.0]),  # KL is back; no window of norms.
        history(reward=[None] * 5, entropy=[None] * 5, grad_norm=[None] * 5),
    ],
)
def test_what_is_no_alarm(steps):
    assert find_alarms(steps, GuardSettings()) == {}


def test_limits_are_alarms_and_a_low_entropy_is_that_of_the_last_window():
    assert find_alarms(history(kl=[1.0]), GuardSettings()) == {"kl": "1 nats per token"}
    risen = history(entropy=[0.1] * 5 + [0.25] * 5)
    assert find_alarms(risen, GuardSettings()) == {"entropy": "0.25 nats per token, from 0.1"}
    low, settings = [0.004] * 5, GuardSettings(entropy=None)
    assert find_alarms(history(entropy=[*low, *[0.4] * 5]), settings) == {}
    assert list(find_alarms(history(entropy=[*[0.4] * 5, *low]), settings)) == ["entropy_low"]


def test_few_runs_without_a_trend_have_a_false_alarm():
    """Rewards of 4 problems with 4 samples a step, of problems that are mostly hard or easy."""
    rng, alarms = random.Random(0), 0
    for _ in range(20):
        chances = [rng.betavariate(0.6, 0.6) for _ in range(100)]
        rewards = [
            fmean(sum(rng.random() < p for _ in range(4)) / 4 for p in rng.choices(chances, k=4))
            for _ in range(100)
        ]
        for step in range(5, 101, 5):
            alarms += "reward" in find_alarms(history(reward=rewards[:step]), GuardSettings())
    assert alarms == 0


def metrics(step, kl=None, **more):
    measured = {} if kl is None else {"kl": {"held_out": {"forward": kl}}}
    return {"step": step, "reward": {"self": 0.5}, "flat_groups": 0.2, "entropy": 0.4,
            "grad_norm": 1.0, "engine_gap": None, "groups": 16, **measured, **more}  # fmt: skip


def test_an_alarm_is_new_once_and_again_after_a_rollback_and_a_resumption():
    settings = GuardSettings(action="rollback", kl=1.0, rollbacks=1, lr_factor=0.25)
    guard = CollapseGuard(settings, compares=True)
    steps = [metrics(i, kl) for i, kl in enumerate([0.1, None, 0.2, None, 2.0, 3.0], start=1)]
    assert [list(guard.check(step)) for step in steps] == [[]] * 4 + [["kl"], []]
    guard = CollapseGuard(settings, compares=True)
    for step in steps[:5]:
        found = guard.check(step)
    assert (guard.action, guard.lr_scale) == ("rollback", 1.0)
    steps[4]["guard"] = {"alarms": list(found), "action": "rollback", "restored": 3}
    guard.record(steps[4])
    resumed = CollapseGuard(settings, compares=True)
    resumed.resume(steps[:5])
    for each in (guard, resumed):
        assert (each.action, each.lr_scale) == ("stop", 0.25)
        assert each.check(metrics(6)) == {}  # The last KL is the 0.2 of step 3.
        assert list(each.check(metrics(7, 2.0))) == ["kl"]


def test_an_alarm_that_was_over_is_new_and_one_that_a_resumed_run_had_is_not():
    guard = CollapseGuard(GuardSettings(), compares=True)
    found = [list(guard.check(metrics(i, kl))) for i, kl in enumerate([2.0, 0.5, 2.0], start=1)]
    assert found == [["kl"], [], ["kl"]]
    resumed = CollapseGuard(GuardSettings(), compares=True)
    resumed.resume([metrics(1, 2.0)])
    assert resumed.check(metrics(2, 3.0)) == {}


def test_the_step_that_is_restored_counts_on():
    guard = CollapseGuard(GuardSettings(action="rollback"), compares=True)
    for step in (metrics(1, 0.1), metrics(2, 2.0), metrics(3, 3.0)):
        guard.check(step)
    guard.record({"guard": {"restored": 2}})
    assert guard.check(metrics(4)) == {"kl": "2 nats per token"}


def test_all_groups_of_a_method_without_group_advantages_are_flat():
    flat = [metrics(i, flat_groups=1.0) for i in range(1, 7)]
    for compares, expected in ((True, ["flat_groups"]), (False, [])):
        guard = CollapseGuard(GuardSettings(), compares=compares)
        assert [name for step in flat for name in guard.check(step)] == expected
    off = CollapseGuard(GuardSettings(action="none"), compares=True)
    assert [off.check(step) for step in flat] == [{}] * 6


# --- recipes ---------------------------------------------------------------------------------

LAB = [f"{name}/{figure}" for name in ("test", "retention")
       for figure in ("pass@1", "pass@8", "mean_reward", "nll")]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["early_stop.patience=2"], "early_stop.patience: must be null without eval.every, got 2."),
        (["checkpoint.best={metric: test/pass@1}"],
         "checkpoint.best: must be null without eval.every, got a section."),
        (["eval.every=61", "early_stop.patience=2"],
         "eval.every: must be at most the number of steps, 60, with early_stop.patience, got 61."),
        (["eval.every=5", "checkpoint.best.metric=tset/pass@1"],
         f"checkpoint.best.metric: must be one of {', '.join(LAB)}, got 'tset/pass@1'."),
        (["guard.action=rollback", "checkpoint.every=61"],
         "checkpoint.every: must be at most the number of steps, 60, with guard.action rollback, "
         "got 61."),
        (["checkpoint.adapter=best"],
         "checkpoint.adapter: must be last without checkpoint.best, got 'best'."),
        (["guard.lr_factor=1"], "guard.lr_factor: must be less than 1, got 1."),
        (["guard.action=restart"],
         "guard.action: must be 'none', 'warn', 'stop' or 'rollback', got 'restart'."),
    ],
)  # fmt: skip
def test_the_text_of_a_wrong_setting(overrides, error):
    with pytest.raises(RecipeError) as caught:
        Recipe.load("recipes/lab.yaml", overrides)
    assert caught.value.problems == [f"command line: {error}"]


def test_evaluations_need_sets():
    with pytest.raises(RecipeError) as caught:
        Recipe.from_tree({"eval": {"every": 5}, "data": {"holdout": 0}})
    rule = "must be 0 without eval.sets and data.holdout, got 5."
    assert caught.value.problems == [f"eval.every: {rule}"]
