"""Files and pipes are UTF-8 in every locale, tested with characters that the locale lacks."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = "Löse 数 ½ √"  # ö is in Latin-1, the others are not; none is in ASCII.
RECIPE = f"""
extends: recipes/lab.yaml
data:
  source: rows.jsonl
  holdout: 1
  columns: {{problem: problem, answer: answer, expert: expert, id: id}}
  prompt: {{template: '{{problem}}'}}
group: {{expert: 1, teacher: 0, self: 2}}
train: {{steps: 2, problems_per_step: 2}}
checkpoint: {{every: 1}}
monitor: {{every: 1, problems: 1}}
eval: {{samples: 1, k: [1], sets: {{test: {{source: rows.jsonl, columns: {{id: id}}}}}}}}
rollout: {{stop: ['{TEXT}']}}
"""
SUITE = f"""
name: mine
samples: 1
drift: 1
definitions: {{a: {{source: rows.jsonl, title: '{TEXT}', columns: {{id: id}}}}}}
rollout: {{max_tokens: 16}}
reward: {{functions: [exact]}}
"""
COMMANDS = [
    ["train", "recipe.yaml", "--out", "run"],
    ["train", "run/recipe.yaml", "--out", "run", "--resume"],
    ["eval", "lab", "run", "--suite", "suite.yaml", "--out", "evaluation"],
    ["eval", "lab", "run", "--suite", "suite.yaml", "--out", "evaluation", "--regrade"],
    ["sweep", "recipe.yaml", "--grid", "optim.lr=1e-3", "--out", "sweep"],
    ["report", "run", "sweep", "--out", "report.html"],
]


def environment(folder: Path) -> tuple[str, dict[str, str]]:
    """An encoding that is not UTF-8, and the environment of its locale: Latin-1 if possible."""
    plain = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    plain.pop("PYTHONIOENCODING", None)
    made = folder / "en_US.ISO-8859-1"
    command = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(made)]
    if not shutil.which("localedef") or subprocess.run(command, capture_output=True).returncode:
        return "ANSI_X3.4-1968", plain | {"LC_ALL": "C"}
    return "ISO-8859-1", plain | {"LC_ALL": made.name, "LOCPATH": str(folder)}


def test_runs_evaluations_sweeps_and_reports(tmp_path: Path):
    locale, env = environment(tmp_path)
    rows = [
        {"id": f"{TEXT} {i}", "problem": "011-012+131....=", "answer": "130",
         "expert": "@011;004;130#130", "note": TEXT}
        for i in range(5)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "suite.yaml").write_text(SUITE, encoding="utf-8")
    code = (
        "import locale, sys; from gft_lite.cli import main\n"
        "print(locale.getencoding())\n"
        f"for command in {COMMANDS!r}:\n"
        "    assert main(command) == 0, command\n"
    )
    done = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", "-c", code],
        cwd=tmp_path, env=env, capture_output=True,
    )  # fmt: skip
    output, errors = (text.decode("utf-8", "replace") for text in (done.stdout, done.stderr))
    assert done.returncode == 0, errors
    assert output.splitlines()[0] == locale
    own = [line for line in errors.splitlines() if "EncodingWarning" in line and "gft_lite" in line]
    assert not own
    groups = (tmp_path / "run" / "groups" / "step-000001.jsonl").read_text(encoding="utf-8")
    assert json.loads(groups.splitlines()[0])["problem"]["id"].startswith(TEXT)
    for name in ("run/recipe.yaml", "run/adapter/README.md", "evaluation/results.md",
                 "evaluation/examples.md", "report.html"):  # fmt: skip
        assert TEXT in (tmp_path / name).read_text(encoding="utf-8"), name


def calls_without_encoding(tree: ast.Module) -> Iterator[int]:
    """The lines of calls that open a text file or pipe in the locale's encoding."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        name = ast.unparse(node.func).rpartition(".")[2]
        method = isinstance(node.func, ast.Attribute)
        arguments = [ast.unparse(argument) for argument in node.args]
        if "encoding" in given or ast.unparse(node.func) in ("os.open", "webbrowser.open"):
            continue
        modes = [
            m for m in (given.get("mode"), *arguments) if re.fullmatch(r"'[rwax+bt]{1,3}'", m or "")
        ]
        text_mode = not any("b" in mode for mode in modes)
        if (
            (name in ("open", "fdopen") and text_mode)
            or (method and name == "read_text" and not arguments)
            or (method and name == "write_text" and len(arguments) < 2)
            or "True" in (given.get("text"), given.get("universal_newlines"))
        ):
            yield node.lineno


@pytest.mark.parametrize(
    "code, found",
    [("p.open()", True), ("p.open('w')", True), ("open(p, 'r')", True), ("p.read_text()", True),
     ("os.fdopen(1, 'w')", True), ("subprocess.run(c, text=True)", True), ("p.write_text(t)", True),
     ("p.open('rb')", False), ("open(p, mode='wb')", False), ("p.read_bytes()", False),
     ("p.read_text(encoding='utf-8')", False), ("subprocess.run(c)", False),
     ("write_text(t)", False)],
)  # fmt: skip
def test_the_check_below_finds(code: str, found: bool):
    assert bool(list(calls_without_encoding(ast.parse(code)))) is found


def test_every_text_file_and_pipe_has_its_encoding():
    files = [f for folder in ("gft_lite", "benchmarks") for f in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    found = {
        f"{file.relative_to(ROOT)}:{line}"
        for file in files
        for line in calls_without_encoding(ast.parse(file.read_text(encoding="utf-8")))
    }
    assert not found
