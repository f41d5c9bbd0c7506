"""The Python of the README and of the API's page, as it stands there, on a smaller lab."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
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
    assert len((tmp_path / "runs/mine/metrics.jsonl").read_text().splitlines()) == 10
