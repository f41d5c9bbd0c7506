# ruff: noqa: RUF001 - characters that look like ASCII ones are the subject
"""Unicode in answers: signs, digits, fractions, superscripts, and arbitrary text as a property."""

from __future__ import annotations

import re
import sys
import unicodedata

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gft_lite.rewards.base import RewardFunction
from gft_lite.rewards.math_rule import compare, make
from gft_lite.rewards.registry import make_rule
from gft_lite.rewards.scorer import Scorer
from gft_lite.rewards.unicode_latex import to_latex, to_plain_text
from gft_lite.types import Group, Problem, Response

math = make()
choice = make_rule(RewardFunction("choice"))
CHARACTERS = [chr(code) for code in range(sys.maxunicode + 1)]
ZEROS = [c for c in CHARACTERS if unicodedata.decimal(c, None) == 0]
DASHES = [c for c in CHARACTERS if unicodedata.category(c) == "Pd"] + ["−", "➖", "˗"]
SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("－５", "-5"),
        ("‑5", "-5"),
        ("−5", "-5"),
        ("－３．５", "-3.5"),
        ("１，２３４", "1,234"),
        ("½", r"\frac{1}{2}"),
        ("2⅓", r"2\frac{1}{3}"),
        ("¹³⁄₂₀", r"\frac{13}{20}"),
        ("⅟₃", r"\frac{1}{3}"),
        ("1⁄2", "1/2"),
        ("x²³", "x^{23}"),
        ("10⁻⁵", "10^{-5}"),
        ("1011₂", "1011_{2}"),
        ("12㎡", "12m^{2}"),
        ("√12", r"\sqrt{12}"),
        ("√{x+1}", r"\sqrt{x+1}"),
        ("∆", r"\Delta "),
        ("∣x∣", "|x|"),
        ("⁃5", "-5"),
        ("∛(x+1)", r"\sqrt[3]{x+1}"),
        ("√2.5", r"\sqrt{2.5}"),
        ("𝜋", r"\pi "),
        ("Λ", r"\Lambda "),
        ("ℝ", r"\mathbb{R}"),
        ("30º", r"30^{\circ}"),
        ("25℃", r"25^{\circ}C"),
        ("x≤５", r"x\le 5"),
        ("±５％", r"\pm 5%"),
        ("€5", r"\$5"),
        ("٣٫٥", "3.5"),
        ("5\u200b\ufe0f", "5"),
        ("5\u202f000", "5 000"),
        ("“no”", '"no"'),
        ("e\u0301", "é"),
        ("学校", "学校"),
        ("\ud800", "\ud800"),
        ("x^{2} - 1", "x^{2} - 1"),
    ],
)
def test_unicode_becomes_latex(text, latex):
    assert to_latex(text) == latex


@pytest.mark.parametrize(
    ("stated", "gold", "equal"),
    [
        ("－5", "-5", True),
        ("—5", "-5", True),
        ("－5", "5", False),
        ("3．5", "3.5", True),
        ("１２", "12", True),
        ("½", "1/2", True),
        ("½", "12", False),
        ("2 ½", "2.5", True),
        ("3½", "31/2", False),
        ("-⅓", r"-\frac{1}{3}", True),
        ("x²", "x^2", True),
        ("x²", "x2", False),
        ("5²", "52", False),
        ("5²", "25", True),
        ("6.02×10²³", r"6.02 \times 10^{23}", True),
        ("10⁻⁵", "0.00001", True),
        ("√12", "2√3", True),
        ("（−∞，３］", r"(-\infty, 3]", True),
        ("x∈ℝ", r"x \in \mathbb{R}", True),
        ("½π", r"\frac{\pi}{2}", True),
        ("3～5", "35", False),
        ("3~5", "35", False),
        ("４：３０ p.m.", r"\text{4:30 p.m.}", True),
        ("ＹＥＳ", "yes", True),
        ("９^９^９^９", "5", False),
    ],
)
def test_equality_of_answers_in_unicode(stated, gold, equal):
    assert compare(stated, gold).score == equal


def test_explosive_answers_in_unicode_are_not_parsed():
    assert compare("９^９^９^９", "5").verdict == "unparsed"
    assert compare("2⁹⁹⁹⁹⁹⁹", "5").verdict == "unparsed"


