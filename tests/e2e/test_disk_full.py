"""A disk that is full at a sync: the error names --resume, which finishes the run."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys


def test_a_full_disk_at_an_adapter_sync_says_how_to_go_on(tmp_path):
    """The limit on the size of files lets everything through but the adapter that is synced."""
    command = [
        sys.executable, "-m", "gft_lite", "train", "recipes/lab.yaml", "train.steps=1",
        "train.problems_per_step=2", "data.problems=20", "data.holdout=2", "monitor.every=0",
        "eval.samples=1", "eval.k=[1]", "eval.sets.test.problems=1",
        "eval.sets.retention.problems=1", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    limited = ["sh", "-c", f"ulimit -f 60; exec {shlex.join(command)}"]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert [p.name for p in (tmp_path / "run" / "engine").iterdir()] == ["adapters"]
    [line] = [line for line in done.stderr.splitlines() if "disk is full" in line]
    assert "continue with --resume" in line
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 1
