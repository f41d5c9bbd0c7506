"""Every example of CONTRIBUTING.md, as it stands there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gft_lite.cli import main
from gft_lite.report.curves import step_plots
from gft_lite.report.loading import Series, read_folders
from gft_lite.runs.folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```', TEXT, re.MULTILINE | re.DOTALL))
SMALL = [
    "train.steps=2", "train.problems_per_step=2", "data.problems=40", "data.holdout=4",
    "monitor.every=0", "eval.samples=1", "eval.k=[1]", "eval.sets.test.problems=2",
    "eval.sets.retention.problems=2", "policy.quantization=none",
]  # fmt: skip


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """The user's own modules and recipes, in the working directory."""
    modules = [name for name in EXAMPLES if "/" not in name]
    for name in modules:
        (tmp_path / name).write_text(EXAMPLES[name], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in modules:
        sys.modules.pop(name.removesuffix(".py"), None)


def train(name):
    assert main(["train", f"{name}.yaml", *SMALL, "--out", "run"]) == 0
    return RunFolder("run")


def test_nothing_is_left_out():
    assert set(EXAMPLES) == {
        "own_loss.py", "own_loss.yaml", "own_reward.py", "own_reward.yaml", "own_engine.py",
        "own_engine.yaml", "gft_lite/cli/count.py", "gft_lite/runs/metrics.py",
        "gft_lite/report/curves.py",
    }  # fmt: skip


def test_a_loss(examples, capsys):
    run = train("own_loss")
    assert "flat groups" not in capsys.readouterr().err  # It has no group advantages.
    weights = [metrics["objective"]["token_weight"] for metrics in run.metrics()]
    assert all(0 < weight < 1 for weight in weights)
    assert yaml.safe_load((run.path / "recipe.yaml").read_text())["objective"]["power"] == 0.5
    runs, _ = read_folders([run.path])
    plots = {plot.name: plot for plot in step_plots([Series("run", tuple(runs))])}
    assert plots["token-weight"].curves[0].y == weights
    for wrong, told in (
        ("objective.powr=2", "objective.powr: unknown field, got 2. Did you mean objective.power?"),
        ("objective.power=x", "objective.power: must be a number, got 'x'."),
    ):
        assert main(["train", "own_loss.yaml", wrong, "--out", "other"]) == 2
        assert told in capsys.readouterr().err
        assert not Path("other").exists()


def test_a_reward(examples):
    [groups, *_] = [train("own_reward").groups(1)]
    for group in groups:
        for response in group["responses"]:
            brevity = min(1.0, 12 / max(1, len(response["text"])))
            parts = response["reward_parts"]
            assert parts["own_reward:brevity"] == pytest.approx(brevity)
            assert response["reward"] == pytest.approx(parts["exact"] + 0.1 * brevity)


def test_an_engine(examples):
    run = train("own_engine")
    sampled = [int(line) for line in Path("sampled.txt").read_text().split()]
    assert {metrics["rollout_tokens"] for metrics in run.metrics()} <= set(sampled)


def insert_after(file, line, text):
    before = file.read_text(encoding="utf-8")
    assert before.count(line) == 1, f"{line!r} must be in {file.name} once"
    file.write_text(before.replace(line, line + text), encoding="utf-8")


def test_a_command_and_a_metric(tmp_path):
    """In a copy of the package, with the edits that the text describes."""
    shutil.copytree(ROOT / "gft_lite", tmp_path / "gft_lite")
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / "gft_lite/cli/count.py").write_text(EXAMPLES["gft_lite/cli/count.py"])
    entry_point = tmp_path / "gft_lite/cli/entry_point.py"
    insert_after(entry_point, "from gft_lite.cli import (\n", "    count,\n")
    insert_after(entry_point, "COMMANDS = (\n", "    count,\n")
    for name, line in (
        ("gft_lite/runs/metrics.py", '        "groups": len(groups),\n'),
        ("gft_lite/report/curves.py", "_METRICS = (\n"),
    ):
        insert_after(tmp_path / name, line, EXAMPLES[name])

    commands = [
        ["train", "recipes/lab.yaml", *SMALL, "--out", "run"], ["count", "run"],
        ["count", "nowhere"], ["report", "run", "--no-tokens", "--plots", "plots"],
    ]  # fmt: skip
    code = "from gft_lite.cli import main\n" + "".join(
        f"print('exit code', main({command}))\n" for command in commands
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert re.findall("exit code ([0-9])", done.stdout) == ["0", "0", "2", "0"], done.stderr
    assert "2\nexit code 0\n" in done.stdout
    assert "RUN: must be the folder of a run, got 'nowhere'.\n" in done.stderr
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    for number, metrics in enumerate(map(json.loads, lines), start=1):
        groups = RunFolder(tmp_path / "run").groups(number)
        lengths = [len(r["token_ids"]) for group in groups for r in group["responses"]]
        assert metrics["longest"] == max(lengths)
    assert (tmp_path / "plots/longest.svg").exists()
