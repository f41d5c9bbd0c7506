"""Conversations and template variables from the data file to the run, its card and its groups."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from gft_lite.cli import main
from gft_lite.data.problems import load_problems, split_holdout
from gft_lite.data.prompts import PromptFormat
from gft_lite.lab import BASE, rows
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import PolicySettings, PromptSettings
from gft_lite.rollout.prompt_check import check_chat_templates
from gft_lite.runs.folder import RunFolder
from gft_lite.types import Problem
from gft_lite.utils.errors import RecipeError

EARLIER = [
    {"role": "user", "content": "011+012="},
    {"role": "assistant", "content": "@023#023"},
]
SMALL = [
    "data.prompt.style=chat", "data.holdout=4", "train.steps=2", "train.problems_per_step=4",
    "monitor.problems=2", "eval.samples=1", "eval.k=[1]", "rollout.max_tokens=24",
    "eval.sets.test.problems=2", "eval.sets.retention.problems=2", "policy.quantization=none",
]  # fmt: skip
SFT = ["method=sft", "group={expert: 1, teacher: 0, self: 0, shortfall: drop}"]
GFT = ["group={expert: 1, teacher: 0, self: 2}", "data.columns.answer=gold"]
LAB_TEMPLATE = json.loads((BASE / "tokenizer_config.json").read_text())["chat_template"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with 24 conversations about problems of the lab, without answers."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "talks.jsonl")
    return tmp_path


def write_rows(path: Path, **more: Any) -> None:
    talks = [
        {
            "messages": [
                *EARLIER,
                {"role": "user", "content": row["problem"]},
                {"role": "assistant", "content": row["expert"][0]},
            ],
            "gold": row["answer"],
            **more,
        }
        for row in rows("train", 24)
    ]
    path.write_text("".join(json.dumps(talk) + "\n" for talk in talks))


def model(folder: Path, template: str | None) -> Path:
    """The lab's base with another chat template, or with none."""
    shutil.copytree(BASE, folder)
    file = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(file.read_text())
    del config["chat_template"]
    added: Mapping[str, str] = {"chat_template": template} if template else {}
    file.write_text(json.dumps({**config, **added}))
    return folder


def train(*overrides: str, out: str = "run", resume: bool = False) -> int:
    own = [*SMALL, "data.source=talks.jsonl", "checkpoint.every=1", *overrides, "--out", out]
    return main(["train", "recipes/lab.yaml", *own, *(["--resume"] if resume else [])])


def test_sft_on_conversations_without_answers(capsys):
    model(Path("model"), "{{ '<|user|>' if hint else '' }}" + LAB_TEMPLATE)
    hint = "data.prompt.chat_template_kwargs.hint=true"
    typo = "data.prompt.chat_template_kwargs.hin=1"
    own = [*SFT, "policy.model=model", hint, typo, "data.problems=12", "data.shuffle=false"]
    assert train(*own) == 0
    printed = capsys.readouterr().err
    assert "data.columns: messages: 'messages', answer: null, found by their names" in printed
    note = "data.prompt.chat_template_kwargs.hin: the model's chat template has no such variable."
    assert printed.count("has no such variable") == 1 and f"{note} Did you mean hint?" in printed
    run = RunFolder("run")
    recipe = Recipe.load(run.path / "recipe.yaml")
    assert recipe.data.prompt.chat_template_kwargs == {"hint": True, "hin": 1}
    groups = [group for step in (1, 2) for group in run.groups(step)]
    problems = [Problem.from_json(group["problem"]) for group in groups]
    assert len(problems) == 8 and {p.history for p in problems} == {(("011+012=", "@023#023"),)}
    assert {r["reward"] for g in groups for r in g["responses"]} == {None}
    tokenizer = AutoTokenizer.from_pretrained("model")
    format = PromptFormat(tokenizer, recipe.data.prompt)
    prompt = tokenizer.decode(format.problem_ids(problems[0]))
    start = "<|user|><|user|>011+012=@023#023<eos><|user|>"
    assert prompt.replace(" ", "").startswith(start)
    card = (run.adapter / "README.md").read_text()
    assert "add_generation_prompt=True, tokenize=False, **{'hint': True, 'hin': 1}" in card
    assert '"chat_template_kwargs": {"hint": true, "hin": 1}`' in card
    assert "loading model" in printed
    assert train(*own, "data.prompt.chat_template_kwargs.hint=false", resume=True) == 2
    assert "data.prompt.chat_template_kwargs.hint (true, now false)" in capsys.readouterr().err


