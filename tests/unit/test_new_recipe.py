"""What `gft-lite init` guesses about data and model, the recipe it writes, and what it doubts."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from gft_lite.cli import main
from gft_lite.data.answer_kinds import answer_kind
from gft_lite.lab import BASE
from gft_lite.recipe.schema import Recipe
from gft_lite.tools.new_recipe import chat_template, draft_recipe, recipe_text
from gft_lite.utils.errors import UserError

WHY = "Both sums are the same, so the two of them have seen an equal number of birds in all."
ASK = [{"role": "user", "content": "1+1?"}]
REPLY = [{"role": "assistant", "content": WHY}]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(*rows, name="data.jsonl"):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def draft(*rows, given=(), model="lab", copies=10):
    return draft_recipe(write(*rows * copies), model, "12GiB", given)


def columns(found):
    return found.recipe.data.columns.model_dump(exclude_defaults=True)


@pytest.mark.parametrize(
    ("row", "method", "reward", "expected"),
    [
        # GSM8K, MATH, numbers alone, words.
        ({"question": "1+1?", "answer": "It is 2.\n#### 2"}, "gft", "math",
         {"problem": "question", "answer_from": "hash", "expert": ["answer"], "clean": "gsm8k"}),
        ({"problem": "1+1?", "solution": "So \\boxed{2}.", "level": "1"}, "gft", "math",
         {"answer": "solution", "answer_from": "boxed", "expert": ["solution"]}),
        ({"Question": "1+1?", "Answer": 2}, "grpo", "math",
         {"problem": "Question", "answer": "Answer"}),
        ({"query": "x?", "final_answer": "\\frac{1}{2}", "rationale": "Half, 1/2: \\frac{1}{2}"},
         "gft", "math",
         {"problem": "query", "answer": "final_answer", "expert": ["rationale"]}),
        ({"question": "The capital of France?", "answer": "Paris"}, "grpo", "exact",
         {"problem": "question"}),
        # An answer without a usual name, which the demonstrations end with.
        ({"Frage (de)": "Wie viele?", "id": 3, "Zahl": "12", "rationale": "3 * 4 = 12."}, "gft",
         "math", {"problem": "Frage (de)", "answer": "Zahl", "expert": ["rationale"]}),
        # Multiple choice, with the options in a column or in the problem.
        ({"question": "Which?", "choices": ["cat", "dog"], "answer": 1}, "grpo", "choice",
         {"problem": "question", "choices": "choices"}),
        ({"question": "Which?", "choices": {"text": ["cat", "dog"], "label": ["1", "2"]},
          "answerKey": "2"}, "grpo", "choice",
         {"problem": "question", "choices": "choices.text", "answer": "answerKey"}),
        ({"question": "Which? (A) cat (B) dog", "answer": "B"}, "grpo", "choice",
         {"problem": "question"}),
        # TRL: prompt and completion, as text and as messages; preferences; GRPO's rows.
        ({"prompt": "1+1?", "completion": WHY}, "sft", None,
         {"problem": "prompt", "answer": None, "expert": ["completion"]}),
        ({"prompt": ASK, "completion": REPLY}, "sft", None,
         {"problem": "prompt", "answer": None, "expert": ["completion"]}),
        ({"prompt": ASK, "chosen": REPLY, "rejected": REPLY}, "sft", None,
         {"problem": "prompt", "answer": None, "expert": ["chosen"]}),
        ({"chosen": [*ASK, *REPLY], "rejected": [*ASK, *REPLY]}, "sft", None,
         {"messages": "chosen", "answer": None}),
        ({"prompt": ASK, "ground_truth": "2"}, "grpo", "math",
         {"problem": "prompt", "answer": "ground_truth"}),
        # Whole conversations, Alpaca, and a teacher's answers.
        ({"messages": [*ASK, *REPLY]}, "sft", None, {"messages": "messages", "answer": None}),
        ({"id": "1", "conversations": [{"from": "human", "value": "1+1?"},
                                       {"from": "gpt", "value": WHY}]}, "sft", None,
         {"messages": "conversations", "answer": None}),
        ({"instruction": "Add.", "input": "1+1", "output": WHY}, "sft", None,
         {"problem": ["instruction", "input"], "answer": None, "expert": ["output"]}),
        ({"problem": "1+1?", "answer": "2", "solution": "It is 2.", "teacher": ["2.", "Two: 2"]},
         "gft", "math", {"expert": ["solution"], "teacher": ["teacher"]}),
    ],
)  # fmt: skip
def test_the_usual_forms_of_data(row, method, reward, expected):
    found = draft(row)
    assert found.recipe.method == method
    assert found.detected.reward == reward
    assert columns(found) == expected
    # Where nothing can be graded, the likelihood of the held-out demonstrations is measured.
    assert bool(found.recipe.eval.every) == (reward is None)
    if reward:
        assert [f.name for f in found.recipe.reward.functions] == [reward]


def test_a_group_has_the_demonstrations_that_there_are():
    row = {"problem": "1+1?", "answer": "2", "solution": "It is 2."}
    group = draft(row).recipe.group
    assert (group.expert, group.teacher, group.self) == (1, 0, 7)
    group = draft(row | {"teacher": ["2.", "Two: 2"]}).recipe.group
    assert (group.expert, group.teacher, group.self) == (1, 2, 5)
    for counts, teachers in (((1, 1, 5), 1), ((1, 5, 5), 3)):
        group = draft(*(row | {"teacher": list("12345")[:n]} for n in counts)).recipe.group
        assert (group.expert, group.teacher, group.self) == (1, teachers, 7 - teachers)
    one = [row | {"teacher": "Two: 2"}]
    assert draft(*one).recipe.group.teacher == 1
    group = draft(*one, given=["method=gft", "group.teacher=2"]).recipe.group
    assert (group.expert, group.teacher, group.self) == (1, 2, 5)


def test_the_rows_that_are_looked_at_are_spread_over_the_file():
    row = {"question": "1+1?", "answer": "2"}
    data = write(*[row] * 300, *[row | {"answer": "two"}] * 1200)
    found = draft_recipe(data, "lab", "12GiB", [])
    assert (found.detected.looked_at, found.detected.reward) == (300, "exact")


def test_few_demonstrations_are_used_with_a_doubt():
    row = {"problem": "1+1?", "answer": "2"}
    found = draft(row, row, row | {"solution": "It is 2.", "teacher": ["2.", "Two: 2", "2"]})
    group = found.recipe.group
    assert (group.expert, group.teacher, group.self) == (1, 1, 6)
    for field in ("expert", "teacher"):
        assert f"data.columns.{field}: only 10 of 30 rows have one" in found.doubts


def test_without_a_gpu_the_recipe_is_for_a_cpu(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    data = write(*[{"question": "1+1?", "answer": "2"}] * 100)
    recipe = draft_recipe(data, "lab", None, []).recipe
    assert (recipe.policy.quantization, recipe.train.problems_per_step) == ("none", 4)
    assert (recipe.data.holdout, recipe.monitor.problems) == (16, 4)
    # 7.6B parameters in fp32 do not fit beside anything else.
    big = draft_recipe(data, "Qwen/Qwen2.5-Math-7B", None, []).recipe
    assert big.policy.quantization == "nf4"


def test_every_format_and_a_folder():
    rows = [{"question": f"{n}+1?", "answer": str(n + 1)} for n in range(10)]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), "a.parquet")
    Path("a.json").write_text(json.dumps(rows))
    Path("a.csv").write_text("question,answer\n" + "".join(f"{n}+1?,{n + 1}\n" for n in range(10)))
    Path("folder").mkdir()
    write(*rows, name="folder/train.jsonl")
    for source in ("a.parquet", "a.json", "a.csv", "folder"):
        found = draft_recipe(source, "lab", "12GiB", [])
        assert (found.detected.rows, found.recipe.data.columns.problem) == (10, "question")
        assert found.recipe.method == "grpo"


@pytest.mark.parametrize(
    ("rows", "doubt"),
    [
        ([{"question": "a", "prompt": "b", "answer": "1"}], "problem: also prompt"),
        ([{"question": "a", "answer": "1"}] * 2 + [{"question": "a", "answer": "unknown"}],
         "answer: 20 of 30 are numbers or formulas, others are text such as 'unknown'"),
        ([{"question": "a", "answer": "x\n#### 1"}] * 3 + [{"question": "a", "answer": "none"}],
         "answer: 10 of 40 do not end with `#### ANSWER`; such rows are skipped"),
        ([{"question": "a", "answer": "1", "solution": "It is 2.", "response": "1"}],
         "expert: only 0 of 10 end with the answer in column 'answer'"),
        ([{"question": "a", "answer": "B"}], "answer: the problems show no options"),
        ([{"prompt": "a", "completion": WHY, "label": True}, {"prompt": "a", "completion": WHY,
          "label": False}], "expert: column label is false for 10 of 20 rows"),
        ([{"left": "What is it?", "right": WHY}], "problem: no column has a usual name"),
        ([{"prompt": "a", "completion": WHY}], "method: sft, dft, asft and psft need no reward"),
        ([{"question": "a", "answer": "1"}], "holdout: only 10 rows"),
        ([{"question": "a", "answer": "1"}] * 2 + ["a"], "source: 10 of 30 rows can't be read"),
        ([{"Frage": "Wie viele?", "id": 3, "Zahl": "12", "rationale": "3 * 4 = 12."}],
         "answer: no column has a usual name; the demonstrations end with its values"),
        ([{"question": "How many?", "id": 3, "Zahl": "12", "response": WHY}],
         "answer: Zahl may be, without a usual name"),
        ([{"question": "How many?", "Zahl": "12", "response": "3 * 4 = 12."},
          *[{"question": "How many?", "Zahl": "12", "response": WHY}] * 4],
         "answer: Zahl may be, without a usual name"),
    ],
)  # fmt: skip
def test_a_doubt_is_said(rows, doubt):
    found = draft(*rows, given=["data.columns.expert=[right]"] if "left" in rows[0] else [])
    assert any(doubt in text for text in found.doubts), found.doubts
    assert f"# Check: {doubt.partition(': ')[2]}" in recipe_text(found, "x")


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"prompt": "1+1?"}, "DATA: must have answers or demonstrations to learn from"),
        ({"messages": ASK}, "DATA: must have answers or demonstrations to learn from"),
        ({"text": WHY}, "data.columns.problem: must name the column of the prompts"),
        ("text", r"objects with columns, got 10 rows without .* \(not an object with columns\)"),
    ],
)
def test_what_can_not_be_learned_from_is_an_error(row, error):
    with pytest.raises(UserError, match=error):
        draft(row)


def test_a_file_in_another_encoding_says_so():
    Path("latin.jsonl").write_bytes('{"question": "Wie gro\u00df?"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match=r"got 1 rows without in 'latin.jsonl' \(not UTF-8\)"):
        draft_recipe("latin.jsonl", "lab", "12GiB", [])


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ("answer=anwser", r"columns\.answer: no row has a column 'anwser'; .* Did you mean answer"),
        ("problem=[question, hint]", r"columns\.problem: no row has a column 'hint'"),
        ("expert=[solution]", r"columns\.expert: no row has a column 'solution'"),
        ("messages=talk", r"columns\.messages: no row has a column 'talk'"),
        ("messages=question", r"columns\.messages: must name a column of conversations, got 'que"),
    ],
)
def test_columns_that_the_user_names_are_there(given, error):
    with pytest.raises(UserError, match=error):
        draft({"question": "1+1?", "answer": "2"}, given=[f"data.columns.{given}"])


def test_conversations_may_be_written_as_text_as_in_csv_files():
    for given in ([], ["data.columns.messages=talk"]):
        found = draft({"talk": json.dumps([*ASK, *REPLY]), "id": 3}, given=given)
        assert (found.recipe.method, found.recipe.data.columns.messages) == ("sft", "talk")


def test_prompts_alone_are_enough_with_a_reward():
    recipe = draft({"prompt": "1+1?"}, given=["reward.functions=format"]).recipe
    assert (recipe.method, recipe.data.columns.answer) == ("grpo", None)


def test_what_the_user_gives_goes_before_guesses():
    row = {"question": "1+1?", "answer": "It is 2.\n#### 2", "final": "2"}
    found = draft(row, given=["data.columns.answer=final", "method=dft", "train.steps=3"])
    assert found.recipe.data.columns.answer == "final"
    assert found.recipe.data.columns.answer_from == "plain"
    assert (found.recipe.method, found.recipe.train.steps) == ("dft", 3)
    with pytest.raises(UserError, match=r"^command line: must be key=value, got 'steps'"):
        draft(row, given=["steps"])
    with pytest.raises(UserError, match=r"data\.columns\.problem"):
        draft(row, given=["data.columns.problem=5"])


def test_lengths_are_those_of_the_rows():
    # The lab's tokenizer has a token a byte; 48 tokens are kept for the chat template.
    row = {"prompt": "x" * 100, "completion": "It is so. " * 20}
    recipe = draft(row).recipe
    assert recipe.data.max_prompt_tokens == 192  # 148, in steps of 64
    assert recipe.rollout.max_tokens == 256  # 200
    assert recipe.policy.context == 512  # 449
    # A template of 100 tokens counts with the 20 of the chat template: 100 + 100 + 20.
    longer = draft(row, given=[f"data.prompt.template={'y' * 91}{{problem}}"]).recipe
    assert longer.data.max_prompt_tokens == 256
    # Prompts get half of the context of 2048, what follows the rest; few rows are held out.
    found = draft({"prompt": "x" * 3000, "completion": "y" * 2000}, {**row, "prompt": "x" * 3000})
    assert (found.recipe.data.max_prompt_tokens, found.recipe.rollout.max_tokens) == (1024, 1022)
    assert "rollout.max_tokens: 10 of 20 demonstrations are longer and left out" in found.doubts
    assert found.recipe.data.holdout == 4


def test_the_style_follows_from_the_chat_template(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_bytes((BASE / name).read_bytes())
    row = {"question": "1+1?", "answer": "2"}
    assert chat_template("lab") is True
    assert chat_template(str(folder)) is False
    (folder / "tokenizer_config.json").write_text("{}")
    assert chat_template(str(folder)) is False
    assert draft(row, model=str(folder)).recipe.data.prompt.style == "plain"
    with pytest.raises(UserError, match="must have a chat template for a data set of conv"):
        draft({"messages": [*ASK, *REPLY]}, model=str(folder))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert draft(row, model=str(folder)).recipe.data.prompt.style == "chat"
    # A model of the hub whose files are not here is judged by its name, and said to be.
    found = draft(row, model="Qwen/Qwen2.5-0.5B-Instruct")
    assert found.recipe.data.prompt.style == "chat"
    assert any("the style follows from its name" in doubt for doubt in found.doubts)


def test_a_written_recipe_is_the_one_that_was_guessed(capsys):
    data = write(*[{"question": f"{n}?\nSay.", "answer": f"So.\n#### {n}"} for n in range(60)])
    assert main(["init", data, "--model", "lab", "--gpu", "4090", "data.holdout=5"]) == 0
    out = capsys.readouterr().out
    assert "data.columns.answer=answer  # 60 of 60 end with `#### ANSWER`" in out
    assert "memory: it fits: " in out and "on rtx4090 with 24.0 GiB" in out
    assert "gft-lite train recipe.yaml" in out
    recipe = Recipe.load("recipe.yaml")
    assert recipe == draft_recipe(data, "lab", "4090", ["data.holdout=5"]).recipe
    assert "  holdout: 5  # as given" in Path("recipe.yaml").read_text()
    assert main(["plan", "recipe.yaml", "--gpu", "8"]) == 0
    assert main(["init", data, "--model", "lab"]) == 2
    assert "Add --force to overwrite it." in capsys.readouterr().err
    assert main(["init", data, "--model", "lab", "--force"]) == 0


def test_names_of_columns_can_not_break_the_recipe():
    found = draft({"question": "1+1?", "prompt\nmethod: x": "y", "answer": "2", "x\n y: 1": "z"})
    Path("r.yaml").write_text(recipe_text(found, "gft-lite init a\nb"))
    assert Recipe.load("r.yaml") == found.recipe


def test_train_takes_the_same_guesses(capsys):
    data = write(*[{"prompt": f"{n}?", "completion": WHY} for n in range(20)])
    words = ["train", "--data", data, "--model", "lab"]
    assert main([*words, "train.steps=2", "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert "method: sft" in printed.out and "steps: 2" in printed.out
    assert "train.steps=2  # as given" in printed.err
    # RECIPE takes the first override, and the last of equal ones counts.
    assert main(["train", "train.steps=2", "train.steps=3", *words[1:], "--dry-run"]) == 0
    assert "\n  steps: 3\n" in capsys.readouterr().out
    assert main([*words, "--dry-run", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    for wrong, error in (
        (words[:3], "--model: must be given with --data"),
        (["train"], "RECIPE: must be given, or --data, got neither"),
        (["train", "recipes/lab.yaml", *words[1:]], "RECIPE: must be given, or --data, got both"),
        (["train", "recipes/lab.yaml", "--model", "x"], "--model: must be given with --data only"),
    ):
        assert main(wrong) == 2
        assert error in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["1", "-2.5", "$3,000", "50%"], "math"), ([1, 2.5], "math"), (["x = 2", "2\\pi"], "math"),
        (["A", "(B)", "C."], "letter"), (["Paris", "the red one"], "text"), ([WHY], "free"),
        (["A", "B", "C", "Paris", "Rome"], "text"),
        ([True, False], "none"), ([], "none"), ([["a"]], "none"), (["a\n#### 1"], "hash"),
    ],
)  # fmt: skip
def test_kinds_of_answers(values, kind):
    assert answer_kind(values).kind == kind
