"""The experiment in examples/real: its files can be made and its recipes read."""

from __future__ import annotations

import html
import importlib.util
import re
from pathlib import Path

import pytest

from gft_lite.experiments.sweep_config import Sweep
from gft_lite.recipe.schema import Recipe

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "real"


@pytest.fixture(scope="module")
def prepare():
    spec = importlib.util.spec_from_file_location("prepare", FOLDER / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(name, count):
    # A word of its own for each: problems that differ in their numbers only are one.
    words = [f"{chr(97 + i // 26)}{chr(97 + i % 26)}" * 2 for i in range(count)]
    return [{"id": f"{name}/{w}", "problem": f"{name} {w} has {i} cows", "answer": "1", "x": 0}
            for i, w in enumerate(words)]  # fmt: skip


def test_wording_ignores_numbers_case_and_punctuation(prepare):
    assert prepare.wording("Tom\u00a0has 1,200 cows, or 3.5?") == "tom has cows or"
    assert prepare.wording("tom has 7 COWS or 2") == "tom has cows or"
    assert prepare.wording("Tom has 7 cows") != prepare.wording("Tom has 7 hens")


def test_a_wording_is_in_one_set_only(prepare):
    mawps = rows("m", 500)
    # The same problems again with other numbers, and a set that repeats those of another.
    mawps += [{**row, "problem": f"{row['problem']} 99"} for row in mawps]
    svamp = [{"id": "copy", "problem": mawps[0]["problem"], "answer": "1"}, *rows("s", 90)]
    sets = prepare.split(mawps, svamp, rows("c", 90))
    assert {name: len(found) for name, found in sets.items()} == {
        "mawps_test": 200, "mawps_tune": 80, "mawps_train": 170,
        "svamp_test": 60, "choices_test": 60,
    }  # fmt: skip
    words = [prepare.wording(row["problem"]) for found in sets.values() for row in found]
    assert len(words) == len(set(words)) == 570
    assert all(row.keys() <= set(prepare.FIELDS) for found in sets.values() for row in found)
    assert not any(row["id"] == "copy" for row in sets["svamp_test"])


def test_the_experts_solution_is_the_first_right_answer(prepare):
    row = {"id": "a", "problem": "p", "answer": "2", "teacher_model": "t"}
    taught = [
        {**row, "teacher": ["w", "r", "s"], "teacher_rewards": [0.0, 1.0, 1.0]},
        {**row, "id": "b", "teacher": ["w"], "teacher_rewards": [0.0]},
        {**row, "id": "c", "teacher": [], "teacher_rewards": []},
    ]
    kept = {"id": "a", "problem": "p", "answer": "2", "expert": "r", "teacher": ["w", "s"]}
    assert prepare.demonstrated(taught) == [kept]


def test_the_recipes_train_on_equal_trajectories():
    trials = Sweep.load(FOLDER / "methods.yaml").trials()
    recipes = {trial.recipe.method: trial.recipe for trial in trials}
    assert sorted(recipes) == ["gft", "grpo", "sft"]
    for recipe in recipes.values():
        assert recipe.group.size * recipe.train.problems_per_step == 32
        assert recipe.eval.sets["mawps"].prompt == recipe.data.prompt
    # The base is evaluated once: nothing that its evaluation depends on differs.
    sections = ("policy", "data", "reward", "rollout", "eval", "seed")
    shared = [{name: getattr(r, name) for name in sections} for r in recipes.values()]
    assert shared[0] == shared[1] == shared[2]


def test_the_teacher_is_shown_an_example_and_the_student_is_not():
    teacher = Recipe.load(FOLDER / "distill.yaml").data
    student = Recipe.load(FOLDER / "sft.yaml").data
    assert "The answer is 5." in teacher.prompt.template
    assert "The answer is 5." not in student.prompt.template
    assert teacher.source == "mawps_train.jsonl" and not teacher.columns.expert


def test_the_text_quotes_the_page():
    """Every row of the table of results stands in the report: SFT, GFT, GRPO in this order."""
    page = re.sub(r"<[^>]+>", " ", (FOLDER / "report.html").read_text(encoding="utf-8"))
    page = " ".join(html.unescape(page).split())
    text = (FOLDER / "README.md").read_text(encoding="utf-8").replace("**", "")
    table = text[text.index("| MAWPS") : text.index("- Significant")].splitlines()
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in table if line]
    assert len(rows) == 7
    for base, *trained in rows:
        assert " ".join(trained) in page
        assert " ".join([base] * 3) in page or base in ("", "0")
