"""gft-lite chat: once, from a pipe and on a terminal, against rollouts of the same policy."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import shutil
import signal
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
from gft_lite.tools.chat import Chat, show

PROBLEM, OTHER = "432*141-223-434=", "040-321-110+042="
TOKENS = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """What a run leaves, with an adapter that says something else than the base."""
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
    """Greedy rollouts of the policy and of its base, by the engine that trains."""
    [target] = find_targets([str(run)], PolicySettings())
    policy = load_policy(target.policy)
    format = PromptFormat(policy.tokenizer, PromptSettings())
    engine = start_engine(RolloutSettings(engine="transformers"), policy, run / "scratch")
    answers: dict[str, dict[str, str]] = {}
    for name, adapter in (("base", None), ("adapter", target.adapter)):
        engine.sync(adapter, 1)
        asked = [Request(format.prompt_ids(text), (0,)) for text in (PROBLEM, OTHER)]
        found = engine.generate(asked, Sampling(temperature=0, max_tokens=TOKENS))
        texts = [format.text(answer.token_ids) for [answer] in found]
        answers[name] = dict(zip((PROBLEM, OTHER), texts, strict=True))
    assert answers["base"][PROBLEM] != answers["adapter"][PROBLEM]
    return answers


def test_one_prompt_with_and_without_the_adapter(run, expected, capsys):
    assert main(["chat", str(run), "--prompt", PROBLEM]) == 0
    assert capsys.readouterr().out == expected["adapter"][PROBLEM] + "\n"
    assert main(["chat", str(run), "--prompt", PROBLEM, "--base"]) == 0
    assert capsys.readouterr().out == expected["base"][PROBLEM] + "\n"


def test_lines_of_a_pipe(run, expected, capsys, monkeypatch):
    lines = [PROBLEM, "", "/base", OTHER, "/base", "/what", "/reset", "/base", "/quit", PROBLEM]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", str(run)]) == 0
    told = capsys.readouterr()
    base, adapter = expected["base"], expected["adapter"]
    # /base asks the last question again; after /reset there is none.
    answers = [adapter[PROBLEM], base[PROBLEM], base[OTHER], adapter[OTHER]]
    assert told.out == "".join(f"{answer}\n" for answer in answers)
    assert "/reset" in told.err and told.err.count("the base alone") == 2


def test_answers_are_sampled_with_seeds_of_their_own(run):
    """At temperature 0 all first tokens would be one; a chat begun anew repeats itself."""
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


def test_turns_of_a_chat(tmp_path):
    """The prompt of a second turn is the whole conversation, written here by hand."""
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

    def rolled_out(text: str) -> str:
        ids = tuple(chat.policy.tokenizer.encode(text))
        asked = [Request(ids, (0,))]
        [[answer]] = engine.generate(asked, Sampling(temperature=0, max_tokens=8))
        return chat.format.text(answer.token_ids)

    engine = start_engine(RolloutSettings(engine="transformers"), chat.policy, tmp_path)
    first = ask(PROBLEM)
    assert first == rolled_out(f"<|user|>{PROBLEM}")
    second = ask(OTHER)
    assert second == rolled_out(f"<|user|>{PROBLEM}{first}<eos><|user|>{OTHER}")
    assert second != rolled_out(f"<|user|>{OTHER}")
    pieces: list[str] = []
    chat.again(pieces.append)
    assert "".join(pieces) == second and len(chat.turns) == 2
    chat.reset()
    assert ask(OTHER) == rolled_out(f"<|user|>{OTHER}")


def test_what_cannot_be_asked(run, capsys):
    wrong = ["--temperature", "-1", "--max-tokens", "0"]
    assert main(["chat", str(run), "--prompt", "x", *wrong]) == 2
    told = capsys.readouterr().err
    assert "--temperature: must be at least 0" in told and "--max-tokens: must be" in told
    assert main(["chat", str(run), "--prompt", "1" * 3000]) == 2
    assert "prompt: must have 1 to 2047 tokens" in capsys.readouterr().err
    assert main(["chat", "nowhere", "--prompt", "x"]) == 2
    assert "TARGET: must be lab" in capsys.readouterr().err


def test_an_answer_does_not_steer_the_terminal(capsys):
    show("a\x1b[2Jb\r\x07\x9b1m\tc\n")
    assert capsys.readouterr().out == "a\ufffd[2Jb\ufffd\ufffd\ufffd1m\tc\n"


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *command: str) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gft_lite", *command], stdin=slave, stdout=slave, stderr=slave,
            start_new_session=True, env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def until(self, pattern: str, seconds: float = 60) -> str:
        """What is written until the pattern has come."""
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
    terminal = Terminal("chat", "lab", "--style", "chat", "--max-tokens", "1900")
    try:
        terminal.until("base> ")
        terminal.type("hi\n")
        terminal.until("hhhh")  # What the base makes of a chat, with no end to it.
        terminal.process.send_signal(signal.SIGINT)
        assert len(terminal.until("stopped; Ctrl-D leaves")) < 1900
        terminal.until("base> ")
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.master)
