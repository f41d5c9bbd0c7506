"""Rows of real problems for the tests on a real model."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Used where GSM8K is not at hand: word problems of one or two steps.
OWN = [
    ("A tray holds 12 buns. How many buns are on 5 full trays?", "60",
     "There are 5*12=60 buns."),
    ("Mia has 30 stamps and gives a third of them away. How many are left?", "20",
     "She gives away 30/3=10 stamps.\nSo 30-10=20 stamps are left."),
    ("A ticket costs $7. How much do 4 tickets and a $3 map cost?", "31",
     "The tickets cost 4*7=$28.\nWith the map that is 28+3=$31."),
    ("A tank of 90 liters is two thirds full. How many liters are in it?", "60",
     "Two thirds of 90 are 90*2/3=60 liters."),
    ("Ben reads 15 pages a day. How many pages does he read in 2 weeks?", "210",
     "Two weeks have 14 days.\nHe reads 14*15=210 pages."),
    ("A shirt of $40 is sold for 25% less. What is its price?", "30",
     "The discount is 40*.25=$10.\nThe price is 40-10=$30."),
]  # fmt: skip


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    """Up to 200 problems with worked solutions, the shortest first."""
    file = ROOT.parent / "shared" / "data" / "bench" / "gsm8k_train.jsonl"
    if file.is_file():
        with file.open(encoding="utf-8") as lines:
            found = [json.loads(line) for line in islice(lines, 2000)]
        return sorted(found, key=lambda r: (len(r["problem"] + r["solution"]), r["id"]))[:200]
    return [
        {"id": str(i), "problem": problem, "answer": answer, "answer_type": "math",
         "solution": f"{solution}\nThe final answer is $\\boxed{{{answer}}}$."}
        for i, (problem, answer, solution) in enumerate(OWN)
    ]  # fmt: skip
