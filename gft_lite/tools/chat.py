"""`gft-lite chat`: a conversation with a run, an adapter or a model, printed token by token."""

from __future__ import annotations

import io
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from rich.console import Console
from tokenizers.decoders import DecodeStream
from transformers import DynamicCache

from gft_lite.data.base import Unusable
from gft_lite.evaluation.targets import Target
from gft_lite.policy.base import evaluating
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import PromptSettings
from gft_lite.rollout.base import Sampling
from gft_lite.rollout.prompt_check import check_chat_templates
from gft_lite.rollout.sampling import graded_text, make_prompt_format, sample_seed
from gft_lite.rollout.transformers_engine import draw
from gft_lite.tools.merge import prompt_settings_of
from gft_lite.utils.cpu import set_threads
from gft_lite.utils.errors import UserError
from gft_lite.utils.secrets import redact

HELP = "/base: adapter off or on, and the last question again   /reset   /quit   Ctrl-C: stop"
MAX_TOKENS = 512
# Control characters in a model's text could change the state of the terminal.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Chat:
    """A conversation with a policy; `on_base` switches its adapter off.

    Earlier turns are part of a chat prompt, but not of a plain one.
    """

    def __init__(
        self, target: Target, sampling: Sampling, *, base: bool = False, style: str | None = None
    ) -> None:
        set_threads(target.policy.threads)
        given = PromptSettings.model_validate({"style": style}) if style else None
        if given is not None:
            check_chat_templates(target.policy, {"prompt": given})
        self.policy = load_policy(target.policy)
        default = prompt_settings_of(target, self.policy.tokenizer)
        prompt = default if given is None or given.style == default.style else given
        self.format = make_prompt_format(self.policy, prompt, "prompt")
        self.sampling = sampling
        self.has_adapter = target.adapter is not None
        self.on_base = base or not self.has_adapter
        self.turns: list[tuple[str, str]] = []
        self.question: str | None = None
        self._questions = 0

    def ask(self, question: str, write: Callable[[str], object]) -> None:
        """Answer a question; `write` gets each piece of text as soon as it is sampled.

        An interrupted answer does not become a turn of the conversation.
        Raises: UserError for a prompt that does not fit into the context.
        """
        self.question = question
        self._questions += 1
        self._answer(question, write)

    def ask_again(self, write: Callable[[str], object]) -> None:
        """Answer the last question again with the same seed."""
        if self.question is None:
            return
        if self.turns and self.turns[-1][0] == self.question:
            self.turns.pop()
        self._answer(self.question, write)

    def reset(self) -> None:
        """Remove all turns."""
        self.turns, self.question = [], None

    def _answer(self, question: str, write: Callable[[str], object]) -> None:
        ids: list[int] = []
        stop = self.sampling.stop
        held = max((len(s) - 1 for s in stop), default=0)  # May begin a stop string.
        written = 0
        decoder = DecodeStream(skip_special_tokens=False)
        text = ""
        try:
            prompt_ids = self.format.prompt_ids(question, self.turns)
        except Unusable as reason:
            raise UserError([f"prompt: must suit the chat template, got {reason}."]) from None
        for token in self._sample(prompt_ids):
            ids.append(token)
            if token in self.policy.eos_ids:
                break
            text += decoder.step(self.policy.tokenizer.backend_tokenizer, token) or ""
            if any(s in text for s in stop):
                break
            if len(text) - held > written:
                write(text[written : len(text) - held])
                written = len(text) - held
        answer = graded_text(ids, self.format, stop)
        write(answer[written:])
        self.turns.append((question, self.format.opened_thoughts + answer))

    @torch.no_grad()
    def _sample(self, prompt_ids: tuple[int, ...]) -> Iterator[int]:
        """Token ids after the prompt, sampled as in rollouts, until the length limit."""
        policy, sampling = self.policy, self.sampling
        room = min(sampling.max_tokens, policy.context - len(prompt_ids))
        if room < 1 or not prompt_ids:
            rule = f"must have 1 to {policy.context - 1} tokens with all earlier turns"
            raise UserError([f"prompt: {rule}, got {len(prompt_ids)}. /reset removes the turns."])
        generator = torch.Generator().manual_seed(sample_seed(0, "chat", self._questions))
        cache = DynamicCache(config=policy.config)
        ids = torch.tensor([prompt_ids])
        for _ in range(room):
            with evaluating(policy), policy.base() if self.on_base else nullcontext():
                logits = policy.next_token_logits(ids.to(policy.device), cache).cpu()
            token = int(draw(logits, torch.rand(1, generator=generator), sampling))
            yield token
            ids = torch.tensor([[token]])


def sampling_for(targets: Sequence[Target], temperature: float, tokens: int | None) -> Sampling:
    """The sampling settings for the one target; of its run, if it has one.

    Raises: UserError for several targets or values outside their range.
    """
    problems = []
    if len(targets) != 1:
        problems.append(f"TARGET: must be one, got {len(targets)}. Name one of its checkpoints.")
    if not 0 <= temperature < math.inf:
        problems.append(f"--temperature: must be at least 0, got {temperature:g}.")
    if tokens is not None and tokens < 1:
        problems.append(f"--max-tokens: must be at least 1, got {tokens}.")
    if problems:
        raise UserError(problems)
    if (run := targets[0].run) is None:
        return Sampling(temperature, max_tokens=tokens or MAX_TOKENS)
    rollout = Recipe.load(run / "recipe.yaml").rollout
    return Sampling(temperature, max_tokens=tokens or rollout.max_tokens, stop=tuple(rollout.stop))


def write_text(piece: str) -> None:
    """Write a piece of an answer to standard output, with control characters replaced."""
    sys.stdout.write(_CONTROL.sub("\ufffd", piece))
    sys.stdout.flush()


def answer_once(chat: Chat, question: str) -> None:
    """Answer one question on standard output."""
    chat.ask(question, write_text)
    write_text("\n")


def interact(chat: Chat, console: Console) -> None:
    """Answer each line of standard input until its end; on a terminal, with a prompt."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # Lone surrogates can't be tokenized.
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  # Gives input() line editing and a history.

        console.print(HELP, style="dim", highlight=False)
    while True:
        try:
            line = input(_input_prompt(chat) if terminal else "").strip()
            if line == "/quit":
                return
            if line:
                _handle_line(chat, line, console)
        except EOFError:
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            console.print("\nstopped; Ctrl-D leaves", style="dim")


def _input_prompt(chat: Chat) -> str:
    return "base> " if chat.on_base else "> "


def _handle_line(chat: Chat, line: str, console: Console) -> None:
    """Run a command that begins with "/", or answer a question."""
    try:
        if line == "/reset":
            chat.reset()
        elif line == "/base":
            if chat.has_adapter:
                chat.on_base = not chat.on_base
            name = "the base alone" if chat.on_base else "with the adapter"
            console.print(name, style="dim")
            if chat.has_adapter and chat.question is not None:
                chat.ask_again(write_text)
                write_text("\n")
        elif line.startswith("/"):
            console.print(HELP, style="dim", highlight=False)
        else:
            answer_once(chat, line)
    except UserError as error:
        console.print(redact(str(error)), markup=False, highlight=False)
