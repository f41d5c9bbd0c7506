"""A learning-rate range test: a short training whose rate rises until it diverges.

Source: Smith, arXiv 1506.01186. It is a real training in a temporary folder, of which nothing is
kept but the figures of its steps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console

from gft_lite.objective.methods import find_method
from gft_lite.planning.learning_rate import automatic_rate
from gft_lite.policy.model_config import model_width
from gft_lite.recipe.method_parameters import complete_objective
from gft_lite.recipe.schema import Recipe
from gft_lite.runs.folder import find_folder
from gft_lite.training.dry_step import dry_step
from gft_lite.training.loop import TrainError, train_step
from gft_lite.training.setup import Place, setup_run
from gft_lite.utils.distributed import init_distributed
from gft_lite.utils.errors import UserError
from gft_lite.utils.progress import show_phase, stderr_console

STEPS = 32
SPREAD = 30  # From the rule's rate over this to as many times the rule's rate.
KL_LIMIT = 3.0  # Nats per token. Useful policies of the lab are below 1, broken ones above 2.
# The best figure is reached by the rates before it too. On the lab a third of its rate is 3.1e-3
# for SFT, best at 4e-3 in whole runs, and 2.3e-3 for GFT, best at 8e-3 in examples/lab_study.md, at
# the edge of breaking down, and trained at 2e-3 in recipes/lab.yaml.
MARGIN = 3
_WINDOW = 5  # Steps of a moving mean.


@dataclass(frozen=True, slots=True)
class Point:
    """The figures of a step; None where there is none. `kl` is KL(base || policy) in nats."""

    rate: float
    loss: float | None
    reward: float | None
    grad_norm: float | None
    kl: float | None
    finite: bool = True

    @classmethod
    def of(cls, rate: float, metrics: Mapping[str, Any]) -> Point:
        """The point of a step from its metrics."""
        kl = metrics.get("kl", {}).get("held_out", {}).get("forward")
        finite = "non_finite" not in (metrics["skipped"] or "")
        reward = metrics["reward"].get("self")
        return cls(rate, metrics["loss"], reward, metrics["grad_norm"], kl, finite)


@dataclass(frozen=True, slots=True)
class RateRange:
    """The result of a range test: its steps, why it ended, and the rate it speaks for.

    `figure` is what is compared: `reward` of own samples, or `loss`. `best` is the step with the
    best moving mean; it and `rate` are None if the figure did not move beyond its noise.
    """

    points: tuple[Point, ...]
    figure: str
    ended: str
    best: int | None
    rate: float | None
    reason: str

    def values(self) -> list[float | None]:
        """The compared figure of each step."""
        return [getattr(point, self.figure) for point in self.points]


def range_test(
    recipe: Recipe, limits: tuple[float, float] | None = None, *, steps: int = STEPS,
    console: Console | None = None,
) -> RateRange:  # fmt: skip
    """Train `steps` steps with rates from the lower to the upper limit, until training diverges.

    Raises: UserError for a recipe with stages or several processes.
    """
    distributed = init_distributed(recipe.policy.device)
    if distributed.world_size > 1 or recipe.stages:
        got = "stages" if recipe.stages else f"{distributed.world_size} processes"
        raise UserError(
            [f"--lr-range: must be given a recipe of one method and one process, got {got}."]
        )
    console, recipe = console or stderr_console(), complete_objective(recipe)
    advantages = find_method(recipe.method).group_advantages
    if limits is None:
        rule = automatic_rate(recipe, model_width(recipe.policy), group_advantages=advantages)
        limits = rule / SPREAD, rule * SPREAD
    low, high = limits
    by_reward = advantages and recipe.group.self > 0 and recipe.group.offline is None
    points: list[Point] = []
    ended = "it reached the upper limit"
    with tempfile.TemporaryDirectory(prefix="gft-lite-lr-range-") as scratch, ExitStack() as stack:
        own = _settings(recipe, steps)
        folder = find_folder(own, Path(scratch) / "run", resume=False, distributed=distributed)
        run = setup_run(own, Place(folder, distributed, console, stack))
        dry_step(run)
        run.engine.sync(0)
        for step in range(1, steps + 1):
            rate = low * (high / low) ** ((step - 1) / max(steps - 1, 1))
            run.learner.lr_scale = rate  # The schedule is constant, and its rate 1.
            with show_phase(console, f"step {step} of {steps}, rate {rate:.1e}", announce=False):
                try:
                    points.append(Point.of(rate, train_step(run, step)))
                except TrainError as error:
                    ended = f"training stopped at {rate:.1e} ({error})"
                    break
            if why := divergence(points, by_reward=by_reward):
                ended = f"training diverged at {rate:.1e}: {why}"
                break
    return conclude(points, "reward" if by_reward else "loss", ended)


def _settings(recipe: Recipe, steps: int) -> Recipe:
    """The recipe of the test: no evaluation, a constant rate of 1, the KL at every step."""
    tree = recipe.model_dump()
    for name in ("budget", "eval", "checkpoint", "early_stop", "log"):
        del tree[name]
    tree["guard"] = {"action": "none"}
    tree["optim"] |= {"lr": 1.0, "schedule": "constant", "warmup": 0.0, "max_bad_steps": steps}
    tree["train"]["steps"] = steps
    tree["monitor"]["every"] = 1
    tree["log"] = {"groups": False}
    return complete_objective(Recipe.from_tree(tree))


def divergence(points: Sequence[Point], *, by_reward: bool) -> str | None:
    """Why the last step has diverged; None if it has not."""
    last = points[-1]
    if not last.finite:
        return "loss or gradient is not finite"
    if last.kl is not None and not last.kl <= KL_LIMIT:  # Also if it is NaN.
        return f"the KL to the base is {last.kl:.1f} nats per token"
    values = [p.reward if by_reward else p.loss for p in points]
    known = [value for value in values if value is not None]
    if len(known) < 2 * _WINDOW:
        return None
    means = [fmean(known[i : i + _WINDOW]) for i in range(len(known) - _WINDOW + 1)]
    if by_reward and max(means) > 0.1 and means[-1] < max(means) / 2:
        return f"the reward of own samples has fallen from {max(means):.2f} to {means[-1]:.2f}"
    if not by_reward and means[0] > 0 and known[-1] > 2 * means[0]:
        return f"the loss has risen from {means[0]:.2g} to {known[-1]:.2g}"
    return None


def conclude(points: Sequence[Point], figure: str, ended: str) -> RateRange:
    """The rate that the points speak for, with the reason."""
    sign = 1 if figure == "reward" else -1
    known = [(i, v) for i, p in enumerate(points) if (v := getattr(p, figure)) is not None]
    name = "reward of own samples" if figure == "reward" else "loss"
    if len(known) < 2 * _WINDOW:
        reason = f"only {len(known)} of {len(points)} steps have a {name}"
        return RateRange(tuple(points), figure, ended, None, None, reason)
    # Each mean is that of the step in the middle.
    means = {known[n + _WINDOW // 2][0]: fmean(v for _, v in known[n : n + _WINDOW])
             for n in range(len(known) - _WINDOW + 1)}  # fmt: skip
    first = [value for _, value in known[: 2 * _WINDOW]]
    start, noise = means[min(means)], stdev(first) / _WINDOW**0.5
    best = max(means, key=lambda i: sign * means[i])
    if sign * (means[best] - start) <= 2 * noise:
        reason = (f"the {name} is {means[best]:.3g} at best, from {start:.3g}, which is within its "
                  "noise: the test can't tell rates apart")  # fmt: skip
        return RateRange(tuple(points), figure, ended, None, None, reason)
    rate = float(f"{points[best].rate / MARGIN:.1e}")
    reason = (f"the {name} is best at {points[best].rate:.1e}, {means[best]:.3g} from {start:.3g}; "
              "a third of that rate leaves room for a whole training")  # fmt: skip
    if best == max(means):
        reason += ". It was still getting better: raise the upper limit"
    return RateRange(tuple(points), figure, ended, best, rate, reason)
