"""A vLLM whose compiled libraries don't fit the machine: one line and exit code 2."""

from __future__ import annotations

FAILURES = {
    "ImportError('libcudart.so.12: cannot open shared object file')": "libcudart.so.12",
    "AttributeError(\"'_OpNamespace' '_C' object has no attribute 'rms_norm'\")": "rms_norm",
}
CODE = """
import sys
from gft_lite.cli import main

path, failures, *arguments = sys.argv[1:]
sys.path.insert(0, path)
sys.dont_write_bytecode = True
for failure in failures.splitlines():
    open(f"{path}/vllm.py", "w").write(f"raise {failure}")
    print(main([*arguments, "--out", f"{path}/run-{failure[:5]}"]))
"""


def test_a_vllm_that_cannot_be_imported_is_one_line(tmp_path, fork_server):
    arguments = ["train", "recipes/lab.yaml", "rollout.engine=vllm", "train.steps=1",
                 "data.problems=20", "data.holdout=2"]  # fmt: skip
    done = fork_server.run(tmp_path, "\n".join(FAILURES), *arguments, code=CODE)
    assert done.stdout.split() == ["2", "2"], done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("rollout.engine: ")]
    for line, cause in zip(lines, FAILURES.values(), strict=True):
        assert line.startswith("rollout.engine: vllm could not be imported (")
        assert cause in line and "reinstall" in line
    assert "Traceback" not in done.stderr