@pytest.mark.parametrize(
    ("stated", "gold"),
    [("3.5x", "35x"), (r"1.5\pi", r"15\pi"), (r"\frac{1}{23}x", r"\frac{12}{3}x"),
     ("x_{1}2", "x_{12}"), (r"\]", r"\{"), ("x^{2}3", "x^{23}")],
)  # fmt: skip
def test_punctuation_and_braces_of_formulas_count(stated, gold):
    assert compare(stated, gold).score == 0


@pytest.mark.parametrize(
    ("text", "letter"),
    [("The answer is （Ｂ）.", "B"), ("答案：Ｃ", "C"), ("𝐃", "D"), ("\u200bB. 12", "B")],
)
def test_choice_letters_in_unicode(text, letter):
    assert [gold for gold in "ABCD" if choice(text, gold).score] == [letter]
    assert choice(text, unicodedata.lookup(f"FULLWIDTH LATIN CAPITAL LETTER {letter}")).score == 1


def test_invisible_characters_are_removed_from_text():
    assert to_plain_text("\u200bＡ\u2060：\ufeff") == "A:"


def test_the_last_number_has_its_minus_sign():
    last = make(last_number=True)
    assert last("so it is −5", "-5").score == 1
    assert last("so it is −5", "5").score == 0


@settings(max_examples=200, deadline=None)
@given(st.integers(-(10**9), 10**9), st.sampled_from(ZEROS), st.sampled_from(DASHES))
def test_integers_in_any_digits_and_with_any_dash(number, zero, dash):
    written = "".join(chr(ord(zero) + int(c)) if c.isdigit() else dash for c in str(number))
    assert math(rf"\boxed{{{written}}}", str(number)).score == 1
    assert math(rf"\boxed{{{written}}}", str(number + 1)).score == 0


@settings(max_examples=100, deadline=None)
@given(st.integers(-99, 99))
def test_superscripts_are_exponents(exponent):
    written = str(exponent).translate(SUPERSCRIPTS)
    assert to_latex(f"x{written}") == f"x^{{{exponent}}}"
    assert compare(f"10{written}", f"10^{{{exponent}}}").score == 1


PLAIN = st.text(st.characters(exclude_characters="\\{}<#"), min_size=1, max_size=40)


@settings(max_examples=300, deadline=None)
@given(PLAIN.filter(str.strip))
def test_a_text_equals_itself(text):
    assume(not re.search("answer|答案|结果", text, re.IGNORECASE))
    assert math(rf"\boxed{{{text}}}", text).score == 1
    assert math(f"so <answer>{text}</answer>", text).score == 1


FRAGMENTS = st.lists(
    st.sampled_from(
        [*"½²⁻√－５，xy()[]^_=<≤%$€:;'&|!#",
         r"\frac{1}{2}", r"\sqrt", "{", "}", r"\{", r"\}", r"\le",
         r"\text{a b}", r"\boxed{", "<answer>", "</answer>", "answer is", " or ", "(C)", "1e5",
         r"\begin{pmatrix}", r"\\", r"\left", r"\right", "\u200b", "\n", "\\", "####", "12", "3.5"]
    ),
    min_size=1, max_size=12,
).map("".join)  # fmt: skip
ANY = st.text(max_size=30) | st.text(st.characters(categories=["Cs", "Cf", "Mn"])) | FRAGMENTS


@pytest.fixture(scope="module")
def scorer():
    with Scorer([RewardFunction("math"), RewardFunction("choice")], workers=2) as made:
        yield made


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(ANY, ANY), min_size=20, max_size=20))
def test_no_text_and_no_gold_answer_is_an_error(scorer, pairs):
    texts = [(text, gold) for text, gold in pairs] + [(rf"\boxed{{{t}}}", g) for t, g in pairs]
    groups = [
        Group(Problem(str(i), "", gold), (Response((), text, "self"),))
        for i, (text, gold) in enumerate(texts)
    ]
    responses = [group.responses[0] for group in scorer.score(groups)]
    assert {response.verdict for response in responses} <= {
        "ok",
        "no_answer",
        "unparsed",
        "timeout",
    }
    assert {response.reward for response in responses} <= {0.0, 1.0, 2.0}
