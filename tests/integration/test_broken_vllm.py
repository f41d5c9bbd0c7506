"""A vLLM whose compiled libraries don't fit the machine: one line and exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys

FAILURES = {
    "ImportError('libcudart.so.12: cannot open shared object file')": "libcudart.so.12",
    "AttributeError(\"'_OpNamespace' '_C' object has no attribute 'rms_norm'\")": "rms_norm",
}
CODE = """
import sys
from gft_lite.cli import main

path, *arguments = sys.argv[1:]
sys.path.insert(0, path)
for failure in sys.stdin.read().splitlines():
    open(f"{path}/vllm.py", "w").write(f"raise {failure}")
    print(main([*arguments, "--out", f"{path}/run-{failure[:5]}"]))
"""


def test_a_vllm_that_cannot_be_imported_is_one_line(tmp_path):
    arguments = ["train", "recipes/lab.yaml", "rollout.engine=vllm", "train.steps=1",
                 "data.problems=20", "data.holdout=2"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-B", "-c", CODE, str(tmp_path), *arguments], input="\n".join(FAILURES),
        env=os.environ, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.stdout.split() == ["2", "2"], done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("rollout.engine: ")]
    for line, cause in zip(lines, FAILURES.values(), strict=True):
        assert line.startswith("rollout.engine: vllm could not be imported (")
        assert cause in line and "reinstall" in line
    assert "Traceback" not in done.stderr
