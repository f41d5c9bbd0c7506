"""Data of every wrong shape: a bad row costs that row, a bad source is the user's error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import GOOD, answers, jsonl, load

from gft_lite.cli import main
from gft_lite.utils.errors import RecipeError

CHOICE = {"problem": "1+1=", "answer": 1, "choices": ["1", "2"]}


def nested(depth: int) -> str:
    return f'{{"problem": "a", "answer": "1", "expert": {"[" * depth}"x"{"]" * depth}}}\n'


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("5\n", "not an object with columns"),
        ("null\n", "not an object with columns"),
        ('"text"\n', "not an object with columns"),
        ("{}\n", "missing column 'problem'"),
        (GOOD | {"problem": ["1+1="]}, "wrong type in column 'problem'"),
        (GOOD | {"problem": True}, "wrong type in column 'problem'"),
        (GOOD | {"answer": [[1]]}, "wrong type in column 'answer'"),
        (GOOD | {"answer": [None]}, "no answer"),
        (GOOD | {"answer": ""}, "no answer"),
        (GOOD | {"answer": float("inf")}, "no answer"),
        (GOOD | {"answer": float("-inf")}, "no answer"),
        ('{"problem": "a", "answer": 1e400}\n', "no answer"),
        (f'{{"problem": "a", "answer": {"9" * 5000}}}\n', "not valid JSON"),
        (GOOD | {"answer": "\ud800"}, "broken Unicode in column 'answer'"),
        (nested(4), "wrong type in column 'expert'"),
        (nested(700), "wrong type in column 'expert'"),
        (nested(100_000), "not valid JSON"),
        (GOOD | {"expert": [{"role": "assistant", "content": 5}]}, "wrong type in column 'expert'"),
        (GOOD | {"expert": {"text": "so 2"}}, "wrong type in column 'expert'"),
        (GOOD | {"id": [1]}, "wrong type in column 'id'"),
        (GOOD | {"id": "\udfff"}, "broken Unicode in column 'id'"),
    ],
)  # fmt: skip
def test_a_bad_row_costs_that_row_only(row, reason, tmp_path):
    good = GOOD | {"id": "x"}
    file = jsonl(tmp_path / "x.jsonl", good, row, good)
    loaded = load(file, columns={"expert": "expert", "id": "id"})
    assert loaded.skipped == {reason: 1}
    assert answers(loaded) == ["2", "2"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"choices": 5}, "wrong type in column 'choices'"),
        ({"choices": "ab"}, "wrong type in column 'choices'"),
        ({"choices": {"text": ["1", "2"]}}, "wrong type in column 'choices'"),
        ({"choices": ["1", ["2"]]}, "wrong type in column 'choices'"),
        ({"choices": ["1", None]}, "wrong type in column 'choices'"),
        ({"choices": ["1", "\ud800"]}, "broken Unicode in column 'choices'"),
        ({"answer": -1}, "no choice of that number in column 'answer'"),
        ({"answer": 2}, "no choice of that number in column 'answer'"),
        ({"answer": 10**9}, "no choice of that number in column 'answer'"),
    ],
)
def test_a_choice_that_is_none_costs_that_row_only(change, reason, tmp_path):
    file = jsonl(tmp_path / "x.jsonl", CHOICE, CHOICE | change)
    loaded = load(file, columns={"choices": "choices"})
    assert loaded.skipped == {reason: 1}
    [problem] = loaded.problems
    assert (problem.text, problem.answer) == ("1+1=\nAnswer Choices: (A) 1 (B) 2", "B")


def test_a_line_of_a_csv_with_too_many_cells_is_skipped(tmp_path):
    (tmp_path / "x.csv").write_text("problem,answer\n1+1=,2,3\n2+2=,4\nx\n")
    loaded = load(tmp_path / "x.csv")
    assert answers(loaded) == ["4"]
    assert loaded.skipped == {"more cells than columns": 1, "no answer": 1}


def test_an_error_lists_forty_columns_and_three_levels_at_most(tmp_path):
    deep = json.loads('{"a":' * 400 + "1" + "}" * 400)
    rows = GOOD | {f"c{i}": 1 for i in range(100)} | {"deep": deep}
    file = jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(RecipeError) as caught:
        load(file, columns={"expert": "zz"})
    assert "columns are: problem, answer, expert, c0," in str(caught.value)
    assert str(caught.value).endswith("c36, ....")


_text = st.text(st.characters(), max_size=5)  # Halves of surrogate pairs as well.
_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=6,
)
_row = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("problem", "answer", "expert", "choices", "id"), _value),
)
_likely = st.fixed_dictionaries(
    {"problem": _text, "answer": _value, "choices": st.lists(_text | st.integers(), max_size=3)},
    optional={"expert": _value, "id": _value},
)


@given(st.lists(_row | _likely | _value, min_size=1, max_size=4), st.booleans())
@settings(
    max_examples=150, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_any_rows_are_problems_or_counted(tmp_path, rows, choices):
    columns = {"expert": "expert", "id": "id", "choices": "choices" if choices else None}
    file = jsonl(tmp_path / "x.jsonl", *(json.dumps(row) + "\n" for row in rows))
    try:
        loaded = load(file, columns=columns)
    except RecipeError:
        return
    assert len(loaded.problems) + sum(loaded.skipped.values()) == loaded.total == len(rows)
    assert len({p.id for p in loaded.problems}) == len(loaded.problems)
    for problem in loaded.problems:
        assert problem.text.strip() and problem.answer and problem.prompt_ids
        "".join([problem.id, problem.text, problem.answer, *problem.experts]).encode()


# --- through the command line ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "overrides", "part"),
    [
        (
            GOOD | {"problem": "1+" * 3000},
            [],
            "1 with prompt too long (> 2015 tokens)",
        ),  # 2048 - 32 - 1
        (GOOD, ["rollout.max_tokens=2047"], "rollout.max_tokens: must leave room for a prompt"),
        (GOOD, ["data.max_prompt_tokens=1"], "1 with prompt too long (> 1 tokens)"),
        (GOOD | {"answer": None}, [], "data.source: must have usable rows, got 1 that are not"),
        ({"problem": "1+1=", "expert": "2"}, [], "data.columns.answer: no row has a column"),
        (GOOD | {"expert": None}, ["group.shortfall=drop"], "group: must find its demonstrations"),
        ("{\n", [], "1 with not valid JSON"),
        ("", [], "data.source: must have rows"),
    ],
)
def test_data_that_cannot_be_trained_on(row, overrides, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    jsonl(Path("x.jsonl"), row)
    own = ["data.source=x.jsonl", "data.columns.expert=expert", "group.teacher=0"]
    assert main(["train", "recipes/lab.yaml", *own, *overrides]) == 2
    errors = capsys.readouterr().err
    assert part in errors
    assert "Traceback" not in errors
    assert not Path("runs").exists()
