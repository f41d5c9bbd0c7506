"""The code in a model card, run as it stands, ends its responses where training ended them."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path

import pytest
from forked import ForkServer
from rich.console import Console

from gft_lite.data.prompts import PromptFormat
from gft_lite.lab import BASE
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.schema import Recipe
from gft_lite.runs.export import read_end_tokens
from gft_lite.runs.folder import RunFolder
from gft_lite.runs.model_card import merged_card
from gft_lite.training.run import train
from gft_lite.utils.errors import UserError

SMALL = [
    "method=sft", "group={expert: 1, teacher: 0, self: 0}", "train.steps=12", "optim.lr=1e-2",
    "train.problems_per_step=8", "data.problems=64", "data.holdout=2", "monitor.every=0",
    "monitor.problems=1", "eval.samples=1", "eval.k=[1]", "eval.sets.test.problems=1",
    "eval.sets.retention.problems=1", "checkpoint.every=12",
]  # fmt: skip
PROBLEM = "011-012+131....="


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The lab base with a chat template that has a variable, and ends turns with another token
    than EOS."""
    folder = tmp_path_factory.mktemp("model") / "base"
    shutil.copytree(BASE, folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    template = config["chat_template"].replace("<eos>", "<|user|>")
    config["chat_template"] = "{{ '<|user|>' if twice else '' }}" + template
    file.write_text(json.dumps(config), encoding="utf-8")
    return folder


def run_example(
    server: ForkServer, card: Path, adapter: Path, folder: Path
) -> tuple[list[int], list[int], str]:
    """Prompt ids, response ids and printed text of the card's Python code."""
    [code] = re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)
    code = code.replace("What is 12 * 7?", PROBLEM).replace('"ADAPTER"', repr(str(adapter)))
    code += "import json; print(json.dumps([inputs.input_ids[0].tolist(), response.tolist()]))\n"
    with contextlib.chdir(folder):
        done = server.run(code=code)
    assert done.returncode == 0, done.stderr
    text, _, ids = done.stdout.rstrip("\n").rpartition("\n")
    prompt, response = json.loads(ids)
    return prompt, response, text


@pytest.mark.parametrize("style", ["chat", "plain"])
def test_the_code_of_a_card(style: str, base: Path, tmp_path: Path, fork_server: ForkServer):
    overrides = [*SMALL, f"policy.model={base}", f"data.prompt.style={style}"]
    overrides.append({"plain": "data.prompt.template='{problem}'",
                      "chat": "data.prompt.chat_template_kwargs.twice=true"}[style])  # fmt: skip
    recipe = Recipe.load("recipes/lab.yaml", overrides)
    run = train(recipe, tmp_path / "run", console=Console(quiet=True))
    policy = load_policy(recipe.policy)
    format = PromptFormat(policy.tokenizer, recipe.data.prompt)
    user, eos = policy.tokenizer.convert_tokens_to_ids(["<|user|>", "<eos>"])
    ends = {"chat": {user: "<|user|>", eos: "<eos>"}, "plain": {eos: "<eos>"}}[style]
    assert read_end_tokens(run.adapter) == ends
    card = run.adapter / "README.md"
    prompt, response, text = run_example(fork_server, card, run.adapter, base.parent)
    assert tuple(prompt) == format.prompt_ids(PROBLEM)
    assert prompt.count(user) == (2 if style == "chat" else 0)
    assert response[-1] == (user if style == "chat" else eos)
    assert not set(response[:-1]) & ends.keys()
    assert text == format.text(response)
    variables = ', "chat_template_kwargs": {"twice": true}' if style == "chat" else ""
    needed = f'`"stop_token_ids": {sorted(ends)}{variables}`'
    assert needed in card.read_text(encoding="utf-8")
    assert (run.adapter / "tokenizer_config.json").exists()


def test_a_run_that_was_killed_before_its_summary_has_a_card_without_results(tmp_path: Path):
    run = RunFolder(tmp_path / "run")
    run.create(Recipe.load("recipes/lab.yaml").to_yaml())
    text = merged_card("lab", "run", run, "The figures.")
    assert "The figures." in text and "## Recipe" in text and "## Results" not in text


def test_a_damaged_generation_config_is_named(tmp_path: Path):
    file = tmp_path / "generation_config.json"
    assert read_end_tokens(tmp_path) == {}
    for damage in ("{}", "{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": null}'):
        file.write_text(damage, encoding="utf-8")
        with pytest.raises(UserError, match=r"generation_config\.json.*Restore the file"):
            read_end_tokens(tmp_path)
