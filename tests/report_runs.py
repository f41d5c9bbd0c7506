"""Small run folders for tests of the report, as training writes them."""

from __future__ import annotations

from gft_lite.evaluation.metrics import restrict
from gft_lite.recipe.schema import Recipe
from gft_lite.runs.folder import RunFolder
from gft_lite.types import Group, Problem, Response, ScoredGroup


def step(number, **changed):
    """The metrics of a step."""
    return {
        "step": number, "trajectories": 8, "flat_groups": 0.5, "truncated": 0.0,
        "reward": {"expert": 1.0, "teacher": 0.75, "self": 0.25}, "rollout_tokens": 100,
        "skipped": None, "trained_tokens": 300, "loss": -0.1, "grad_norm": 0.5, "entropy": 0.2,
        "rectified": 0.1, "seconds": {"rollout": 2.0, "train": 1.0}, **changed,
    }  # fmt: skip


def figures(right):
    """An evaluated set of two problems with two samples each, of which `right` are right."""
    correct = {"q0": min(right, 2), "q1": max(right - 2, 0)}
    return restrict({"problems": 2, "samples": 4, "correct": correct}, list(correct), [1, 2])


def evaluated(right):
    """An evaluation while training."""
    return {"adapter": "", "sets": {"test": figures(right)}}


def make_run(path, *overrides, metrics=(), groups=(), **files):
    """A run's folder; `groups` are the steps that keep a group, `files` go to `eval/`."""
    run = RunFolder(path)
    run.create(Recipe.load("recipes/lab.yaml", overrides).to_yaml())
    for line in metrics:
        run.append_metrics(line)
    for number in groups:
        right = Response((5, 1), f"right at {number}", "self", reward=1.0, verdict="ok")
        wrong = Response((6, 1), f"wrong at {number}", "self", reward=0.0, verdict="no_answer")
        group = Group(Problem(f"{path.name}-{number}", "what?", "7"), (right, wrong))
        run.write_groups(number, [ScoredGroup(group, (0.7, -0.7))])
    for name, value in files.items():
        run.write_json(f"eval/{name}.json" if name != "summary" else "summary.json", value)
    return run