def check_likelihoods(folder: RunFolder, recipe: Recipe) -> None:
    """Compare the held-out demonstrations' likelihood with transformers and PEFT on their own."""
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    format = PromptFormat(tokenizer, recipe.data.prompt)
    _, held_out = split_holdout(load_problems(recipe.data, format).problems, recipe.data.holdout)

    def nll() -> float:
        values = []
        for problem in held_out:
            prompt, [answer] = format.render(problem.text), problem.experts
            ids = tokenizer(prompt + answer, add_special_tokens=False).input_ids
            ids.append(tokenizer.eos_token_id)
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            start = len(problem.prompt_ids)
            values += [-logprobs[i - 1, ids[i]].item() for i in range(start, len(ids))]
        return fmean(values)

    evaluations = folder.step_evaluations()
    assert folder.evaluation("base")["held_out"]["nll"] == pytest.approx(nll(), abs=1e-4)
    model = PeftModel.from_pretrained(model, folder.adapter)
    trained = folder.evaluation("trained")["held_out"]
    assert trained["nll"] == pytest.approx(nll(), abs=1e-4)
    assert trained == evaluations[1]["held_out"]
    assert trained["nll"] < evaluations[0]["held_out"]["nll"] - 1e-3  # One step has been learned.
    assert folder.summary()["trained"]["nll"] == trained["nll"]
    assert folder.metrics()[0]["eval"]["held_out"]["perplexity"] == math.exp(trained["nll"])


def test_groups_of_conversations_are_those_of_the_whole_conversation(capsys):
    own = [*SMALL, *GFT, "data.source=talks.jsonl", "train.steps=1", "data.problems=12"]
    assert main(["groups", "recipes/lab.yaml", *own, "--out", "pool"]) == 0
    lines = [json.loads(line) for line in Path("pool/groups.jsonl").read_text().splitlines()]
    assert {json.dumps(line["problem"]["history"]) for line in lines} == {
        '[["011+012=", "@023#023"]]'
    }
    offline = [*own, "group.offline=pool"]
    assert main(["train", "recipes/lab.yaml", *offline, "--out", "good"]) == 0
    capsys.readouterr()
    text = Path("talks.jsonl").read_text()
    Path("talks.jsonl").write_text(text.replace("@023#023", "@023#123"))
    assert main(["train", "recipes/lab.yaml", *offline, "--out", "other"]) == 2
    assert "group.offline: must be of the same data" in capsys.readouterr().err


def test_a_teacher_answers_whole_conversations_and_they_are_trained_on():
    source = [*SMALL, "data.source=talks.jsonl", "data.columns.answer=gold", "data.problems=6"]
    opens = "{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"
    model(Path("teacher"), LAB_TEMPLATE + opens)
    own = ["--teacher", "teacher", "--samples", "2", "--out", "taught.jsonl"]
    assert main(["distill", "recipes/lab.yaml", *source, *own]) == 0
    taught = [json.loads(line) for line in Path("taught.jsonl").read_text().splitlines()]
    assert all(row["messages"][:2] == EARLIER for row in taught)
    texts = [text for row in taught for text in row["teacher"]]
    # What the teacher's prompt opens is not in the prompts of other models.
    assert texts and all(text.startswith("<think>") for text in texts)
    Path("r.yaml").write_text("extends: [recipes/lab.yaml, taught.distill/data.yaml]\n")
    mixed = ["group={expert: 1, teacher: 1, self: 1, shortfall: self}", "data.holdout=1"]
    given = [value for value in SMALL if not value.startswith("data.holdout")]
    assert main(["train", "r.yaml", *given, *mixed, "--out", "mixed"]) == 0
    sources = {r["source"] for g in RunFolder("mixed").groups(1) for r in g["responses"]}
    assert sources >= {"expert", "self"}


