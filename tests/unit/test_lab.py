"""The lab's task, its tokenizer and its packaged base model."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from gft_lite.lab import BASE
from gft_lite.lab.task import CARELESS_ERROR, EXPERT, SIZES, TEACHERS, rows

CHAINS = ("train", "tune", "test")


def solve(problem: str) -> str:
    """Solve a chain column by column, independently of the code of the task."""
    body = problem.rstrip("=").rstrip(".")
    columns = []
    for column in range(3):
        value = int(body[column])
        for place in range(3, len(body), 4):
            operand = int(body[place + 1 + column])
            value = {"+": value + operand, "-": value - operand, "*": value * operand}[
                body[place]
            ] % 5
        columns.append(str(value))
    return "".join(columns)


def solve_old_skill(problem: str) -> str:
    """Solve a problem of an old skill, independently of the code of the task."""
    name, *operands = problem.rstrip("=").split(" ")
    if len(operands) == 1:
        return operands[0] if name == "copy" else "".join(reversed(operands[0]))
    pairs = [(int(a), int(b)) for a, b in zip(*operands, strict=True)]
    if name == "max":
        return "".join(str(max(p)) for p in pairs)
    results = {"add": [a + b for a, b in pairs], "sub": [a - b for a, b in pairs]}
    results["mul"] = [a * b for a, b in pairs]
    return "".join(str(r % 5) for r in results[name])


def answer_of(text: str) -> str:
    """The text after the last `#`, which the reward rule compares."""
    return text.rsplit("#", 1)[1]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The packaged tokenizer, loaded as that of a user's model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE)


@pytest.mark.parametrize("split", SIZES)
def test_rows_are_deterministic_and_unique(split: str) -> None:
    made = rows(split)
    assert made == rows(split)
    assert len(made) == SIZES[split]
    assert len({r["problem"] for r in made}) == len({r["id"] for r in made}) == len(made)
    assert rows(split, limit=7) == made[:7]
    assert rows(split, seed=1) != made


def test_rows_do_not_depend_on_the_process() -> None:
    code = "from gft_lite.lab import rows; print(rows('test', 3)[2]['problem'])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == rows("test", 3)[2]["problem"]


def test_first_test_row_by_hand() -> None:
    first = rows("test", 1)[0]
    assert first["problem"] == "002-031-203....="
    assert first["answer"] == "323"
    assert first["expert"] == ["@002;021;323#323"]


def test_splits_are_disjoint_under_every_seed() -> None:
    parts = [{r["problem"] for seed in range(3) for r in rows(s, seed=seed)} for s in CHAINS]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


@pytest.mark.parametrize("split", CHAINS)
def test_answers_and_experts_are_right(split: str) -> None:
    for row in rows(split):
        assert row["answer"] == solve(row["problem"])
        assert [answer_of(e) for e in row["expert"]] == [row["answer"]]
        assert row["skill"] == ("gap" if "*" in row["problem"] else "chain")


def test_expert_values_follow_from_one_another() -> None:
    for row in rows("train", 50):
        values = row["expert"][0].removeprefix("@").split("#")[0].split(";")
        body = row["problem"].rstrip("=.")
        assert values == [solve(body[: 3 + 4 * i]) for i in range(len(values))]
        assert len(values) == 1 + len(body) // 4


def test_retention_answers() -> None:
    made = rows("retention")
    assert [r["answer"] for r in made] == [solve_old_skill(r["problem"]) for r in made]
    assert set(Counter(r["skill"] for r in made).values()) == {len(made) // 6}
    assert all(r["expert"] == [f"#{r['answer']}"] and r["teacher"] == [] for r in made)


def test_two_problems_in_five_are_of_the_gap() -> None:
    for split in CHAINS:
        made = rows(split, limit=50)
        assert sum(r["skill"] == "gap" for r in made) == 20


def test_teachers_are_distinct_and_only_the_careless_one_errs() -> None:
    made = rows("train")
    wrong: Counter[str] = Counter()
    for row in made:
        texts = [*row["expert"], *row["teacher"]]
        assert [t[0] for t in texts] == [EXPERT.opening, *(s.opening for s in TEACHERS)]
        assert len(set(texts)) == 4
        wrong.update(t[0] for t in row["teacher"] if answer_of(t) != row["answer"])
    assert set(wrong) == {"$"}
    assert abs(wrong["$"] / len(made) - CARELESS_ERROR) < 0.03


def test_responses_are_short() -> None:
    made = [r for split in SIZES for r in rows(split)]
    # One token is left for the end of the sequence.
    assert max(len(t) for r in made for t in [*r["expert"], *r["teacher"]]) == 20
    assert max(len(r["problem"]) for r in made) == 16


def test_unknown_split_and_negative_limit_are_errors() -> None:
    with pytest.raises(ValueError, match="split: must be one of train, tune, test, retention"):
        rows("dev")
    with pytest.raises(ValueError, match="limit: must be 0 or more, got -1"):
        rows("test", limit=-1)


def test_importing_the_lab_loads_no_torch() -> None:
    code = "import sys, gft_lite.lab; print('torch' in sys.modules, 'transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False False"


def test_base_is_small_and_complete() -> None:
    names = {p.name for p in BASE.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= names
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    assert sum(p.stat().st_size for p in BASE.iterdir()) <= 4_000_000


def test_the_tokenizer_has_one_token_per_character(tokenizer: Any) -> None:
    for row in [r for split in SIZES for r in rows(split, limit=100)]:
        for text in (row["problem"], *row["expert"], *row["teacher"]):
            ids = tokenizer.encode(text)
            assert len(ids) == len(text)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "text",
    [
        "".join(map(chr, range(32, 127))) + "\n",
        "Natalia's  clips:\n\n 48 / 2 = <<48/2=24>>24 , don 't . ?\n#### 72",
        " leading and trailing ",
        "caf\u00e9 \u20ac5",
    ],
)
def test_tokenizer_round_trip(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_and_chat_template(tokenizer: Any) -> None:
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    chat = [{"role": "user", "content": "rev 3142="}, {"role": "assistant", "content": "#2413"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|user|>rev 3142=#2413<eos>"
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|user|>rev 3142="


def test_the_base_solves_old_skills_and_not_the_gap() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    assert model.config.architectures == ["Qwen2ForCausalLM"]
    assert model.config.vocab_size == len(tokenizer)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight

    def right(made: list[dict[str, Any]]) -> int:
        batch = tokenizer([r["problem"] for r in made], return_tensors="pt", padding=True)
        with torch.no_grad():
            out = model.generate(**batch, max_new_tokens=24, do_sample=False)
        texts = tokenizer.batch_decode(
            out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        pairs = zip(texts, made, strict=True)
        return sum("#" in t and answer_of(t) == r["answer"] for t, r in pairs)

    assert right(rows("retention", limit=48)) >= 46
    gaps = [r for r in rows("test", limit=100) if r["skill"] == "gap"]
    assert right(gaps) <= len(gaps) // 4
