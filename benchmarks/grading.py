"""Items/s of the scorer with math-verify in its worker processes, on full solutions.

Real solutions of MATH and GSM8K if they are next to the project, else generated ones. Each set is
graded once with its own answers (correct) and once with those of the next row (nearly all wrong),
by started workers without cached items; the best of several turns.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.record import record
from gft_lite.rewards.base import RewardFunction
from gft_lite.rewards.scorer import Scorer
from gft_lite.types import Group, Problem, Response

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "bench"
Pairs = list[tuple[str, str]]


def pairs(name: str, count: int) -> Pairs:
    """(solution, answer) pairs of a set next to the project, or generated ones."""
    file = SHARED / f"{name}.jsonl"
    if not file.exists():
        return [(_made_up(i), rf"\frac{{{i}}}{{{i + 7}}}") for i in range(count)]
    rows = [json.loads(line) for line in file.open(encoding="utf-8")]
    found = [(row["solution"], row["answer"]) for row in rows if row["solution"]]
    return found[:: max(1, len(found) // count)][:count]


def _made_up(i: int) -> str:
    steps = " ".join(f"Then $x_{{{n}}} = {i} + {n}$." for n in range(20))
    return rf"{steps} The answer is $\boxed{{\frac{{{2 * i}}}{{{2 * (i + 7)}}}}}$."


def shuffled(given: Pairs) -> Pairs:
    """Every solution with the answer of the next row."""
    return [(text, answer) for (text, _), (_, answer) in zip(given, given[1:] + given[:1],
                                                              strict=True)]  # fmt: skip


def golden() -> Pairs:
    """The hand-made pairs of every kind of answer, if they are next to the project."""
    file = SHARED.parent / "grader_golden_dev.jsonl"
    rows = [json.loads(line) for line in file.open(encoding="utf-8")] if file.exists() else []
    return [(row["response"], row["answer"]) for row in rows if row["answer_type"] == "math"]


def speed(given: Sequence[tuple[str, str]], workers: int, turns: int) -> dict[str, float]:
    """Items/s of started workers without cached items, and the share of correct ones."""
    groups = [
        Group(Problem(str(i), "", answer), (Response((), text, "self"),))
        for i, (text, answer) in enumerate(given)
    ]
    warm = [
        Group(Problem(str(i), "", "x^2"), (Response((), rf"\boxed{{\sqrt{{{i}}}}}", "self"),))
        for i in range(20)
    ]
    best, right = 0.0, 0.0
    for _ in range(turns):
        with Scorer([RewardFunction("math")], workers=workers) as scorer:
            scorer.score(warm)
            start = time.perf_counter()
            scored = scorer.score(groups)
            best = max(best, len(groups) / (time.perf_counter() - start))
            right = sum(group.rewards[0] for group in scored) / len(scored)
    return {"items_per_s": round(best, 1), "right": round(right, 4)}


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    sets = {name: pairs(name, options.items) for name in ("math_train", "gsm8k_train")}
    figures: dict[str, object] = {"real_texts": SHARED.is_dir(), "items": options.items}
    if hand_made := golden():
        figures["golden_1_workers"] = found = speed(hand_made, 1, options.turns)
        print(f"golden pairs, 1 worker: {found}", flush=True)
    for workers in (1, 2):
        for name, given in sets.items():
            for kind, items in (("right", given), ("wrong", shuffled(given))):
                found = speed(items, workers, options.turns)
                figures[f"{name}_{kind}_{workers}_workers"] = found
                print(f"{name} {kind}, {workers} workers: {found}", flush=True)
    print(f"written: {record('grading', figures)}")


if __name__ == "__main__":
    main()