@pytest.mark.parametrize(
    ("template", "overrides", "error"),
    [
        (None, [], "data.prompt.style: must be plain for a model without a chat template, got"),
        ("{% if %}", [], "data.prompt.style: must suit the model's chat template, which says: "),
        (
            "{{ 1 / n if n is defined }}" + LAB_TEMPLATE, ["data.prompt.chat_template_kwargs.n=0"],
            "data.prompt.chat_template_kwargs: must suit the model's chat template, which says: "
            "division by zero",
        ),
        (
            LAB_TEMPLATE, ["data.prompt.chat_template_kwargs.tokenize=true"],
            "data.prompt.chat_template_kwargs.tokenize: must be a variable of the chat template",
        ),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_used_is_one_error(template, overrides, error, here, capsys):
    model(here / "model", template)
    assert train(*SFT, "policy.model=model", *overrides) == 2
    printed = capsys.readouterr().err
    assert printed.count(error) == 1 and "Traceback" not in printed
    assert not Path("run").exists()


def test_a_template_is_checked_without_weights(here):
    folder = model(here / "model", "{{ 1 / n }}" + LAB_TEMPLATE)
    (folder / "model.safetensors").unlink()
    policy = PolicySettings(model=str(folder))
    prompts = {f"data.{n}": PromptSettings(style="chat", system=n) for n in ("a", "b")}
    with pytest.raises(RecipeError) as caught:
        check_chat_templates(policy, {**prompts, "data.c": prompts["data.a"]})
    assert [line.partition(":")[0] for line in caught.value.problems] == [
        "data.a.system", "data.b.system",
    ]  # fmt: skip
    check_chat_templates(policy, {"data.plain": PromptSettings()})
    (folder / "tokenizer.json").write_text("{")  # Reported with the other files of the model.
    check_chat_templates(policy, prompts)


def test_conversations_in_plain_style_and_rewards_without_answers_are_errors(capsys):
    assert train(*SFT, "data.prompt.style=plain") == 2
    expected = "data.prompt.style: must be chat for the conversations in column 'messages'"
    assert expected in capsys.readouterr().err
    assert train(*GFT, "data.columns.answer=answer") == 2
    expected = "data.columns.answer: must name a column, as reward exact compares with it, got null"
    assert expected in capsys.readouterr().err
    assert not Path("run").exists()


def test_training_on_data_without_a_recipe_and_without_answers(capsys):
    pairs = [{"prompt": row["problem"], "completion": f"It is {row['expert'][0]}, which is all."}
             for row in rows("train", 12)]  # fmt: skip
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    small = [
        "train.steps=1",
        "train.problems_per_step=4",
        "monitor.problems=1",
        "policy.threads=1",
        "policy.dtype=float32",
        "eval.every=1",
        "checkpoint.best.metric=held_out/nll",
    ]
    words = ["train", "--data", "pairs.jsonl", "--model", "lab", *small, "--out", "run"]
    assert main(words) == 0
    printed = capsys.readouterr().err
    assert "data.columns.expert=[completion]" in printed
    assert "evaluating the base on held_out" in printed and "held_out/nll: " in printed
    assert "no reward function applied" not in printed
    folder = RunFolder("run")
    recipe = Recipe.load("run/recipe.yaml")
    assert (recipe.method, recipe.data.columns.answer, recipe.data.holdout) == ("sft", None, 2)
    [step] = folder.metrics()
    assert (step["trajectories"], step["best_step"]) == (4, 1)
    check_likelihoods(folder, recipe)
    assert (folder.path / "adapter" / "adapter_model.safetensors").is_file()
    assert main([*words, "--resume"]) == 0  # The same guesses.
