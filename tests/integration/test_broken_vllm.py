"""A vLLM whose compiled libraries don't fit the machine: one line and exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FAILURES = {
    "ImportError('libcudart.so.12: cannot open shared object file')": "libcudart.so.12",
    "AttributeError(\"'_OpNamespace' '_C' object has no attribute 'rms_norm'\")": "rms_norm",
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_vllm_that_cannot_be_imported_is_one_line(failure, tmp_path):
    package = tmp_path / "site" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"raise {failure}\n", encoding="utf-8")
    training = [
        sys.executable, "-m", "gft_lite", "train", "recipes/lab.yaml", "rollout.engine=vllm",
        "train.steps=1", "data.problems=20", "data.holdout=2", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    done = subprocess.run(training, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("rollout.engine: vllm could not be imported (")
    assert FAILURES[failure] in last and "reinstall" in last
    assert "Traceback" not in done.stderr
