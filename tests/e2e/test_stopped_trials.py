"""`gft-lite sweep --search` on the lab: a running trial that the search stops."""

from __future__ import annotations

import json

import pytest

from gft_lite.cli import main
from gft_lite.experiments.sweep_results import SweepFolder
from gft_lite.runs.checkpoint import list_checkpoints, step_of

SWEEP = """
recipe: {lab}
random_seed: 4  # Proposes the short run first.
overrides:
  train: {{problems_per_step: 3}}
  data: {{problems: 40, holdout: 4}}
  monitor: {{every: 0}}
  eval: {{samples: 2, k: [1], every: 1, sets: {{test: {{problems: 16}}}}}}
grid: {{recipe: [short.yaml, long.yaml]}}
search: {{trials: 2, prune: true, metric: test/pass@1}}
"""


def test_a_running_trial_is_stopped_and_stays_an_ordinary_run(tmp_path, capsys):
    pytest.importorskip("optuna", reason="optuna is not installed")
    lab = "recipes/lab.yaml"
    # A learning rate that destroys the policy in its first step.
    for name, fields in {
        "short": "train: {steps: 1}",
        "long": "train: {steps: 500}\noptim: {lr: 0.3, warmup: 0}",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(f"extends: [{lab}]\n{fields}\n")
    (tmp_path / "sweep.yaml").write_text(SWEEP.format(lab=lab))
    assert main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "recipe=long,seed=0: stopped by the search at step 1 (" in out
    assert "best: recipe=short,seed=0: test/pass@1 " in out
    folder = SweepFolder(tmp_path / "out")
    results = json.loads((folder.path / "results.json").read_text())
    assert [(t["name"], t["state"], t["reason"]) for t in results["trials"]] == [
        ("recipe=short,seed=0", "done", None),
        ("recipe=long,seed=0", "stopped", "stopped by the search at step 1"),
    ]
    assert results["search"]["best"] == "recipe=short,seed=0"
    # It can be resumed: the last step is in a checkpoint.
    run = folder.run("recipe=long,seed=0")
    assert len(run.metrics()) < 500
    assert [step_of(path) for path in list_checkpoints(run.checkpoints)][-1] == len(run.metrics())
