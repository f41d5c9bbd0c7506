# ruff: noqa: RUF001 - models write full-width characters
"""The built-in rules, called directly: extraction, mathematics, choice, exact, format."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from gft_lite.rewards.base import Grade, RewardError, RewardFunction
from gft_lite.rewards.choice_rule import LETTERS
from gft_lite.rewards.extract import boxes, last_number, stated_answer
from gft_lite.rewards.math_rule import compare, make, too_costly
from gft_lite.rewards.registry import make_rule

math = make()
choice = make_rule(RewardFunction("choice"))


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"First \boxed{3}. " + "Redo it carefully from the start. " * 3 + r"\boxed{5}", "5"),
        (r"either $\boxed{3}$ or $\boxed{5}$", "3, 5"),
        (r"\boxed{1}, \boxed{2}, \boxed{3} or \boxed{4}", "1, 2, 3, 4"),
        (r"$x=\boxed{7}$ and $x=\boxed{-7}$", "7, -7"),
        (r"\boxed{9}. So again \boxed{9}", "9"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\{1, \frac{1}{2}\}}", r"\{1, \frac{1}{2}\}"),
        (r"\fbox {4}", "4"),
        (r"\boxed 42", "42"),
        (r"\boxed{4} and then \boxed{", "4"),
        ("The answer is 3.5. I hope so.", "3.5"),
        ("**Final Answer:** 42", "42"),
        ("The answer is: $\\frac{3}{4}$, clearly", r"\frac{3}{4}"),
        ("The answer is $18 per day.", "$18 per day"),
        ("所以答案是 42。", "42"),
        ("答案是１，０００，谢谢。", "１，０００"),
        ("The answer is （−∞，−2］。", "（−∞，−2］"),
        ("She has <<1+2=3>>3.\n#### 1,234", "1,234"),
        ("#### Step 1\nthe answer is 4", "4"),
        ("#### Step 1\nwe get 4", None),
        (r"The answer is \boxed{4", None),
        ("<think>2*3</think><answer>6</answer>", "6"),
        ("<answer>\n 6 \n</answer>", "6"),
        (r"<answer>so $\boxed{6}$</answer>", "6"),
        ("<answer>The answer is 6.</answer>", "6"),
        ("<Answer>x = 5</Answer> done", "x = 5"),
        (r"<think>\boxed{5}? No, let us check.</think><answer>6</answer>", "6"),
        (r"<answer>5</answer> That was wrong, let us try again: \boxed{6}", "6"),
        ("<answer>5</answer> or <answer>6</answer>", "5, 6"),
        (r"<answer>5</answer> or \boxed{6}", "5, 6"),
        ("<answer>5</answer> The answer is 6.", "5"),
        ("<answer></answer> The answer is 6.", "6"),
        ("<answer>6", None),
        ("6</answer>", None),
        ("x = 42", None),
        ("", None),
    ],
)
def test_stated_answer(text, answer):
    assert stated_answer(text) == answer


def test_boxes_are_found_in_linear_time():
    start = time.process_time()  # a guard against hangs, in CPU time
    assert boxes(r"\boxed{" * 50_000) == []
    assert len(boxes(r"\boxed{1}" * 20_000)) == 20_000
    assert len(boxes(r"\boxed{" * 20_000 + "7" + "}" * 20_000)) == 1
    assert stated_answer("answer " * 50_000) is None
    assert stated_answer("<answer>" * 50_000) is None
    assert stated_answer("<answer>1</answer>" * 20_000) == "1"
    assert stated_answer(r"<answer>\boxed{1}</answer>" * 20_000) == "1"
    assert time.process_time() - start < 60


@pytest.mark.parametrize(
    ("stated", "gold", "right"),
    [
        (r"\frac{6}{8}", "0.75", True),
        ("0.3", r"\frac{1}{3}", False),
        ("25", r"25\%", True),
        ("0.25", r"25\%", True),
        ("25", "0.25", False),
        (r"\$1,800.00", "1800", True),
        ("109891", "109890", False),
        (r"12\text{ cm}^2", "12", True),
        ("12 inches", r"12 \text{ feet}", True),  # units are ignored
        ("5x", "5", False),
        (r"2\frac{1}{2}", r"\frac{5}{2}", True),
        (r"\frac{21}{2}", r"2\frac{1}{2}", False),
        ("6.63e-34", r"6.63 \times 10^{-34}", True),
        (r"9.11\times 10^{-31}", "6.63e-34", False),
        (r"3\pi \times 10^{-31}", r"2.9\pi \times 10^{-31}", False),
        ("[2,5)", "(2,5)", False),
        (r"2 \leqslant x < 5", "[2,5)", True),
        ("3<x", "x>3", True),
        ("(2,1)", "(1,2)", False),
        ("-7,7", "7,-7", True),
        ("515", "5,15", False),
        ("y=3+2x", "y=2x+3", True),
        ("c+b+a", "a + b + c", True),
        (r"-x^5+1", r"1 - x^5", True),
        (r"\sqrt{12}", r"2\sqrt{3}", True),
        (r"\text{East}", "east", True),
        ("Evelny", r"\text{Evelyn}", False),
        ("4:30 PM", r"\text{4:30 p.m.}", True),
        (r"4:30\text{ a.m.}", r"\text{4:30 p.m.}", False),
        ("6:4", "3:2", True),
        ("2:3", "3:2", False),
        ("1011_{2}", "1011_2", True),
        ("1011_3", "1011_2", False),
    ],
)
def test_mathematical_equality(stated, gold, right):
    assert compare(stated, gold).score == right


def test_math_verdicts():
    assert math(r"\boxed{5}", "5") == Grade(1.0, "ok")
    assert math("no idea", "5") == Grade(0.0, "no_answer")
    assert math(r"\boxed{9^{9^{9^9}}}", "5") == Grade(0.0, "unparsed")
    assert math(r"\boxed{\frac{1}{}}", "x^2") == Grade(0.0, "unparsed")
    assert math(r"\boxed{5}", None) == Grade(0.0, "error")
    assert math("it is 4 or 5", "5") == Grade(0.0, "no_answer")
    assert make(last_number=True)("it is 4 or 5", "5") == Grade(1.0, "ok")
    assert last_number("1 then -2.5 end") == "-2.5"


def test_math_grades_choice_rows_by_letter():
    assert math("The answer is (B).", "B", "choice").score == 1
    assert math("The answer is (C).", "B", "choice").score == 0


@pytest.mark.parametrize(
    "answer",
    ["9^{9^{9}}", "9^9^9",
     "2^{1000000}", "100000!", "(10^{10})!", "((9!)!)!", "(" * 61, "1" * 60, "{" * 12,
     r"\frac{1}{" * 41, r"\binom{100000}{50000}", "x" * 1201],
)  # fmt: skip
def test_explosive_answers_are_too_costly(answer):
    assert too_costly(answer)


@pytest.mark.parametrize(
    "answer",
    ["e^{x^2}", "x^{11}+10x^9+7x^8", r"(2^{k})^{2}", "2^{2010}", r"\frac{d!}{2k(d-k)!}",
     r"30^\circ, 50^\circ, 54^\circ", r"\sqrt{x^2+y^2+z^2}"],
)  # fmt: skip
def test_ordinary_answers_are_not_too_costly(answer):
    assert not too_costly(answer)


@pytest.mark.parametrize(
    "text",
    ["\x00\x00", "{" * 100_000, "}" * 100_000, "a" * 100_000, "1" * 100_000, "^" * 100_000,
     r"\boxed{" + "x" * 100_000 + "}", r"\boxed{" + "^}" * 600 + "!}", "answer is " * 20_000,
     "The answer is" + " " * 100_000, "The answer is A" + ",or" * 30_000, "answer" + "*" * 100_000,
     r"\boxed{" + r"\text{" * 10_000 + "}" * 10_001, "B " * 50_000, "(B" * 50_000,
     r"\[" * 50_000, "\ud800", r"\boxed{\ud800}", "\\boxed{" + "\\" * 500 + "}"],
)  # fmt: skip
def test_pathological_texts_score_zero_quickly(text):
    start = time.process_time()
    assert math(text, "5").score == 0
    assert choice(text, "B").score == 0
    assert time.process_time() - start < 60  # a guard against hangs, in CPU time


def test_model_text_is_never_executed(tmp_path):
    for code in ("__import__('pathlib').Path('{0}').touch()", "open('{0}','w')"):
        target = tmp_path / "executed"
        text = code.format(target)
        for wrapped in (text, rf"\text{{{text}}}", text.replace("_", r"\_"), f"x={text}"):
            math(rf"\boxed{{{wrapped}}}", "5")
            math(rf"\boxed{{{wrapped}}}", "x^2+1")
        assert not target.exists()


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (B).", "B"),
        (r"$\boxed{\textbf{(B)}\ 12}$", "B"),
        (r"\boxed{b}", "B"),
        ("B. 12", "B"),
        ("**Answer:** B", "B"),
        ("A is wrong and B is wrong. The correct choice is C.", "C"),
        ("A train moves, hence the answer is D.", "D"),
        ("故选 C。", "C"),
        ("Thinking it through...\n\nD", "D"),
        (r"\boxed{A}. Option B would need x=2", "A"),
        (r"\boxed{A} or \boxed{B}", None),
        (r"\boxed{A, B}", None),
        ("The answer is A or B.", None),
        ("I cannot decide between A, B, C and D.", None),
        ("<answer>G</answer>", "G"),
        ("<answer>(J) 12 m</answer>", "J"),
        ("The answer is (B). No, the answer is (G).", "G"),
        ("The answer is B or G.", None),
        ("The answer is I.", "I"),
        ("Option I is correct.", "I"),
        ("The answer is I think B.", None),
        ("I am not sure", None),
        ("The answer is I’d say B.", None),
        ("The answer is [A] or [B].", None),
        ("The answer is `A`, `B`", None),
        (r"so $\boxed{x = 5}$. The answer is B.", "B"),
        (r"\boxed{a + b}", None),
        ("The answer is a train.", None),
        ("A train goes", None),
    ],
)
def test_choice_letter(text, letter):
    verdicts = {gold: choice(text, gold) for gold in LETTERS}
    assert {gold for gold, grade in verdicts.items() if grade.score} == ({letter} - {None})
    if letter is None:
        assert verdicts["A"].verdict == "no_answer"


@pytest.mark.parametrize(
    "text",
    ["(X) 12 m", "X", "X. 12 m", "The answer is X: 12 m", r"\boxed{X. 12 m}", r"\boxed{X}",
     "The correct option is (X).", "I choose X.", "**Answer:** X", "故选 X。", "So\n\nX",
     "[X]", "【X】", "（X）", "The answer is [X].", "The answer is `X`.", "答案是【X】", "So\n[X]"],
)  # fmt: skip
def test_every_letter_is_a_choice(text):
    for letter, other in zip(LETTERS, LETTERS[1:] + "A", strict=True):
        assert choice(text.replace("X", letter), letter).score == 1
        assert choice(text.replace("X", letter), other) == Grade(0.0, "ok")


def test_choice_with_a_text_answer():
    assert choice(r"\boxed{Baseball team}", "baseball team").score == 1
    assert choice("The answer is yes.", "yes").score == 1
    assert choice(r"\boxed{yes} or \boxed{no}", "yes").score == 0
    assert choice("yes", "yes").verdict == "no_answer"


def test_exact_compares_what_follows_the_last_marker():
    rule = make_rule(RewardFunction("exact", parameters={"marker": "#"}))
    assert rule("1+1 # 3 # 2 ", "2", None) == Grade(1.0, "ok")
    assert rule("1+1 # 3", "2", None) == Grade(0.0, "ok")
    assert rule("# 2.0", "2", None) == Grade(0.0, "ok")
    assert rule("2", "2", None) == Grade(0.0, "no_answer")
    assert rule("# 2", None, None).verdict == "error"
    assert make_rule(RewardFunction("exact"))("so\n#### 2", "2", None).score == 1


def test_format_matches_the_whole_response():
    default = make_rule(RewardFunction("format"))
    assert default(r"So \boxed{\frac{1}{2}}.", None, None).score == 1
    assert default(r"\boxed{1} and \boxed{2}", None, None).score == 0
    assert default(r"\boxed{1", None, None).score == 0
    think = make_rule(RewardFunction("format", parameters={"pattern": r"<think>.*</think>.+"}))
    assert think("<think>\na\nb</think>c", None, None).score == 1
    assert think("x<think>a</think>c", None, None).score == 0


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("mth", {}, "Did you mean 'math'"),
        ("math", {"last_nmber": True}, "last_nmber"),
        ("format", {"pattern": "("}, "regular expression"),
        ("exact", {"marker": ""}, "non-empty string"),
    ],
)
def test_wrong_names_and_parameters(name, parameters, message):
    with pytest.raises(RewardError, match=message):
        make_rule(RewardFunction(name, parameters=parameters))


def test_real_solutions_score_one(shared_data):
    random.seed(0)
    for name in ("gsm8k_train", "math_train"):
        usable = [r for r in rows(shared_data / "bench" / f"{name}.jsonl") if r.get("demo_ok", 1)]
        sample = random.sample(usable, 1500)
        right = sum(math(row["solution"], row["answer"]).score for row in sample)
        assert right / len(sample) >= 0.985, name


def test_shuffled_real_answers_score_zero(shared_data):
    random.seed(0)
    sample = random.sample(rows(shared_data / "bench" / "math500.jsonl"), 150)
    golds = [row["answer"] for row in sample]
    for row, other in zip(sample, golds[1:] + golds[:1], strict=True):
        accepted = math(rf"\boxed{{{other}}}", row["answer"]).score
        assert not accepted or other == row["answer"], (other, row["answer"])
