"""Distillation without a server: settings, prompts, the answer store, counts, written files."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import yaml

from gft_lite.cli import main
from gft_lite.data.problems import columns_of
from gft_lite.distillation.answer_store import AnswerStore
from gft_lite.distillation.console import summary_table
from gft_lite.distillation.data_set import recipe_fragment
from gft_lite.distillation.endpoint_teacher import EndpointTeacher
from gft_lite.distillation.pipeline import find_teacher
from gft_lite.distillation.progress import Distillation, GradedResponse
from gft_lite.distillation.teachers import (
    TeacherRequest,
    TeacherResponse,
    TeacherSettings,
    prompt_settings,
)
from gft_lite.recipe.schema import Recipe
from gft_lite.types import Problem
from gft_lite.utils.chat_model import RateLimiter, parse_completion
from gft_lite.utils.errors import UserError
from gft_lite.utils.openai_client import EndpointError

PROBLEM = Problem("p", "1+1=", "2")


def request(key, prompt=()):
    return TeacherRequest(PROBLEM, prompt, 7, key)


def graded(text, right=False, finish_reason="stop", tokens=(10, 100)):
    return GradedResponse(TeacherResponse(text, finish_reason, *tokens), float(right), "ok", right)


def test_demonstrations_of_a_row_and_counts():
    """Two problems with five requests each: the second has one response, truncated and correct."""
    settings = TeacherSettings(samples=5, price_in=2, price_out=10)
    state = Distillation(settings, [request(str(i)) for i in range(10)])
    state.add({"0": graded("b"), "2": graded("a", right=True)})
    state.add({"1": graded("b"), "3": graded(" \n"), "4": graded("ab", finish_reason="length")})
    state.add({"7": graded("c", right=True, finish_reason="length", tokens=(0, 50))})
    state.asked, state.asked_tokens = 3, 250
    state.failures.update(["no answer", "no answer"])
    texts = [[g.response.text for g in state.demonstrations(i)[0]] for i in (0, 1)]
    assert texts == [["b", "a"], []]
    summary = state.summary()
    expected = {
        "problems": 2, "wanted": 10, "asked": 3, "failed": 2, "reused": 5, "answered": 6,
        "right": 2, "acceptance": 2 / 6, "problems_without_right_answer": 1, "offered": 2,
        "duplicates": 1, "truncated": 2, "empty": 1, "prompt_tokens": 50,
        "completion_tokens": 550, "cost": (50 * 2 + 550 * 10) / 1e6, "verdicts": {"ok": 6},
    }  # fmt: skip
    assert {name: summary[name] for name in expected} == expected
    cells = dict(
        zip(*(column.cells for column in summary_table(summary | _NAMES).columns), strict=True)
    )
    assert cells["right"] == "2 (33.3% of the answers)"
    assert cells["cost"] == "$0.0056"


_NAMES = {"file": "x.jsonl", "teacher": "t"}


def test_no_acceptance_without_responses_and_no_cost_without_prices():
    summary = Distillation(TeacherSettings(samples=1), [request("0")]).summary()
    assert (summary["acceptance"], summary["cost"], summary["answered"]) == (None, None, 0)
    assert "cost" not in summary_table(summary | _NAMES).columns[0].cells


def test_a_killed_writer_leaves_complete_responses(tmp_path):
    path = tmp_path / "responses.jsonl"
    whole = TeacherResponse("a\n\u2028é", "stop", 3, 4)
    AnswerStore(path).append(request("k1"), whole)
    path.write_bytes(path.read_bytes() + b'{"key": "k2", "te')
    store = AnswerStore(path)
    store.append(request("k3"), whole)
    again = AnswerStore(path)
    assert [again.get(request(k)) for k in ("k1", "k2", "k3")] == [whole, None, whole]


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"samples": "0"}, "samples: must be greater than 0, got '0'"),
        ({"samples": "x"}, "samples: must be a whole number, got 'x'"),
        ({"top_p": "1.5"}, "top_p: must be less than or equal to 1, got '1.5'"),
        ({"temperature": "0"}, "samples: must be 1 at temperature 0"),
        ({"column": "a b"}, "column: "),
        ({"price_in": "-1"}, "price_in: "),
        ({"concurrency": "0", "limit": "0"}, "limit: "),
    ],
)
def test_an_error_names_each_wrong_setting(given, error):
    with pytest.raises(UserError) as caught:
        TeacherSettings.from_tree(given)
    assert error in str(caught.value)
    assert len(caught.value.problems) == len(given)


def test_settings_from_text():
    assert TeacherSettings.from_tree({"samples": "2", "top_p": "0.9"}) == TeacherSettings(
        samples=2, top_p=0.9
    )


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            {"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}],
             "usage": {"prompt_tokens": 3, "completion_tokens": 2}},
            TeacherResponse("hi", "stop", 3, 2),
        ),
        (
            {"choices": [{"message": {"content": "hi"}, "finish_reason": "length"}]},
            TeacherResponse("hi", "length", 0, 0),
        ),
        (
            {"choices": [{"message": {"content": None}, "finish_reason": "content_filter"}],
             "usage": None},
            TeacherResponse("", "length", 0, 0),
        ),
        ({"choices": [{"message": {"content": "a\ud800b"}}]}, TeacherResponse("a?b", "stop", 0, 0)),
        *((broken, None) for broken in ("<html>", {}, {"choices": []}, {"choices": [{}]}, None)),
    ],
)  # fmt: skip
def test_completions_are_parsed(answer, expected):
    if expected is None:
        with pytest.raises(EndpointError, match="without a valid chat completion"):
            parse_completion(answer)
    else:
        assert parse_completion(answer) == expected


def test_requests_are_spaced_evenly():
    limiter = RateLimiter(3000)
    start = time.monotonic()
    for _ in range(6):
        limiter.wait()
    assert time.monotonic() - start >= 5 * 60 / 3000
    start = time.monotonic()
    time.sleep(0.05)
    for _ in range(2):  # An unused interval is not added to later ones.
        limiter.wait()
    assert time.monotonic() - start >= 0.05 + 60 / 3000


@pytest.mark.parametrize(
    ("system", "override", "turns"),
    [
        (None, None, ["Q {1}: 1+1="]),
        ("Think.", None, ["Think.", "Q {1}: 1+1="]),
        ("Think.", "Box it.", ["Box it.", "Q {1}: 1+1="]),
        ("Think.", "", ["Q {1}: 1+1="]),
    ],
)
def test_the_messages_of_a_chat(system, override, turns):
    prompt = {"style": "chat", "template": "Q {1}: {problem}", "system": system}
    recipe = Recipe.from_tree({"data": {"prompt": prompt}})
    teacher = object.__new__(EndpointTeacher)
    teacher._prompt = prompt_settings(recipe, TeacherSettings(system=override), "chat")
    messages = teacher.prompt(PROBLEM)
    assert [m["content"] for m in messages] == turns
    assert [m["role"] for m in messages] == ["system", "user"][2 - len(turns) :]
    talk = replace(PROBLEM, history=(("0+1=", "1"),), system="Be brief.")
    assert teacher.prompt(talk) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Q {1}: 0+1="},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Q {1}: 1+1="},
    ]


def test_variables_of_the_template_are_those_of_a_teacher_with_a_template():
    prompt = {"style": "chat", "chat_template_kwargs": {"enable_thinking": False}}
    recipe = Recipe.from_tree({"data": {"prompt": prompt}})
    own = [prompt_settings(recipe, TeacherSettings(), style) for style in ("chat", "plain")]
    assert [p.chat_template_kwargs for p in own] == [{"enable_thinking": False}, {}]


def test_the_fragment_keeps_the_meaning_of_the_columns(tmp_path):
    columns = {"problem": ["q", "o"], "answer": "a.b", "expert": "e", "teacher": ["t1", "teacher"]}
    recipe = Recipe.from_tree({"data": {"source": "x/y", "split": "dev", "columns": columns}})
    path = tmp_path / "x.yaml"
    path.write_text(recipe_fragment(recipe.data.columns, tmp_path / "out.jsonl", "teacher"))
    data = Recipe.load(path).data
    assert (data.source, data.shuffle) == (str(tmp_path / "out.jsonl"), False)
    assert data.columns == recipe.data.columns
    path.write_text(recipe_fragment(recipe.data.columns, tmp_path / "out.jsonl", "qwen"))
    assert Recipe.load(path).data.columns.teacher == ["t1", "teacher", "qwen"]
    lab = yaml.safe_load(
        recipe_fragment(columns_of(Recipe().data), tmp_path / "o.jsonl", "teacher")
    )
    assert lab["data"]["columns"]["expert"] == ["expert"]


@pytest.mark.parametrize(
    ("teacher", "error"),
    [
        ("nowhere/at/all", "TARGET: must be lab, a hub id"),
        ("https://me:pass@host.example/v1", "must not hold a token or a password"),
        ("http://", "must be an address"),
        ("http://[::1", "must be an address"),
        ("http://host.example/v1", "must be https, or on this machine, to be sent the key"),
        ("ftp://host.example/v1", "TARGET: must be lab, a hub id"),
    ],
)
def test_unusable_teachers(teacher, error, monkeypatch):
    monkeypatch.setenv("GFT_LITE_TEACHER_KEY", "0123456789-of-the-teacher")
    with pytest.raises(UserError) as caught:
        find_teacher(teacher, Recipe(), TeacherSettings(), print)
    assert error in str(caught.value)
    assert "pass" not in str(caught.value).replace("password", "")
    assert "0123456789" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--out", "x.csv"], "--out: must be a .jsonl or .parquet file, got 'x.csv'"),
        (["--out", "mine.jsonl"], "--out: must be a new file"),
        (["--model", "x"], "model: must be left out for 'lab'"),
        (["--samples", "0"], "samples: must be greater than 0"),
        (["rollout.engine=nothing"], "rollout.engine"),
        (["policy.model=no/such-model"], "policy.model: "),
    ],
)
def test_wrong_arguments_end_in_exit_code_2(arguments, error, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine.jsonl"
    mine.write_text("do not overwrite\n")
    assert main(["distill", "recipes/lab.yaml", "--teacher", "lab", *arguments]) == 2
    assert error in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.jsonl"]
    assert mine.read_text() == "do not overwrite\n"


def test_code_from_elsewhere_needs_allow_code(tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "x.yaml").write_text(json.dumps({"reward": {"functions": ["os:system"]}}))
    assert main(["distill", "../x.yaml", "--teacher", "lab"]) == 2
    assert "--allow-code" in capsys.readouterr().err


def test_a_teacher_s_own_code_is_never_trusted(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"r": 4}')
    (tmp_path / "adapter/adapter_model.safetensors").touch()
    trusting = {"policy": {"model": "a/b", "trust_remote_code": True, "dtype": "float32"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(trusting))
    for teacher, recipe in ((tmp_path, Recipe()), ("c/d", Recipe.from_tree(trusting))):
        found = find_teacher(str(teacher), recipe, TeacherSettings(), print)._target.policy
        assert not found.trust_remote_code
        assert (found.model, found.dtype) == (("a/b" if teacher == tmp_path else "c/d"), "float32")
