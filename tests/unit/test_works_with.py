"""TRL's rows and reward functions as they are; each line of the page "works with" has a test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_conversations import CHAT, MESSAGES, load
from test_data import jsonl
from trl import apply_chat_template
from trl.rewards import accuracy_reward

from gft_lite.rewards.base import RewardFunction
from gft_lite.rewards.scorer import Scorer
from gft_lite.types import Group, Response

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "works_with.md"
ASK = [{"role": "user", "content": "1+1?"}]
ANSWER = [{"role": "assistant", "content": "2"}]


def test_each_line_names_its_test():
    rows = re.findall(r"^\| (.+) \| (.+) \| (.+) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    unnamed = [name for name, _, test in rows if not re.search(r"`tests/\S+\.py::\w+`", test)]
    assert len(rows) > 15 and unnamed == ["program", "Unsloth"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASK},
        {"prompt": ASK, "completion": ANSWER},
        {"messages": MESSAGES},
        {"prompt": MESSAGES[:-1], "completion": MESSAGES[-1:]},
        {"prompt": ASK, "chosen": ANSWER, "rejected": [{"role": "assistant", "content": "3"}]},
    ],
)
def test_conversations_in_trls_forms_have_the_text_that_trl_makes_of_them(row, tmp_path):
    [problem] = load(jsonl(tmp_path / "rows.jsonl", row)).problems
    if messages := row.get("messages"):
        row = {"prompt": messages[:-1], "completion": messages[-1:]}
    theirs = apply_chat_template(row, CHAT)
    assert CHAT.decode(problem.prompt_ids) == theirs["prompt"]
    completion = theirs.get("completion", theirs.get("chosen"))
    assert [f"{text}<|im_end|>\n" for text in problem.experts] == [completion] * bool(completion)


def test_a_reward_function_of_trl_scores_rows_of_trl(tmp_path):
    rows = [{"prompt": ASK, "solution": s} for s in (r"$\frac{1}{2}$", "no formula")]
    data = load(jsonl(tmp_path / "rows.jsonl", *rows))
    texts = [r"<think>half</think> \boxed{0.5}", r"\boxed{0.4}"]
    groups = [
        Group(problem, tuple(Response((7,), text, "self") for text in texts))
        for problem in data.problems
    ]
    functions = [
        RewardFunction("trl.rewards:accuracy_reward"),
        RewardFunction("trl.rewards:think_format_reward", 0.25),
    ]
    with Scorer(functions, conversational=True) as scorer:
        right, unknown = scorer.score(groups)
    assert [r.reward for r in right] == [1.25, 0.0]
    assert [r.reward for r in unknown] == [0.25, 0.0]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    for scored, row in zip((right, unknown), rows, strict=True):
        expected = accuracy_reward(completions, [row["solution"]] * 2)
        assert [r.reward_parts.get("trl.rewards:accuracy_reward") for r in scored] == expected
