"""Wrong targets and options of every command end in one line before torch is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gft_lite.cli.entry_point import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
LAB = "recipes/lab.yaml"
STAGES = '[{"method":"sft","overrides":{"data":{"source":"none.csv"}}}]'
# The command line, and the field that its error begins with.
WRONG = {
    "train none.yaml": "must be a recipe file",
    f"train {LAB} policy.model=no/such/model": "policy.model",
    f"train {LAB} policy.model=foo/bar": "policy.model",
    f"train {LAB} policy.adapter=no/such/adapter": "policy.adapter",
    f"train {LAB} data.source=none.jsonl": "data.source",
    f"train {LAB} data.source=foo/bar": "data.source",
    f"train {LAB} eval.sets.test.source=none.csv": "eval.sets.test.source",
    f"train {LAB} group.offline=none": "group.offline",
    f"train {LAB} stages={STAGES}": "data.source",
    f"train {LAB} --resume --out none": "--resume",
    f"train {LAB} --out unfinished": "--out",
    f"train {LAB} --lr-range --resume": "--lr-range",
    "train --data none.jsonl --model none": "policy.model",
    "init none.jsonl --model none": "policy.model",
    "plan none.yaml": "must be a recipe file",
    f"plan {LAB} policy.model=no/such/model": "policy.model",
    "distill none.yaml --teacher lab": "must be a recipe file",
    f"distill {LAB} --teacher no/such/model": "TARGET",
    f"distill {LAB} --teacher foo/bar": "policy.model",
    f"distill {LAB} --teacher lab --model x": "model",
    f"distill {LAB} data.source=none.csv --teacher lab": "data.source",
    "groups none.yaml": "must be a recipe file",
    f"groups {LAB} policy.model=no/such/model": "policy.model",
    "eval no/such/model --suite lab": "TARGET",
    "eval unfinished --suite lab": "TARGET",
    "eval foo/bar --suite lab": "policy.model",
    "eval lab --suite none.yaml": "must be a recipe file",
    "eval lab --suite lab --data-dir none": "--data-dir",
    "eval lab --harness gsm8k --harness-include none": "--harness-include",
    "sweep none.yaml": "must be a recipe file",
    f"sweep {LAB} --grid policy.model=no/such/model": "policy.model",
    f"sweep {LAB} --grid optim.lr=1e-3 --launcher none": "--launcher",
    "referee none.yaml --methods gft,sft": "must be a recipe file",
    f"referee {LAB} --methods gft,none": "--methods",
    f"referee {LAB} --methods gft,sft --bases no/such/model": "policy.model",
    "lab compare --methods none": "--methods",
    "lab study no.such=1": "command line",
    "report none": "RUN",
    "report empty": "RUN",
    "chat no/such/model": "TARGET",
    "chat unfinished": "TARGET",
    "chat foo/bar": "policy.model",
    "merge runs/none --out merged": "TARGET",
    "merge lab --out merged": "TARGET",
    "merge unfinished --out unfinished": "--out",
    "push none me/x --dry-run": "RUN",
    "push unfinished me/x --merged --dry-run": "RUN",
    "push unfinished a/b/c": "REPO",
    "audit none.yaml": "must be a recipe file",
    "completion tcsh": "SHELL",
}
CODE = """
import contextlib, io, json, sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise RuntimeError("torch is imported")

sys.meta_path.insert(0, NoTorch())
from gft_lite.cli import main
found = {}
for line in json.load(sys.stdin):
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = main(line.split())
    found[line] = code, err.getvalue()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, tuple[int, str]]:
    """Exit code and errors of each command line, of one process that can't import torch."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "empty").mkdir()
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "recipe.yaml").write_text("extends: [recipes/lab.yaml]\n")
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(folder / "hub"),
                   "PYTHONPATH": str(ROOT), "HF_TOKEN": ""}  # fmt: skip
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_CACHE")
    env = {name: value for name, value in os.environ.items() if name not in offline}
    done = subprocess.run(
        [sys.executable, "-c", CODE], input=json.dumps([*WRONG]), capture_output=True, text=True,
        cwd=folder, env=env | unreachable,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_target_is_one_line_without_torch(answers, line):
    code, errors = answers[line]
    assert (code, errors.count("\n")) == (2, 1), errors
    assert errors.startswith(f"{WRONG[line]}:" if ":" not in WRONG[line] and " " not in WRONG[line]
                             else WRONG[line])  # fmt: skip
    if "foo/bar" in line:
        assert "http://127.0.0.1:1 can't be reached" in errors


def test_every_command_with_a_target_is_here():
    names = {
        command.__name__.rpartition(".")[2].replace("evaluate", "eval") for command in COMMANDS
    }
    assert {line.split()[0] for line in WRONG} == names - {"doctor", "methods"}
