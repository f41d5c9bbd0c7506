"""The Python of the README and of the API's page, as it stands there, on a smaller lab."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from gft_lite.recipe.effects import leaves

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs" / "site"))

import generate  # noqa: E402

SMALL = f"""
extends: [{ROOT}/recipes/lab.yaml]
data: {{problems: 40, holdout: 4}}
train: {{problems_per_step: 1}}
monitor: {{every: 10, problems: 2}}
eval: {{samples: 1, k: [1], sets: {{test: {{problems: 4}}, retention: {{problems: 2}}}}}}
"""


def _python(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_python_of_readme_and_reference_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "lab.yaml").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    [readme], [training, reading] = _python("README.md"), _python("docs/reference/python.md")
    code = [line.partition("#")[0].rstrip() for line in training.splitlines()]
    assert code == readme.splitlines()
    exec(compile(readme, "README.md", "exec"), {})
    exec(compile(reading, "python.md", "exec"), {})
    shown = capsys.readouterr().out
    assert "pass@1" in shown and "reward/self" in shown and "reverse_k3" in shown
    steps = (tmp_path / "runs/mine/metrics.jsonl").read_text().splitlines()
    assert len(steps) == 10
    _check_meanings("metrics.jsonl", *map(json.loads, steps))
    _check_meanings("summary.json", json.loads((tmp_path / "runs/mine/summary.json").read_text()))


def _check_meanings(file, *values):
    """Every number that a real run wrote is in the reference of metrics."""
    # Names of leaves are joined by dots, which no key has within it.
    keys = {
        name.replace(".", "/") for value in values for name, leaf in leaves(value) if leaf != {}
    }
    assert len(keys) > 20
    assert [key for key in sorted(keys) if not generate.has_meaning(file, key)] == []
