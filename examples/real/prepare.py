"""Make the files of this experiment: `split` the problems, then `train` from the teacher's answers.

    python prepare.py split mawps.jsonl svamp.jsonl mmlu_stem.jsonl
    python prepare.py train mawps_taught.jsonl

Each file has an object a line with `id`, `problem` and `answer`, and `answer_type` where it is
`choice`. No problem of a test set has the wording of another problem here, numbers aside.
"""

from __future__ import annotations

import json
import random
import re
import sys
import unicodedata
from pathlib import Path
from typing import Any

# Of the problems in random order. `mawps_tune` served to choose the prompt and the rate.
SETS = {
    "mawps_test": slice(200),
    "mawps_tune": slice(250, 330),
    "mawps_train": slice(330, 730),
    "svamp_test": slice(60),
    "choices_test": slice(60),
}
FIELDS = ("id", "problem", "answer", "answer_type")

Row = dict[str, Any]


def wording(text: str) -> str:
    """A problem's text but for case, spaces, punctuation and the numbers in it."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"\d[\d.,/]*|[\W_]+", " ", text).split())


def split(mawps: list[Row], svamp: list[Row], choices: list[Row]) -> dict[str, list[Row]]:
    """The `SETS`, drawn at random from problems of different wording."""
    rng, used = random.Random(0), set[str]()
    sources = {"mawps": mawps, "svamp": svamp, "choices": choices}

    def distinct(rows: list[Row]) -> list[Row]:
        found: list[Row] = []
        rng.shuffle(rows)
        for row in rows:
            if (words := wording(row["problem"])) not in used:
                used.add(words)
                found.append({name: row[name] for name in FIELDS if name in row})
        return found

    pools = {name: distinct(rows) for name, rows in sources.items()}
    return {name: pools[name.partition("_")[0]][part] for name, part in SETS.items()}


def demonstrated(taught: list[Row]) -> list[Row]:
    """The problems with a right answer of the teacher: the first is the expert's solution.

    The teacher's other answers stay its own, right or wrong, as GFT's groups take them.
    """
    rows = []
    for row in taught:
        answers = list(zip(row["teacher"], row["teacher_rewards"], strict=True))
        right = next((text for text, reward in answers if reward == 1), None)
        if right is not None:
            others = [text for text, _ in answers if text != right]
            rows.append(
                {name: row[name] for name in FIELDS if name in row}
                | {"expert": right, "teacher": others}
            )
    return rows


def read(file: str) -> list[Row]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def write(name: str, rows: list[Row]) -> None:
    """Write a JSONL file in the working directory."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{name}.jsonl: {len(rows)} problems")


def main() -> None:
    """Run the command on the files that it is given."""
    match sys.argv[1:]:
        case ["split", mawps, svamp, choices]:
            for name, rows in split(read(mawps), read(svamp), read(choices)).items():
                write(name, rows)
        case ["train", taught]:
            write("mawps_demonstrated", demonstrated(read(taught)))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
