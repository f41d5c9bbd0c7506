"""Columns of conversations: messages, ShareGPT's, TRL's prompt and completion; and bad ones."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import GSM8K, TOKENIZER, jsonl
from test_prompts import CHATML, byte_tokenizer
from trl import apply_chat_template as trl_apply

from gft_lite.data.problems import load_problems, split_holdout
from gft_lite.data.prompts import PromptFormat
from gft_lite.recipe.sections import DataSettings
from gft_lite.types import Group, Problem, Response, ScoredGroup
from gft_lite.utils.errors import RecipeError

CHAT = byte_tokenizer(CHATML)
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And 2+2?"},
    {"role": "assistant", "content": "It is 4."},
]
MESSAGES = [SYSTEM, *TURNS]
PROMPT = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
    "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\nAnd 2+2?<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def load(source: Path, tokenizer=CHAT, *, style: str = "chat", prompt=(), limit=None, **given):
    prompt = {"style": style, **dict(prompt)}
    data = DataSettings(source=str(source), prompt=prompt, **({"shuffle": False} | given))
    format = PromptFormat(tokenizer, data.prompt)
    return load_problems(data, format, max_response_tokens=limit)


def only(tmp_path: Path, row: dict, **given) -> Problem:
    [problem] = load(jsonl(tmp_path / "x.jsonl", row), **given).problems
    return problem


SHAREGPT = [
    {"from": name, "value": message["content"]}
    for name, message in zip(("system", "human", "gpt", "human", "gpt"), MESSAGES, strict=True)
]
PARTS = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]
NULLS = [m | {"tool_calls": None, "name": None} for m in MESSAGES]  # as Arrow fills columns


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"messages": MESSAGES}, {}),
        ({"messages": MESSAGES, "prompt": "1+1?", "prompt_id": "a"}, {}),  # as UltraChat's
        ({"messages": PARTS}, {}),
        ({"messages": NULLS}, {}),
        ({"messages": [MESSAGES[0] | {"role": "developer"}, *TURNS]}, {}),
        ({"conversations": SHAREGPT}, {}),
        ({"messages": json.dumps(MESSAGES)}, {}),
        ({"messages": str(MESSAGES)}, {}),
        ({"talk": MESSAGES}, {"messages": "talk"}),
        ({"row": {"talk": MESSAGES}, "problem": "no"}, {"messages": "row.talk"}),
        ({"prompt": MESSAGES[:-1], "completion": MESSAGES[-1:]}, {}),
        ({"prompt": MESSAGES[:-1], "completion": "It is 4."}, {}),
        ({"prompt": MESSAGES[:-1], "chosen": MESSAGES[-1:], "rejected": MESSAGES[-1:]}, {}),
        ({"chosen": MESSAGES, "rejected": MESSAGES[:-1]}, {}),
        ({"prompt": json.dumps(MESSAGES[:-1]), "completion": json.dumps(MESSAGES[-1:])}, {}),
        ({"q": MESSAGES[:-1], "a": MESSAGES[-1:]}, {"problem": "q", "expert": "a"}),
    ],
)  # fmt: skip
def test_every_form_of_a_conversation_is_the_same_problem(tmp_path, row, columns):
    columns = {**columns, "answer": None}
    problem = only(tmp_path, row, columns=columns)
    assert (problem.text, problem.system) == ("And 2+2?", "Be brief.")
    assert problem.history == (("1+1?", "2"),)
    assert problem.experts == ("It is 4.",) and problem.teachers == ()
    assert CHAT.decode(problem.prompt_ids) == PROMPT
    assert problem.messages == MESSAGES[:-1]
    assert problem.columns == row


@pytest.mark.parametrize("columns", [{}, {"answer": "answer"}])
def test_prompt_and_completion_may_be_texts_in_either_style(tmp_path, columns):
    row = {"prompt": "2+2?", "completion": " 4", "answer": 4}
    for style in ("plain", "chat"):
        problem = only(tmp_path, row, style=style, columns=columns)
        assert (problem.text, problem.answer, problem.experts) == ("2+2?", "4", (" 4",))
    assert only(tmp_path, {"prompt": "2+2?"}).experts == ()


def test_a_conversation_without_an_answer_at_its_end_has_no_demonstration(tmp_path):
    problem = only(tmp_path, {"messages": MESSAGES[:-1]})
    assert problem.experts == () and CHAT.decode(problem.prompt_ids) == PROMPT
    first = only(tmp_path, {"messages": TURNS[:1]})
    assert (first.text, first.history, first.system, first.experts) == ("1+1?", (), None, ())


def test_the_columns_that_were_found_are_named_and_kept(tmp_path):
    loaded = load(jsonl(tmp_path / "x.jsonl", {"messages": MESSAGES}))
    assert (loaded.columns.messages, loaded.columns.answer) == ("messages", None)
    assert loaded.notes == (
        "data.columns: messages: 'messages', answer: null, found by their names",
    )
    row = {"prompt": MESSAGES[:-1], "completion": MESSAGES[-1:], "answer": "4"}
    loaded = load(jsonl(tmp_path / "x.jsonl", row))
    assert loaded.notes == (
        "data.columns: problem: 'prompt', expert: ['completion'], found by their names",
    )
    assert loaded.problems[0].answer == "4"
    again = load(tmp_path / "x.jsonl", columns=loaded.columns)  # As a distilled data set has them.
    assert again.problems == loaded.problems and again.notes == ()


def test_columns_that_a_recipe_names_are_not_replaced(tmp_path):
    row = {"messages": MESSAGES, "problem": "1+2", "answer": "3", "question": "1+3"}
    path = jsonl(tmp_path / "x.jsonl", row)
    assert load(path).problems[0].text == "1+2"
    assert load(path, columns={"problem": "question"}).problems[0].text == "1+3"
    with pytest.raises(RecipeError, match=r"columns\.problem: no row has a column 'problem'"):
        load(jsonl(tmp_path / "y.jsonl", {"messages": MESSAGES}), columns={"teacher": "messages"})


def test_the_answer_comes_from_its_own_column(tmp_path):
    rows = [{"messages": MESSAGES, "gold": "#### 4"}, {"messages": MESSAGES}]
    columns = {"answer": "gold", "answer_from": "hash"}
    loaded = load(jsonl(tmp_path / "x.jsonl", *rows), columns=columns)
    assert [p.answer for p in loaded.problems] == ["4"]
    assert loaded.skipped == {"missing column 'gold'": 1}


def test_parquet_and_csv_have_conversations_too(tmp_path):
    rows = [{"messages": MESSAGES}, {"messages": TURNS}]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], *([json.dumps(r["messages"])] for r in rows)])
    for name in ("x.parquet", "x.csv"):
        first, second = load(tmp_path / name).problems
        assert (first.messages, second.messages) == (MESSAGES[:-1], TURNS[:-1])


def test_a_demonstration_is_cleaned_and_thoughts_of_their_own_field_are_part_of_it(tmp_path):
    answer = {
        "role": "assistant",
        "content": "2+2=<<2+2=4>>4\n#### 4",
        "reasoning_content": " so\n",
    }
    problem = only(tmp_path, {"messages": [TURNS[0], answer]}, columns={"clean": "gsm8k"})
    assert problem.experts == ("<think>\nso\n</think>\n\n2+2=4\nThe final answer is $\\boxed{4}$.",)


def test_the_prompt_settings_apply_to_a_conversation(tmp_path):
    prompt = {"template": "Q: {problem}", "system": "Think."}
    texts = [
        CHAT.decode(only(tmp_path, {"messages": m}, prompt=prompt).prompt_ids)
        for m in (MESSAGES[:-1], TURNS[:-1])
    ]
    asked = PROMPT.replace("1+1?", "Q: 1+1?").replace("And 2+2?", "Q: And 2+2?")
    assert texts == [asked, asked.replace("Be brief.", "Think.")]


# --- rows that can't be used -----------------------------------------------------------------

USER, ASSISTANT = TURNS[:2]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hello", "no list of messages"),
        (None, "no list of messages"),
        ([], "no list of messages"),
        ({"role": "user", "content": "x"}, "no list of messages"),
        (["hello"], "a message without role or content"),
        ([USER, {"role": "assistant"}], "a message without role or content"),
        ([USER, CALL], "tool calls"),
        ([USER, ASSISTANT | {"function_call": {"name": "f"}}], "tool calls"),
        ([USER, {"role": "tool", "content": "4"}],
         "a role other than system, user and assistant ('tool')"),
        ([USER, {"role": 5, "content": "4"}],
         "a role other than system, user and assistant (another kind)"),
        ([USER, ASSISTANT | {"content": " \n"}], "an empty message"),
        ([USER, ASSISTANT | {"content": None}], "an empty message"),
        ([USER, ASSISTANT | {"content": []}], "an empty message"),
        ([USER | {"content": 5}], "a message that is not text"),
        ([USER | {"content": [{"type": "image", "url": "x"}]}], "a message that is not text"),
        ([USER | {"content": ["x"]}], "a message that is not text"),
        ([USER | {"content": "\ud800"}], "broken Unicode"),
        ([ASSISTANT, USER], "a conversation that the assistant begins"),
        ([SYSTEM, ASSISTANT], "a conversation that the assistant begins"),
        ([USER, ASSISTANT, ASSISTANT], "two assistant turns in a row"),
        ([USER, USER, ASSISTANT], "two user turns in a row"),
        ([USER, SYSTEM, ASSISTANT], "a system message that is not the first"),
        ([SYSTEM, SYSTEM, USER], "a system message that is not the first"),
        ([SYSTEM], "no user turn"),
    ],
)  # fmt: skip
def test_a_bad_conversation_is_skipped_alone(tmp_path, messages, reason):
    rows = [{"messages": m} for m in (MESSAGES, messages, TURNS)]
    loaded = load(jsonl(tmp_path / "x.jsonl", *rows))
    assert loaded.skipped == {f"{reason} in column 'messages'": 1}
    assert [p.experts for p in loaded.problems] == [("It is 4.",)] * 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": MESSAGES}, "a prompt that ends with an assistant turn in column 'prompt'"),
        ({"completion": [ASSISTANT, *TURNS[2:]]}, "several turns in column 'completion'"),
        ({"completion": [CALL]}, "tool calls in column 'completion'"),
        ({"completion": [ASSISTANT | {"content": ""}]}, "an empty message in column 'completion'"),
        ({"completion": 5}, "wrong type in column 'completion'"),
    ],
)
def test_a_bad_prompt_or_completion_is_skipped_alone(tmp_path, row, reason):
    good = {"prompt": MESSAGES[:-1], "completion": MESSAGES[-1:]}
    loaded = load(jsonl(tmp_path / "x.jsonl", good, good | row))
    assert loaded.skipped == {reason: 1} and len(loaded.problems) == 1


@pytest.mark.parametrize("row", [{"messages": TURNS}, {"prompt": TURNS[:3]}])
def test_a_conversation_in_plain_style_is_one_error(tmp_path, row):
    file = jsonl(tmp_path / "x.jsonl", row)
    [name] = row
    with pytest.raises(RecipeError) as caught:
        load(file, TOKENIZER, style="plain")
    assert caught.value.problems == [
        f"data.prompt.style: must be chat for the conversations in column {name!r}, got 'plain'."
    ]


def test_a_text_that_looks_like_a_list_is_a_problem_in_plain_style(tmp_path):
    for text in ('["a", b]', "[{1, 2}]", "[1, 2]"):
        row = {"problem": text, "answer": "1"}
        assert only(tmp_path, row, tokenizer=TOKENIZER, style="plain").text == text


def test_a_template_that_changes_a_conversation_skips_it_alone(tmp_path):
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}"
    last_turn = CHATML.replace("in messages", "in messages[-2:]")
    file = jsonl(tmp_path / "x.jsonl", *({"messages": m} for m in (MESSAGES, TURNS, TURNS[:2])))
    loaded = load(file, byte_tokenizer(no_system + CHATML))
    assert loaded.skipped == {"a system message, which the chat template can't have": 1}
    loaded = load(file, byte_tokenizer(last_turn))
    assert [len(p.history) for p in loaded.problems] == [0]
    assert "earlier turns that the chat template changes" in loaded.skipped


def test_a_demonstration_that_is_written_otherwise_after_more_turns_is_left_out(tmp_path):
    # The end of an answer depends on the number of turns, as in no known template.
    end = "('*' if loop.last and loop.index > 3 and m.role == 'assistant' else '')"
    odd = CHATML.replace("m.content +", f"m.content + {end} +")
    file = jsonl(tmp_path / "x.jsonl", {"messages": TURNS}, {"messages": TURNS[:2]})
    loaded = load(file, byte_tokenizer(odd), limit=99)
    assert [p.experts for p in loaded.problems] == [(), ("2",)]
    assert loaded.unusable_demonstrations == {
        "an end of the conversation that the chat template writes otherwise": 1
    }


def test_messages_exclude_other_columns_of_problems():
    for other in ({"problem": "q"}, {"choices": "c"}):
        with pytest.raises(ValueError, match="messages: must be null with columns"):
            DataSettings(columns={"messages": "m", **other})


# --- identity --------------------------------------------------------------------------------


def test_a_problem_is_its_whole_conversation(tmp_path):
    others = [MESSAGES, TURNS, [*MESSAGES[:1], USER, ASSISTANT | {"content": "two"}, *TURNS[2:]]]
    rows = [{"messages": m} for m in [*others, *others]]
    problems = load(jsonl(tmp_path / "x.jsonl", *rows)).problems
    assert len({p.text for p in problems}) == 1
    train, held = split_holdout([*problems, Problem("z", "z", None), Problem("y", "y", None)], 1)
    assert len(held) == 1 and len(train) == 6  # Both copies of the one held out are gone.
    spaced = [USER | {"content": " 1+1? "}, *TURNS[1:]]
    same = load(jsonl(tmp_path / "y.jsonl", {"messages": TURNS}, {"messages": spaced})).problems
    assert [len(part) for part in split_holdout([*same, *problems[:1]] * 2, 1)] == [6, 0]


def test_the_fingerprint_sees_every_turn(tmp_path):
    prints = {
        load(jsonl(tmp_path / "x.jsonl", {"messages": m})).fingerprint()
        for m in (MESSAGES, TURNS, [SYSTEM, *TURNS[2:]], TURNS[2:])
    }
    assert len(prints) == 4


def test_files_keep_the_conversation_of_a_problem():
    problem = Problem("a", "2+2", "4", history=(("1+1", "2"),), system="Be brief.")
    entry = json.loads(json.dumps(problem.to_json()))
    assert Problem.from_json(entry) == problem
    plain = Problem("a", "2+2", None)
    assert plain.to_json() == {"id": "a", "text": "2+2", "answer": None}
    assert Problem.from_json(plain.to_json()) == plain


def test_the_groups_of_a_run_keep_the_conversation(tmp_path):
    from gft_lite.runs.folder import RunFolder

    problem = Problem("a", "2+2", "4", history=(("1+1", "2"),))
    group = Group(problem, (Response((1,), "4", "self", reward=1.0),))
    RunFolder(tmp_path).write_groups(1, [ScoredGroup(group, (0.0,))])
    [found] = RunFolder(tmp_path).groups(1)
    assert Problem.from_json(found["problem"]) == problem


# --- against transformers and TRL ------------------------------------------------------------


def test_rows_of_gsm8k_as_conversations_equal_the_template_and_trl(tmp_path):
    if not GSM8K.is_file():
        pytest.skip(f"{GSM8K} is not here")
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()[:120]]
    talks = []
    for start in range(0, len(rows), 3):
        taken = rows[start : start + 1 + start // 3 % 3]
        turns = [m for row in taken for m in ({"role": "user", "content": row["problem"]},
                 {"role": "assistant", "content": row["solution"]})]  # fmt: skip
        talks.append([SYSTEM, *turns] if start % 2 else turns)
    loaded = load(jsonl(tmp_path / "x.jsonl", *({"messages": m} for m in talks)))
    format = PromptFormat(CHAT, DataSettings(prompt={"style": "chat"}).prompt)
    for problem, messages in zip(loaded.problems, talks, strict=True):
        ids = [*problem.prompt_ids, *format.response_ids(problem.experts[0])[0]]
        own = CHAT.apply_chat_template(messages, return_dict=False)
        assert ids == own[: len(ids)] and CHAT.decode(own[len(ids) :]) == "\n"
        theirs = trl_apply({"prompt": messages[:-1], "completion": messages[-1:]}, CHAT)
        assert CHAT.decode(problem.prompt_ids) == theirs["prompt"]
        assert format.response_text(problem.experts[0]) + "\n" == theirs["completion"]


# --- anything --------------------------------------------------------------------------------

_text = st.text(st.characters(), max_size=4)
_content = _text | st.none() | st.integers() | st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "image"]), "text": _text}) | _text,
    max_size=2,
)  # fmt: skip
_role = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", None, 3])
_message = (
    st.fixed_dictionaries(
        {"role": _role, "content": _content},
        optional={"tool_calls": st.none() | st.lists(st.just({})), "reasoning_content": _content},
    )
    | st.fixed_dictionaries({"from": _role, "value": _content})
    | _content
)
_regular = st.lists(_text.filter(str.strip), min_size=1, max_size=5).map(
    lambda texts: [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)
    ]
)
_talk = _regular | st.lists(_message, max_size=4) | _content
_row = st.fixed_dictionaries({"messages": _talk}) | st.fixed_dictionaries(
    {"prompt": _talk}, optional={"completion": _talk}
)


@given(st.lists(_row, min_size=1, max_size=4), st.booleans())
@settings(
    max_examples=150, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_any_conversations_are_problems_or_counted(tmp_path, rows, named):
    columns = {"messages": "messages"} if named else {}
    file = jsonl(tmp_path / "x.jsonl", *(json.dumps(row) + "\n" for row in rows))
    try:
        loaded = load(file, columns={**columns, "answer": None})
    except RecipeError as error:
        assert all(line.startswith("data.") and line.isprintable() for line in error.problems)
        return
    assert len(loaded.problems) + sum(loaded.skipped.values()) == loaded.total == len(rows)
    for problem in loaded.problems:
        roles = [m["role"] for m in problem.messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == (["user", "assistant"] * len(turns))[: len(turns)] and turns[-1] == "user"
        assert all(m["content"].strip() for m in problem.messages) and problem.prompt_ids
        prompt = CHAT.decode(problem.prompt_ids)
        assert all(m["content"] in prompt for m in problem.messages)
        assert Problem.from_json(problem.to_json()).messages == problem.messages


@given(_regular, st.booleans())
@settings(
    max_examples=100, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_any_regular_conversation_is_read_whole(tmp_path, messages, with_system):
    messages = [SYSTEM, *messages] if with_system else messages
    try:
        json.dumps(messages, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    [problem] = load(jsonl(tmp_path / "x.jsonl", {"messages": messages})).problems
    demonstrations = [{"role": "assistant", "content": text} for text in problem.experts]
    assert [*problem.messages, *demonstrations] == messages
