"""A quick look at a run, an adapter or a model: ask, and read the answer as it is written."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from rich.console import Console
from tokenizers.decoders import DecodeStream
from transformers import DynamicCache

from gft_lite.evaluation.targets import Target
from gft_lite.policy.base import evaluating
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import PromptSettings
from gft_lite.rollout.base import Sampling
from gft_lite.rollout.sampling import make_prompt_format, sample_seed
from gft_lite.rollout.transformers_engine import draw
from gft_lite.tools.merge import prompt_of
from gft_lite.utils.errors import RecipeError

HELP = "/base: adapter off or on, and the last question again   /reset   /quit   Ctrl-C: stop"
MAX_TOKENS = 512
# What a model writes must not steer the terminal.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Chat:
    """A policy that is asked question after question; `on_base` answers without the adapter.

    A plain prompt knows of no earlier turns, a chat template does.
    """

    def __init__(
        self, target: Target, sampling: Sampling, *, base: bool = False, style: str | None = None
    ) -> None:
        if target.policy.threads:
            torch.set_num_threads(target.policy.threads)
        self.policy = load_policy(target.policy)
        usual = prompt_of(target, self.policy.tokenizer)
        prompt = PromptSettings.model_validate({"style": style}) if style else usual
        self.format = make_prompt_format(self.policy, prompt, "prompt")
        self.sampling = sampling
        self.has_adapter = target.adapter is not None
        self.on_base = base or not self.has_adapter
        self.turns: list[tuple[str, str]] = []
        self.question: str | None = None
        self._asked = 0

    def ask(self, question: str, write: Callable[[str], object]) -> None:
        """Answer a question, handing over each piece of text as it comes.

        An answer that is broken off is no turn of the conversation.
        Raises: RecipeError for a prompt that the context has no room for.
        """
        self.question = question
        self._asked += 1
        self._answer(question, write)

    def again(self, write: Callable[[str], object]) -> None:
        """Answer the last question once more, with the same seed."""
        if self.question is None:
            return
        if self.turns and self.turns[-1][0] == self.question:
            self.turns.pop()
        self._answer(self.question, write)

    def reset(self) -> None:
        """Forget all turns."""
        self.turns, self.question = [], None

    def _answer(self, question: str, write: Callable[[str], object]) -> None:
        ids: list[int] = []
        decoder = DecodeStream(skip_special_tokens=True)
        for token in self._tokens(self._prompt_ids(question)):
            ids.append(token)
            if piece := decoder.step(self.policy.tokenizer.backend_tokenizer, token):
                write(piece)
        self.turns.append((question, self.format.text(ids)))

    def _prompt_ids(self, question: str) -> tuple[int, ...]:
        ids = self.format.prompt_ids(question)
        prompt = self.format.prompt
        if not self.turns or prompt.style == "plain":
            return ids
        system = prompt.system
        messages = [] if system is None else [{"role": "system", "content": system}]
        for asked, answer in [*self.turns, (question, "")]:
            text = prompt.template.replace("{problem}", asked)
            messages += [{"role": "user", "content": text},
                         {"role": "assistant", "content": answer}]  # fmt: skip
        return tuple(
            self.policy.tokenizer.apply_chat_template(
                messages[:-1], add_generation_prompt=True, return_dict=False
            )
        )

    @torch.no_grad()
    def _tokens(self, prompt_ids: tuple[int, ...]) -> Iterator[int]:
        """The answer's token ids, drawn as rollouts are."""
        policy, sampling = self.policy, self.sampling
        room = min(sampling.max_tokens, policy.context - len(prompt_ids))
        if room < 1 or not prompt_ids:
            rule = f"must have 1 to {policy.context - 1} tokens with all before it"
            raise RecipeError([f"prompt: {rule}, got {len(prompt_ids)}. /reset forgets the rest."])
        generator = torch.Generator().manual_seed(sample_seed(0, "chat", self._asked))
        cache = DynamicCache(config=policy.config)
        ids = torch.tensor([prompt_ids])
        for _ in range(room):
            with evaluating(policy), policy.base() if self.on_base else nullcontext():
                logits = policy.next_token_logits(ids.to(policy.device), cache).cpu()
            token = int(draw(logits, torch.rand(1, generator=generator), sampling))
            yield token
            if token in policy.eos_ids:
                return
            ids = torch.tensor([[token]])


def sampling_for(targets: Sequence[Target], temperature: float, tokens: int | None) -> Sampling:
    """How the one target answers; by default as long as in its run, if it is one.

    Raises: RecipeError for what can't be sampled with.
    """
    problems = []
    if len(targets) != 1:
        problems.append(f"TARGET: must be one, got {len(targets)}. Name one of its checkpoints.")
    if not 0 <= temperature < math.inf:
        problems.append(f"--temperature: must be at least 0, got {temperature:g}.")
    if tokens is not None and tokens < 1:
        problems.append(f"--max-tokens: must be at least 1, got {tokens}.")
    if problems:
        raise RecipeError(problems)
    run = targets[0].run
    if tokens is None:
        tokens = Recipe.load(run / "recipe.yaml").rollout.max_tokens if run else MAX_TOKENS
    return Sampling(temperature, max_tokens=tokens)


def show(piece: str) -> None:
    """Write a piece of an answer to standard output, without what would steer a terminal."""
    sys.stdout.write(_CONTROL.sub("\ufffd", piece))
    sys.stdout.flush()


def answer_once(chat: Chat, question: str) -> None:
    """Answer one question on standard output."""
    chat.ask(question, show)
    show("\n")


def talk(chat: Chat, console: Console) -> None:
    """Answer the lines of standard input, from a terminal or not, until it ends."""
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  # Gives input() its line editing and history.

        console.print(HELP, style="dim", highlight=False)
    while True:
        try:
            line = input(_prompt(chat) if terminal else "").strip()
            if line == "/quit":
                return
            if line:
                _obey(chat, line, console)
        except EOFError:
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            console.print("\nstopped; Ctrl-D leaves", style="dim")


def _prompt(chat: Chat) -> str:
    return "base> " if chat.on_base else "> "


def _obey(chat: Chat, line: str, console: Console) -> None:
    """A command, or a question."""
    try:
        if line == "/reset":
            chat.reset()
        elif line == "/base":
            if chat.has_adapter:
                chat.on_base = not chat.on_base
            name = "the base alone" if chat.on_base else "with the adapter"
            console.print(name, style="dim")
            if chat.has_adapter and chat.question is not None:
                chat.again(show)
                show("\n")
        elif line.startswith("/"):
            console.print(HELP, style="dim", highlight=False)
        else:
            answer_once(chat, line)
    except RecipeError as error:
        console.print(str(error), markup=False, highlight=False)
