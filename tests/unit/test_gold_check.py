"""Gold answers against their own demonstrations, graded by the real rules."""

from __future__ import annotations

import pytest
from test_data import TOKENIZER

from gft_lite.data.gold_check import CHECKED, check_golds
from gft_lite.data.prompts import PromptFormat
from gft_lite.recipe.sections import PromptSettings
from gft_lite.rewards.base import RewardFunction
from gft_lite.rewards.scorer import Scorer
from gft_lite.types import Problem

FORMAT = PromptFormat(TOKENIZER, PromptSettings())


@pytest.fixture(scope="module")
def scorer():
    with Scorer([RewardFunction("math")], workers=1, timeout=10.0) as opened:
        yield opened


def problem(gold: str | None, *experts: str, teachers: tuple[str, ...] = ()) -> Problem:
    return Problem("p", "1+2?", gold, (1,), experts, teachers)


def test_a_gold_answer_that_no_demonstration_states_is_described(scorer):
    bad = problem("1+2=<<1+2=3>>3\n#### 3", r"It is \boxed{3}.")
    found = check_golds([bad, bad], FORMAT, scorer.score)
    assert (found.checked, found.matched) == (2, 0)
    assert found.describe() == (
        "data.columns.answer: the demonstrations of 2 of 2 problems don't state the gold answer; "
        "for example problem p, gold answer '1+2=<<1+2=3>>3\\n#### 3'. Check answer_from, the "
        "columns and reward.functions."
    )


def test_one_right_demonstration_is_enough(scorer):
    right, wrong = r"It is \boxed{3}.", r"It is \boxed{4}."
    good = problem("3", wrong, teachers=(wrong, right))
    assert check_golds([good], FORMAT, scorer.score).describe() is None
    mixed = check_golds([good, good, problem("3", wrong)], FORMAT, scorer.score)
    assert (mixed.checked, mixed.matched) == (3, 2)
    line = mixed.describe("data")
    assert line is not None and line.endswith("of 3 problems don't state the gold answer; for "
                                              "example problem p, gold answer '3'.")  # fmt: skip


def test_only_problems_with_gold_and_demonstrations_count(scorer):
    some = [problem("3"), problem(None, "3"), problem("3", r"\boxed{3}")]
    assert check_golds(some, FORMAT, scorer.score).checked == 1
    assert check_golds(some[:2], FORMAT, scorer.score).describe() is None
    many = [problem("3", r"\boxed{3}")] * (CHECKED + 5)
    assert check_golds(many, FORMAT, scorer.score).checked == CHECKED


def test_a_reward_that_does_not_decide_correctness_is_no_check():
    with Scorer([RewardFunction("format", 1.0, {"pattern": "x"})], workers=1, timeout=10.0) as own:
        assert check_golds([problem("3", "y")], FORMAT, own.score).checked == 0
