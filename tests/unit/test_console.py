"""Metrics of a step on the console, those of any loss among them."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.console import Console

from gft_lite.runs.console import TimeLeft, TrainingConsole, evaluation_line
from gft_lite.runs.metrics import group_metrics
from gft_lite.types import Group, Problem, Response
from gft_lite.utils.tables import results_table

STEP: dict[str, Any] = {
    "step": 1, "reward": {"expert": 1.0, "self": 0.25}, "flat_groups": 0.5, "truncated": 0.0,
    "loss": 0.125, "skipped": None, "rectified": 0.5, "rollout_tokens": 100, "trained_tokens": 40,
    "objective": {"rectified": 0.5, "my_own_metric": 0.0625, "absent": None},
    "seconds": {"rollout": 4.0},
}  # fmt: skip


def test_the_metrics_of_a_loss_are_shown_by_name():
    out = io.StringIO()
    with TrainingConsole(Console(file=out), 1, 0) as console:
        console.step(STEP)
    assert out.getvalue() == (
        "step 1/1  reward: expert 1.00 self 0.25  flat groups: 50%  rectified tokens: 50%  "
        "my own metric: 0.0625  loss: 0.1250  truncated: 0%  rollout tokens/s: 25\n"
    )


def test_the_time_left_has_the_evaluations_to_come():
    left = TimeLeft(20, 10, {12: 2.0, 14: 1.0, 20: 0.5}.__getitem__, 8.0)
    assert left.after(10, 0.0) is None  # No step is done.
    # 2 steps took 10 s: 8 more take 40 s, and two evaluations as long as the base's 16 s.
    assert left.after(12, 10.0) == 40 + 16
    left.add({"step": 10, "seconds": {"train": 1.0, "eval": 2.0}})  # Before the resumption.
    left.add({"step": 13, "seconds": {"train": 1.0}})
    left.add({"step": 14, "seconds": {"train": 1.0, "eval": 4.0}})
    # 4 steps took 24 s without the evaluation: 6 more take 36 s, and one evaluation 3 s.
    assert left.after(14, 28.0) == 36 + 3
    assert left.after(20, 100.0) == 1.5  # The trained policy is evaluated after the last step.
    assert TimeLeft(None, 0, {3: 1.0}.__getitem__, 8.0).after(3, 10.0) is None


def test_the_view_has_the_time_left_of_the_steps_metrics(monkeypatch):
    """Two evaluations of ten hours are to come; steps that take no time are not."""
    left = TimeLeft(2, 0, {1: 2.0, 2: 2.0}.__getitem__, 1.0)
    steps = [STEP, {**STEP, "step": 2, "seconds": {"eval": 36000.0}}]
    assert "left 20:00:00" in panel(monkeypatch, 80, 24, steps, left=left)


def panel(monkeypatch, width: int, height: int, steps: list[dict[str, Any]], **options: Any) -> str:
    """The last panel of a terminal of this size, after these steps."""
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height)
    with TrainingConsole(console, 60, 0, **options) as shown:
        for metrics in steps:
            shown.step(metrics)
        screen = Console(file=io.StringIO(), width=width, height=height, color_system=None)
        screen.print(shown._display._live.renderable)
    return screen.file.getvalue()  # type: ignore[attr-defined]


def many(last: int) -> list[dict[str, Any]]:
    """Steps with rising own rewards and KL, evaluations, a NaN and long names."""
    figures = {"a_test_set_with_a_very_long_name": {"pass@1": 0.5, "pass@1_interval": [0.25, 0.75]}}
    metrics = []
    for step in range(1, last + 1):
        own = math.nan if step == 2 else step / 10
        metrics.append(
            {**STEP, "step": step, "reward": {"expert": -step, "self": own}, "entropy": math.nan,
             "objective": {f"metric_{'x' * 80}_{i}": math.nan for i in range(9)},
             "kl": {"held_out": {"forward": step / 100}, "on_policy": {}}}
        )  # fmt: skip
    metrics[2] |= {"eval": figures, "best_step": 3}
    return metrics


@pytest.mark.parametrize(("width", "height"), [(100, 30), (60, 20), (40, 12)])
def test_the_live_view_fits_the_terminal_and_has_trends(width, height, monkeypatch):
    text = panel(monkeypatch, width, height, many(8))
    lines = text.splitlines()
    assert max(map(len, lines)) <= width and len(lines) <= height - 2
    assert lines[0].startswith("reward") and "█ self 0.80" in lines[0]
    assert "KL held out" in lines[1] and "▁" in lines[1] and "█" in lines[1]
    assert width < 60 or ("rectified tokens" in text and "tokens/s" in text)
    assert "best step" in text and "8/60" in lines[-1]
    assert width < 100 or "0.500 [0.250, 0.750] at step 3" in text


def test_a_resumed_run_shows_the_trend_and_the_evaluation_of_earlier_steps(monkeypatch):
    *past, last = many(8)
    whole, resumed = panel(monkeypatch, 100, 30, [*past, last]), panel(
        monkeypatch, 100, 30, [last], history=past
    )  # fmt: skip
    assert resumed.splitlines()[:6] == whole.splitlines()[:6]


def test_before_the_first_step_there_is_only_the_bar(monkeypatch):
    assert panel(monkeypatch, 60, 20, []).split()[0] == "step"


def test_a_method_without_group_advantages_has_no_flat_groups():
    out = io.StringIO()
    with TrainingConsole(Console(file=out), 1, 0, compares=False) as console:
        console.step(STEP)
    assert "flat groups" not in out.getvalue() and "reward: expert 1.00" in out.getvalue()


def test_a_step_without_rewards_shows_none_but_the_likelihood(monkeypatch):
    figures = {"nll": 1.25, "perplexity": 3.49, "nll_interval": [1.0, 1.5], "samples": 0}
    step = {**STEP, "reward": {}, "eval": {"held_out": figures}}
    out = io.StringIO()
    with TrainingConsole(Console(file=out, width=200), 1, 0) as console:
        console.step(step)
    assert "reward" not in out.getvalue()
    assert "held_out/nll: 1.250 [1.000, 1.500]" in out.getvalue()
    assert not panel(monkeypatch, 100, 30, [step]).startswith("reward")


def test_a_title_is_wider_than_its_table():
    table = results_table({"base": {"nll": 1.0}}, "a title that has many words")
    out = io.StringIO()
    Console(file=out, width=80).print(table)
    assert "a title that has many words" in out.getvalue().splitlines()[0]


def test_a_terminal_keeps_the_last_kl(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")  # On a dumb one nothing is drawn.
    out = io.StringIO()
    kl = {"held_out": {"forward": 0.5}}
    with TrainingConsole(Console(file=out, force_terminal=True, width=80), 2, 0) as console:
        console.step({**STEP, "kl": kl})
        out.truncate(0)
        console.step({**STEP, "step": 2})
    assert "KL held out" in out.getvalue() and "0.5000" in out.getvalue()


def test_a_terminal_keeps_the_last_evaluation_and_a_log_has_it_once():
    figures = {"test": {"pass@1": 0.5, "pass@1_interval": [0.25, 0.75], "length": 3.0},
               "hard": {"mean_reward": -0.5, "mean_reward_interval": (-1, 0)}}  # fmt: skip
    line = "test/pass@1 0.500 [0.250, 0.750], hard/mean_reward -0.500 [-1.000, 0.000]"
    assert evaluation_line(figures) == line
    for terminal in (True, False):
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=80)
        with TrainingConsole(console, 2, 0) as shown:
            shown.step({**STEP, "eval": figures})
            assert terminal or "test/pass@1: 0.500 [0.250, 0.750]" in out.getvalue()
            out.truncate(0)
            shown.step({**STEP, "step": 2})
        assert ("0.500 [0.250, 0.750]" in out.getvalue()) is terminal


def test_responses_without_a_reward_do_not_count_in_means():
    def response(reward: float | None, source: Any = "self") -> Response:
        return Response(
            (1,), "x", source, reward=reward, verdict="ok" if reward else "not_applicable"
        )

    group = Group(Problem("a", "?", "1"), (response(None, "expert"), response(1.0), response(None)))
    metrics = group_metrics([group])
    assert metrics["reward"] == {"self": 1.0}
    assert metrics["sources"] == {"expert": 1, "self": 2}
    assert metrics["verdicts"] == {"not_applicable": 2, "ok": 1}
