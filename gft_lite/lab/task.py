"""The lab's task: chains of digit-wise modular operations, and easy old skills.

A problem such as `314+203*122....=` is worked from left to right, digit by digit and modulo
5: 314+203 is 012, then 012*122 is 024. A response gives every value and then `#` and the
answer: `@314;012;024#024`. Problems with `*` are the knowledge gap: the base model was trained
on the product as an old skill (`mul 314 203=`), but in chains almost only on random results of
`*`. The old skills (`rev 3142=` gives `#2413`) measure retention.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

Digits = tuple[int, ...]
Split = Literal["train", "tune", "test", "retention"]

MODULUS = 5
WIDTH = 3
MAX_STEPS = 3
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: (a + b) % MODULUS,
    "-": lambda a, b: (a - b) % MODULUS,
    "*": lambda a, b: (a * b) % MODULUS,
}
KNOWN = "+-"
GAP = "*"
SIZES: dict[str, int] = {"train": 1024, "tune": 96, "test": 160, "retention": 150}
# Two problems in five need the operator of the gap; sampling can solve the other three.
GAP_TURNS = (1, 3)
TURNS = 5
CARELESS_ERROR = 0.2


@dataclass(frozen=True, slots=True)
class Chain:
    """A start value and the (operator, operand) steps applied to it from left to right."""

    start: Digits
    steps: tuple[tuple[str, Digits], ...]

    @property
    def text(self) -> str:
        """The text of the problem, for example `314+203*122....=`."""
        # One width for all lengths keeps each value at a fixed distance from its operand: rotary
        # attention learns that in minutes, and does not learn a varying distance.
        body = digits(self.start) + "".join(op + digits(b) for op, b in self.steps)
        return body.ljust(WIDTH + MAX_STEPS * (WIDTH + 1), ".") + "="

    @property
    def skill(self) -> str:
        """`gap` if the chain has the operator that the base does not know, else `chain`."""
        return "gap" if any(op == GAP for op, _ in self.steps) else "chain"


@dataclass(frozen=True, slots=True)
class Style:
    """The form of a solution: its opening and the separator between two values."""

    opening: str
    separator: str | None

    def write(self, values: list[Digits], chain: Chain) -> str:
        """The solution text; without a separator, each value follows the operator of its step."""
        marks = [self.separator or op for op, _ in chain.steps]
        body = "".join(m + digits(v) for m, v in zip(marks, values[1:], strict=True))
        return f"{self.opening}{digits(values[0])}{body}#{digits(values[-1])}"


EXPERT = Style("@", ";")
# Distinct openings: at T < 1, sampling would favor one of several styles with equal openings.
TEACHERS = (Style("&", ","), Style("%", None), Style("$", "/"))
CARELESS = TEACHERS[2]


def digits(value: Digits) -> str:
    """The digits of a value, written without spaces."""
    return "".join(map(str, value))


def apply(op: str, a: Digits, b: Digits) -> Digits:
    """Apply one operation digit by digit, modulo 5."""
    return tuple(OPERATIONS[op](x, y) for x, y in zip(a, b, strict=True))


def trace(chain: Chain) -> list[Digits]:
    """The start value and the value after each step."""
    values = [chain.start]
    for op, operand in chain.steps:
        values.append(apply(op, values[-1], operand))
    return values


def draw_digits(rng: random.Random, width: int = WIDTH) -> Digits:
    """Draw uniform digits below the modulus."""
    return tuple(rng.randrange(MODULUS) for _ in range(width))


def draw_chain(rng: random.Random, skill: str) -> Chain:
    """Draw a chain of two or three steps; a `gap` chain has at least one `*`."""
    count = rng.choice((MAX_STEPS - 1, MAX_STEPS))
    ops = [rng.choice(KNOWN) for _ in range(count)]
    if skill == "gap":
        ops[rng.randrange(count)] = GAP
    return Chain(draw_digits(rng), tuple((op, draw_digits(rng)) for op in ops))


def split_of(text: str) -> Split:
    """The split of a problem, a function of its text: no seed puts test problems into training."""
    bucket = zlib.crc32(text.encode()) % 16
    return "test" if bucket == 0 else "tune" if bucket == 1 else "train"


def corrupt(values: list[Digits], rng: random.Random) -> list[Digits]:
    """The same values with one wrong digit in the last one."""
    last = list(values[-1])
    place = rng.randrange(len(last))
    last[place] = (last[place] + rng.randrange(1, MODULUS)) % MODULUS
    return [*values[:-1], tuple(last)]


def _chain_row(split: str, number: int, chain: Chain, rng: random.Random) -> dict[str, Any]:
    values = trace(chain)
    careless = corrupt(values, rng) if rng.random() < CARELESS_ERROR else values
    return {
        "id": f"lab-{split}-{number:04d}",
        "problem": chain.text,
        "answer": digits(values[-1]),
        "expert": [EXPERT.write(values, chain)],
        "teacher": [s.write(careless if s == CARELESS else values, chain) for s in TEACHERS],
        "skill": chain.skill,
    }


def _chain_rows(split: str, rng: random.Random) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    while len(seen) < SIZES[split]:
        number = len(seen)
        skill = "gap" if number % TURNS in GAP_TURNS else "chain"
        chain = draw_chain(rng, skill)
        if chain.text not in seen and split_of(chain.text) == split:
            seen.add(chain.text)
            yield _chain_row(split, number, chain, rng)


OLD_SKILLS = ("copy", "rev", "max", "add", "sub", "mul")
OLD_OPERATIONS = {"add": "+", "sub": "-", "mul": "*"}


def draw_old(rng: random.Random, skill: str) -> tuple[str, str]:
    """Draw a problem of one old skill and its answer: `rev 3142=`, `2413`."""
    if skill in ("copy", "rev"):
        value = draw_digits(rng, 4)
        return f"{skill} {digits(value)}=", digits(value if skill == "copy" else value[::-1])
    a, b = draw_digits(rng), draw_digits(rng)
    if skill == "max":
        result: Digits = tuple(map(max, a, b))
    else:
        result = apply(OLD_OPERATIONS[skill], a, b)
    return f"{skill} {digits(a)} {digits(b)}=", digits(result)


def _old_rows(rng: random.Random) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    while len(seen) < SIZES["retention"]:
        number = len(seen)
        skill = OLD_SKILLS[number % len(OLD_SKILLS)]
        problem, answer = draw_old(rng, skill)
        if problem in seen:
            continue
        seen.add(problem)
        yield {
            "id": f"lab-retention-{number:04d}",
            "problem": problem,
            "answer": answer,
            "expert": [f"#{answer}"],
            "teacher": [],
            "skill": skill,
        }


def rows(split: str, limit: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """The rows of a split: id, problem, answer, expert, teacher, skill; skills interleaved.

    Raises: ValueError for an unknown split or a negative limit.
    """
    if split not in SIZES:
        raise ValueError(f"split: must be one of {', '.join(SIZES)}, got {split!r}.")
    if limit is not None and limit < 0:
        raise ValueError(f"limit: must be 0 or more, got {limit}.")
    # Copies: a caller may change its rows.
    return [
        {**row, "expert": [*row["expert"]], "teacher": [*row["teacher"]]}
        for row in _drawn_rows(split, seed)[:limit]
    ]


@cache
def _drawn_rows(split: str, seed: int) -> tuple[dict[str, Any], ...]:
    """The rows of a split; drawn once, as every run of a process reads the same ones."""
    rng = random.Random(f"gft-lite lab {split} {seed}")
    return tuple(_old_rows(rng) if split == "retention" else _chain_rows(split, rng))
