"""A run in a log: the first line is there before torch, every line is this program's own."""

from __future__ import annotations

import re
import subprocess
import sys

LAB = ["recipes/lab.yaml", "rollout.engine=vllm", "train.steps=1", "train.problems_per_step=2",
       "data.problems=12", "data.holdout=2", "monitor.problems=2", "eval.samples=1", "eval.k=[1]",
       "eval.sets.test.problems=2", "eval.sets.retention.problems=2"]  # fmt: skip
OWN = (
    "importing libraries", "loading lab", "reading the data", "data: ", "eval.sets.",
    "demonstrations: ", "run folder: ", "layout of micro-batches: ", "starting the rollout engine",
    "engine: vllm", "evaluating the ", "dry step: ", "step 1", "memory: ", "memory plan: ",
    "sampling", "KL",
)  # fmt: skip


def test_a_run_with_vllm_prints_no_message_of_a_library(tmp_path):
    command = [sys.executable, "-m", "gft_lite", "train", *LAB, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == "importing libraries"
    foreign = [line for line in lines if not line.startswith(OWN)]
    assert [line for line in foreign if line and not line.startswith("  ")] == []
    assert not re.search(r"WARNING|INFO|Warning|\[W\d", done.stdout + done.stderr)
