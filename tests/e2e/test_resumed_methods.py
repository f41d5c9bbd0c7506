"""Methods with a schedule or a teacher that follows: a resumed run is the whole run, bit by bit."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from gft_lite.cli import main
from gft_lite.runs.folder import RunFolder

SMALL = [
    "train.steps=4", "train.problems_per_step=2", "data.problems=20", "data.holdout=2",
    "monitor.problems=2", "eval.samples=1", "eval.k=[1]", "checkpoint.every=2",
    "checkpoint.keep=2", "optim.lr=1e-2", "log.groups=true", "eval.sets.test.problems=2",
    "eval.sets.retention.problems=2",
]  # fmt: skip
METHODS = {
    "chord": ["objective.mu=0.9", "objective.mu_end=0.05", "objective.mu_warmup=0.4"],
    "uft": ["objective.hint_weight=0.1"],
    "prefix_rft": [],
    "sdft": ["teacher.decay=0.5"],
}


def train(method, out, *more):
    arguments = [f"recipes/study/{method}.yaml", *SMALL, *METHODS[method], "--out", str(out)]
    assert main(["train", *arguments, *more]) == 0
    return RunFolder(out)


def comparable(run):
    alone = ("seconds", "peak_memory")
    return [{k: v for k, v in m.items() if k not in alone} for m in run.metrics()]


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_whole_run(method, tmp_path):
    whole = train(method, tmp_path / "whole")
    # As if it had been killed in its fourth step.
    cut = RunFolder(shutil.copytree(whole.path, tmp_path / "cut"))
    for name in ("checkpoints/step-000004", "adapter", "eval"):
        shutil.rmtree(cut.path / name)
    (cut.path / "summary.json").unlink()
    lines = (cut.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut.path / "metrics.jsonl").write_text("".join(lines[:3]))
    saved = cut.path / "checkpoints" / "step-000002" / "teacher.safetensors"
    assert saved.exists() == (method == "sdft")
    train(method, cut.path, "--resume")
    assert comparable(cut) == comparable(whole)
    first, second = (load_file(run.adapter / "adapter_model.safetensors") for run in (whole, cut))
    assert all(torch.equal(second[name], value) for name, value in first.items())
    assert [g["responses"] for g in cut.groups(4)] == [g["responses"] for g in whole.groups(4)]
    metrics = whole.metrics()
    if method == "chord":
        # At 1/8, 3/8, 5/8 and 7/8 of the budget.
        mu = [m["objective"]["mu"] for m in metrics]
        assert mu[:2] == pytest.approx([0.9 * 0.125 / 0.4, 0.9 * 0.375 / 0.4], rel=1e-5)
        assert 0.05 < mu[3] < mu[2] < 0.9
    elif method == "sdft":
        assert all(m["objective"]["teacher_kl"] > 0.1 for m in metrics)
