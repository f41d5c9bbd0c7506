"""`gft-lite chat` with one prompt, a pipe and a terminal, compared with rollouts of the policy."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gft_lite.cli import main
from gft_lite.data.prompts import PromptFormat
from gft_lite.evaluation.targets import find_targets
from gft_lite.lab import BASE
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import PolicySettings, PromptSettings, RolloutSettings
from gft_lite.rollout.base import Request, Sampling
from gft_lite.rollout.registry import start_engine
from gft_lite.tools.chat import Chat, write_text
from gft_lite.utils.errors import UserError

PROBLEM, OTHER = "432*141-223-434=", "040-321-110+042="
TOKENS = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run whose adapter changes the answers of the base."""
    folder = tmp_path_factory.mktemp("runs") / "lab"
    overrides = ["policy.dtype=float32", f"rollout.max_tokens={TOKENS}"]
    recipe = Recipe.load("recipes/lab.yaml", overrides)
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    policy = load_policy(recipe.policy)
    torch.manual_seed(0)
    for name, parameter in policy.parameters().items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.03)
    policy.save_adapter(folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def expected(run) -> dict[str, dict[str, str]]:
    """Greedy rollouts of the policy and of its base by the transformers engine."""
    [target] = find_targets([str(run)], PolicySettings())
    policy = load_policy(target.policy)
    format = PromptFormat(policy.tokenizer, PromptSettings())
    engine = start_engine(RolloutSettings(engine="transformers"), policy, run / "scratch")
    answers: dict[str, dict[str, str]] = {}
    for name, adapter in (("base", None), ("adapter", target.adapter)):
        engine.sync(adapter, 1)
        requests = [Request(format.prompt_ids(text), (0,)) for text in (PROBLEM, OTHER)]
        found = engine.generate(requests, Sampling(temperature=0, max_tokens=TOKENS))
        texts = [format.text(answer.token_ids) for [answer] in found]
        answers[name] = dict(zip((PROBLEM, OTHER), texts, strict=True))
    assert answers["base"][PROBLEM] != answers["adapter"][PROBLEM]
    return answers


def test_one_prompt_with_and_without_the_adapter(run, expected, capsys):
    assert main(["chat", str(run), "--prompt", PROBLEM]) == 0
    assert capsys.readouterr().out == expected["adapter"][PROBLEM] + "\n"
    assert main(["chat", str(run), "--prompt", PROBLEM, "--base"]) == 0
    assert capsys.readouterr().out == expected["base"][PROBLEM] + "\n"


def test_each_line_of_a_pipe_is_answered(run, expected, capsys, monkeypatch):
    lines = [PROBLEM, "", "/base", OTHER, "/base", "/what", "/reset", "/base", "/quit", PROBLEM]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", str(run)]) == 0
    printed = capsys.readouterr()
    base, adapter = expected["base"], expected["adapter"]
    # /base repeats the last question; after /reset there is none.
    answers = [adapter[PROBLEM], base[PROBLEM], base[OTHER], adapter[OTHER]]
    assert printed.out == "".join(f"{answer}\n" for answer in answers)
    assert "/reset" in printed.err and printed.err.count("the base alone") == 2


def test_every_answer_has_its_own_seed(run):
    """Equal seeds would sample equal first tokens; a new chat repeats the same samples."""
    [target] = find_targets([str(run)], PolicySettings())
    chat = Chat(target, Sampling(temperature=3.0, max_tokens=1))
    firsts: list[str] = []
    for _ in range(40):
        chat.ask(PROBLEM, firsts.append)
    assert len(set(firsts)) > 5
    again = Chat(target, Sampling(temperature=3.0, max_tokens=1))
    repeated: list[str] = []
    for _ in range(40):
        again.ask(PROBLEM, repeated.append)
    assert repeated == firsts


def test_the_prompt_of_a_second_turn(tmp_path):
    """The prompt of the second turn is the whole conversation, here written by hand."""
    folder = tmp_path / "model"
    shutil.copytree(BASE, folder)
    settings = PolicySettings(quantization="none", dtype="float32")
    [target] = find_targets([str(folder)], settings)
    chat = Chat(target, Sampling(temperature=0, max_tokens=8))
    assert chat.format.prompt.style == "chat" and chat.on_base

    def ask(question: str) -> str:
        pieces: list[str] = []
        chat.ask(question, pieces.append)
        return "".join(pieces)

    def rollout(text: str) -> str:
        ids = tuple(chat.policy.tokenizer.encode(text))
        [[answer]] = engine.generate([Request(ids, (0,))], Sampling(temperature=0, max_tokens=8))
        return chat.format.text(answer.token_ids)

    engine = start_engine(RolloutSettings(engine="transformers"), chat.policy, tmp_path)
    first = ask(PROBLEM)
    assert first == rollout(f"<|user|>{PROBLEM}")
    second = ask(OTHER)
    assert second == rollout(f"<|user|>{PROBLEM}{first}<eos><|user|>{OTHER}")
    assert second != rollout(f"<|user|>{OTHER}")
    pieces: list[str] = []
    chat.ask_again(pieces.append)
    assert "".join(pieces) == second and len(chat.turns) == 2
    chat.reset()
    assert ask(OTHER) == rollout(f"<|user|>{OTHER}")
    chat.policy.tokenizer.chat_template = "{{ messages[0].content | upper }}"
    with pytest.raises(UserError, match="prompt: must suit the chat template, got a problem that"):
        ask("in small letters")


def test_thoughts_that_the_prompt_opens_are_part_of_a_turn(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(BASE, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] += "{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    [target] = find_targets([str(folder)], PolicySettings(quantization="none", dtype="float32"))
    chat = Chat(target, Sampling(temperature=0, max_tokens=8))
    pieces: list[str] = []
    chat.ask(PROBLEM, pieces.append)
    assert chat.turns == [(PROBLEM, "<think>" + "".join(pieces))]
    prompt = chat.format.render(OTHER, chat.turns)
    assert prompt.count("<think>") == 2 and prompt.endswith("<think>")


def test_wrong_arguments_end_in_exit_code_2(run, capsys):
    for flag, value, rule in (
        ("--temperature", "-1", "must be a number and at least 0, got '-1'"),
        ("--temperature", "nan", "must be a number and at least 0, got 'nan'"),
        ("--max-tokens", "0", "must be a whole number from 1 to 1,048,576, got '0'"),
    ):
        assert main(["chat", str(run), "--prompt", "x", f"{flag}={value}"]) == 2
        assert capsys.readouterr().err == f"{flag}: {rule}. See gft-lite chat --help.\n"
    assert main(["chat", str(run), "--prompt", "1" * 3000]) == 2
    assert "prompt: must have 1 to 2047 tokens" in capsys.readouterr().err
    assert main(["chat", "nowhere", "--prompt", "x"]) == 2
    assert "TARGET: must be lab" in capsys.readouterr().err


def test_control_characters_are_replaced(capsys):
    write_text("a\x1b[2Jb\r\x07\x9b1m\tc\n")
    assert capsys.readouterr().out == "a\ufffd[2Jb\ufffd\ufffd\ufffd1m\tc\n"


# Ctrl-C in the middle of an answer, however fast it is: at its fourth letter.
INTERRUPTED = """
import os, signal, sys
from gft_lite.cli import main
write, letters = sys.stdout.write, []
def interrupted(text):
    write(text)
    letters.extend(text)
    if letters == ["h"] * 4:
        os.kill(os.getpid(), signal.SIGINT)
sys.stdout.write = interrupted
sys.exit(main(sys.argv[1:]))
"""


class Terminal:
    """The command line on a pseudo-terminal."""

    def __init__(self, code: str, *command: str) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *command], stdin=slave, stdout=slave, stderr=slave,
            start_new_session=True, env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def until(self, pattern: str, seconds: float = 600) -> str:
        """The output up to a match of the pattern."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self.master], [], [], max(0, left))
            assert ready, f"no {pattern!r} in {self.seen!r}"
            self.seen += os.read(self.master, 4096).decode(errors="replace")
        text, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return text

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


def test_on_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_leaves(run, expected):
    terminal = Terminal(INTERRUPTED, "chat", "lab", "--style", "chat", "--max-tokens", "1900")
    try:
        terminal.until("base> ")
        terminal.type("hi\n")
        # The base's answer to a chat prompt does not end.
        assert re.search("h{4,5}\\s+stopped", terminal.until("stopped; Ctrl-D leaves"))
        terminal.until("base> ")
        terminal.type("\x04")
        assert terminal.process.wait(600) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.master)
