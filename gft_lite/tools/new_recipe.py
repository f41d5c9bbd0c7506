"""A recipe for a data set and a model that nobody has described: guesses with their reasons."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gft_lite.data.detect import MARKER, Detected, Guess, detect
from gft_lite.data.sources import FORMATS
from gft_lite.objective.methods import METHODS
from gft_lite.planning.gpus import Machine, named_machine, own_machine
from gft_lite.planning.hub_config import read_hub_file
from gft_lite.planning.model_shape import ModelShape, find_shape
from gft_lite.planning.planner import Plan, plan_for, what_would_fit
from gft_lite.policy.model_files import check_model_files
from gft_lite.policy.registry import model_location
from gft_lite.recipe.base import is_hub_id
from gft_lite.recipe.effects import leaves
from gft_lite.recipe.loader import Dumper, merge, nested, read_overrides
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import PolicySettings
from gft_lite.utils.cpu import has_bf16_instructions
from gft_lite.utils.errors import RecipeError, UserError
from gft_lite.utils.memory import GIB

NO_REWARD = (
    "sft, dft, asft and psft need no reward (method=dft). For GFT and GRPO give a function of "
    "your own (reward.functions=my_module:score) or a judge"
)
_COLUMNS = "data.columns."
GROUP_SIZE, MAX_TEACHERS = 8, 3  # Of the paper's groups, which hold 1 expert's and 4 self.
CHAT_TOKENS = 20  # Of a chat template with its system message.
TEMPLATE_TOKENS = 48  # At least, of it and the prompt's template.
CPU_SHARE = 0.2  # Of the free RAM, for weights that are not quantised.
CHARS_PER_TOKEN = 3  # Where the model's tokenizer is not on this machine.


@dataclass(frozen=True, slots=True)
class Draft:
    """A recipe, the guesses it consists of, and its memory plan; `unplanned` says why not."""

    source: str
    detected: Detected
    guesses: tuple[Guess, ...]
    recipe: Recipe
    plan: Plan | None
    unplanned: str = ""

    @property
    def doubts(self) -> list[str]:
        """What the user should look at."""
        return [f"{g.field}: {g.doubt}" for g in self.guesses if g.doubt]


def draft_recipe(source: str, model: str, gpu: str | None, overrides: Sequence[str]) -> Draft:
    """The recipe for a data set and a model; `overrides` go before guesses.

    Raises: UserError for a data set, model, GPU or override that is wrong or can't be trained.
    """
    machine = named_machine(gpu) if gpu else own_machine()
    tree = read_overrides(overrides)
    given = {field: value for field, value in leaves(tree) if value != {}}
    check_model_files(PolicySettings(model=model))
    # By a method without rewards, as answers may only be found in the data.
    data = tree.get("data", {})
    known = {"source": source, **data} if isinstance(data, Mapping) else data
    settings = Recipe.from_tree({"method": "sft", "data": known}).data
    columns = {f.removeprefix(_COLUMNS): v for f, v in given.items() if f.startswith(_COLUMNS)}
    detected = detect(settings, columns)
    shape, unplanned = _shape(model)
    facts = _Facts(source, model, detected, shape, given, machine)
    guesses = _with_given(tuple(facts.guesses()), given)
    recipe = Recipe.from_tree(_tree(guesses))
    if unplanned:
        return Draft(source, detected, guesses, recipe, None, unplanned)
    return Draft(source, detected, guesses, recipe, plan_for(recipe, gpu))


def _shape(model: str) -> tuple[ModelShape | None, str]:
    try:
        return find_shape(model), ""
    except RecipeError as error:
        return None, str(error)


def _with_given(guesses: Sequence[Guess], given: Mapping[str, Any]) -> tuple[Guess, ...]:
    """The guesses, with those of fields that the user sets replaced."""
    kept = [g for g in guesses if g.field not in given]
    own = [Guess(field, value, "as given") for field, value in given.items()]
    return (*kept, *own)


def _tree(guesses: Sequence[Guess]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for guess in guesses:
        tree = merge(tree, nested(guess.field, guess.value))
    return tree


def chat_template(model: str) -> bool | None:
    """Whether the model has a chat template; None if that can't be found out here."""
    read: Callable[[str], bytes | None]
    folder = Path(model_location(model))
    if folder.is_dir():

        def read(name: str) -> bytes | None:
            return (folder / name).read_bytes() if (folder / name).is_file() else None
    elif is_hub_id(model):

        def read(name: str) -> bytes | None:
            return read_hub_file(model, name)
    else:
        return False
    try:
        if read("chat_template.jinja") is not None:
            return True
        return b'"chat_template"' in (read("tokenizer_config.json") or b"")
    except RecipeError:
        return None


def token_counter(model: str) -> tuple[Callable[[str], int], str]:
    """A function that counts tokens, and how it does."""

    def by_letters(text: str) -> int:
        return math.ceil(len(text) / CHARS_PER_TOKEN)

    estimate = by_letters, "by an estimate from its letters"
    file = Path(model_location(model)) / "tokenizer.json"
    if not file.is_file() and is_hub_id(model):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model, "tokenizer.json")
        file = Path(cached) if isinstance(cached, str) else file
    if not file.is_file():
        return estimate
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # Of a damaged file; tokenizers raises nothing more specific.
        return estimate
    return lambda text: len(tokenizer.encode(text).ids), "by the model's tokenizer"


@dataclass(frozen=True)
class _Facts:
    """What the guesses about training follow from."""

    source: str
    model: str
    detected: Detected
    shape: ModelShape | None
    given: Mapping[str, Any]
    machine: Machine

    @property
    def on_gpu(self) -> bool:
        """True if the recipe is for a GPU."""
        return self.machine.device == "cuda"

    def guesses(self) -> Iterator[Guess]:
        """Every guess, in the order of the recipe."""
        data, model = _slug(self.source), _slug(self.model)
        yield Guess("name", f"{data}-{model}", "the data and the model")
        method = self._method()
        yield method
        prompt, response = self._lengths(str(method.value))
        yield Guess("policy.model", self.model, "as given")
        room = _round_up(prompt.value + response.value + 1)
        context = min(room, self._context)
        yield Guess("policy.context", context, "prompt and response together, in tokens")
        yield from self._cpu_policy()
        for field in ("policy.gradient_checkpointing", "policy.offload_checkpoints",
                      "policy.offload_embedding"):  # fmt: skip
            yield Guess(field, "auto", "the memory plan decides")
        d = self.detected
        doubt = f"{d.unusable} of {d.looked_at} rows can't be read" if d.unusable else ""
        yield Guess("data.source", self.source, "as given", doubt)
        yield from self.detected.guesses
        yield self._style()
        yield prompt
        yield self._holdout()
        yield from self._group(str(method.value))
        yield from self._reward()
        yield response
        yield from self._cpu_engine(str(method.value))
        yield Guess("rollout.batch_size", "auto", "the memory plan decides")
        yield Guess("optim.lr", "auto", "by the model's width and the method; --lr-range measures")
        yield from self._course(str(method.value))

    @property
    def _context(self) -> int:
        return self.shape.context if self.shape else 4096

    def _cpu_policy(self) -> Iterator[Guess]:
        """Weights that a CPU need not dequantise for every product, where they fit."""
        if self.on_gpu or self.shape is None:
            return
        weights = 4 * (self.shape.linear_parameters + self.shape.plain_parameters)
        if weights < CPU_SHARE * self.machine.size:
            yield Guess("policy.quantization", "none", "a CPU dequantises weights for each product")
        if has_bf16_instructions():
            yield Guess("policy.dtype", "bfloat16", "this CPU has instructions for it")

    def _cpu_engine(self, method: str) -> Iterator[Guess]:
        known = METHODS.get(method)
        samples = known is None or "self" in known.sources
        if not self.on_gpu and samples and importlib.util.find_spec("vllm"):
            yield Guess("rollout.engine", "vllm", "it samples faster than transformers on a CPU")

    def _method(self) -> Guess:
        d, rewarded = self.detected, "reward.functions" in self.given
        if "method" in self.given:
            return Guess("method", self.given["method"], "as given")
        if d.reward or rewarded:
            if d.experts or d.teachers:
                return Guess("method", "gft", "answers are graded, and demonstrations are there")
            return Guess("method", "grpo", "answers are graded, and there are no demonstrations")
        if not d.experts and d.teachers:
            return Guess("method", "distillation", f"no reward, as {d.why_reward}", NO_REWARD)
        if d.experts:
            return Guess("method", "sft", f"no reward, as {d.why_reward}", NO_REWARD)
        columns = ", ".join(d.columns[:20])
        rule = "DATA: must have answers or demonstrations to learn from"
        raise UserError(
            [f"{rule}, got prompts alone in the columns {columns}. Give a reward "
             "(reward.functions=my_module:score or judge), name a column "
             "(data.columns.answer=NAME), or let a teacher answer them: gft-lite distill."]
        )  # fmt: skip

    def _style(self) -> Guess:
        has = chat_template(self.model)
        named = bool(re.search(r"instruct|chat|[-_]it\b", self.model, re.IGNORECASE))
        if has is None:
            doubt = "the model's files can't be read here; the style follows from its name"
            style = "chat" if named else "plain"
            return Guess("data.prompt.style", style, "by the name of the model", doubt)
        if has:
            return Guess("data.prompt.style", "chat", "the model has a chat template")
        if self.detected.conversations and "data.prompt.style" not in self.given:
            rule = "policy.model: must have a chat template for a data set of conversations"
            raise UserError([f"{rule}, got {self.model!r} without. Use an instruct model."])
        return Guess("data.prompt.style", "plain", "the model has no chat template")

    def _lengths(self, method: str) -> tuple[Guess, Guess]:
        """The longest prompt and the longest response, in tokens."""
        count, how = token_counter(self.model)
        d = self.detected
        guessed = {g.field: g.value for g in d.guesses} | dict(self.given)
        template = str(guessed.get("data.prompt.template", ""))
        overhead = max(TEMPLATE_TOKENS, count(template) + CHAT_TOKENS)
        prompts = sorted(map(count, d.problems)) or [256]
        prompt = min(_round_up(_at(prompts, 0.99) + overhead), self._context // 2)
        lengths = sorted(map(count, d.demonstrations))
        known = METHODS.get(method)
        learns_only = known is not None and not known.group_advantages
        most = self._context - prompt - 2
        if lengths:
            share = 0.99 if learns_only else 0.95
            wanted = max(128, _round_up(int(_at(lengths, share) * (1.0 if learns_only else 1.2))))
            why = f"{share:.0%} of the demonstrations, {how}"
        else:
            wanted, why = 512, "room for a worked answer; no demonstration shows its length"
        cut = sum(n > min(wanted, most) for n in lengths)
        doubt = f"{cut} of {len(lengths)} demonstrations are longer and left out" if cut else ""
        return (
            Guess("data.max_prompt_tokens", prompt, f"99% of the prompts, {how}"),
            Guess("rollout.max_tokens", max(1, min(wanted, most)), why,
                  doubt if cut > 0.02 * len(lengths) else ""),
        )  # fmt: skip

    def _holdout(self) -> Guess:
        wanted = 64 if self.on_gpu else 16
        held = min(wanted, self.detected.rows // 5)
        doubt = f"only {self.detected.rows} rows" if self.detected.rows < 50 else ""
        return Guess("data.holdout", held, "rows to measure on, not to train on", doubt)

    def _group(self, method: str) -> Iterator[Guess]:
        if method != "gft":
            return
        d, teachers = self.detected, min(MAX_TEACHERS, self.detected.teachers)
        yield Guess("group.expert", int(d.experts), "a worked answer for each problem"
                    if d.experts else "no column has worked answers")  # fmt: skip
        yield Guess("group.teacher", teachers, f"a row has {d.teachers}, the median of the rows"
                    if teachers else "no column has answers of another model")  # fmt: skip
        others = (self.given.get("group.expert", int(d.experts)),
                  self.given.get("group.teacher", teachers))  # fmt: skip
        counts = [n for n in others if isinstance(n, int)]  # Others are reported as errors.
        own = max(0, GROUP_SIZE - sum(counts))
        yield Guess("group.self", own, f"samples of the model, K = {GROUP_SIZE} in all")

    def _reward(self) -> Iterator[Guess]:
        d = self.detected
        if "reward.functions" in self.given or d.reward is None:
            return
        rule: Any = d.reward
        if rule == "exact":
            rule = {"name": "exact", "parameters": {"marker": MARKER}}
        doubt = ""
        if d.reward == "exact" and d.experts:
            doubt = f"demonstrations count as wrong unless they end with {MARKER} and the answer"
        yield Guess("reward.functions", [rule], f"for answers of {d.why_reward}", doubt)

    def _course(self, method: str) -> Iterator[Guess]:
        known, rows = METHODS.get(method), self.detected.rows
        samples = known is None or "self" in known.sources
        per_step = (8 if samples else 32) if self.on_gpu else (4 if samples else 8)
        updates = known.defaults.get("train", {}).get("updates_per_rollout", 1) if known else 1
        per_step = max(per_step, updates)
        steps = max(1, min(100 if self.on_gpu else 30, math.ceil(3 * rows / per_step)))
        epochs = steps * per_step / max(1, rows)
        yield Guess("train.steps", steps, f"a first try, {epochs:.2g} epochs")
        yield Guess("train.problems_per_step", per_step, "rows a step"
                    if not samples else "groups a step")  # fmt: skip
        yield Guess("train.micro_batch_tokens", "auto", "the memory plan decides")
        if not self.on_gpu:
            yield Guess("monitor.problems", 4, "prompts for the KL to the base; few on a CPU")
        if self.detected.reward:
            for field, value in (("samples", 1), ("k", [1]), ("temperature", 0)):
                why = {"samples": "one greedy answer to each held-out problem"}.get(field, "")
                yield Guess(f"eval.{field}", value, why)
        elif self.given.get("data.holdout", rows // 5) and "reward.functions" not in self.given:
            why = "how likely the held-out demonstrations are (nll, lower is better)"
            yield Guess("eval.every", max(1, steps // 5), why)


def _slug(name: str) -> str:
    """A name as a part of a folder's name."""
    path = Path(name)
    stem = path.stem if path.suffix.lower() in FORMATS else path.name
    return re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "data"


def _round_up(tokens: int) -> int:
    return max(64, math.ceil(tokens / 64) * 64)


def _at(values: Sequence[int], share: float) -> int:
    return values[min(len(values) - 1, int(share * len(values)))]


# --- the file --------------------------------------------------------------------------------


def recipe_text(draft: Draft, command: str) -> str:
    """The recipe as YAML, with the reason beside every value."""
    tree: dict[str, Any] = {}
    for guess in draft.guesses:
        tree = merge(tree, nested(guess.field, guess))
    head = [f"# Written by `{printable(command)}`."]
    head.append("# Each value is a guess from the first rows of the data; its reason is beside it.")
    if draft.plan:
        head.append(f"# Memory, by the plan: {memory_line(draft.plan)}.")
    return "\n".join([*head, "", *_lines(tree, "")]) + "\n"


def _lines(tree: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, value in tree.items():
        if not isinstance(value, Guess):
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ")
            continue
        if value.doubt:
            yield f"{indent}# Check: {printable(value.doubt)}."
        line = f"{indent}{name}: {as_yaml(value.value)}"
        yield f"{line}  # {printable(value.reason)}" if value.reason else line


def printable(text: str) -> str:
    """The text on one line, as a comment or a line of the terminal must be."""
    return "".join(c if c.isprintable() else "?" for c in text)


def as_yaml(value: Any) -> str:
    """A value on one line, as it is written in a recipe and after key=."""
    style = '"' if isinstance(value, str) and not value.isprintable() else None
    text = yaml.dump(
        value, Dumper=Dumper, default_style=style, default_flow_style=True, width=10**6,
        allow_unicode=True,
    )  # fmt: skip
    return text.removesuffix("\n").removesuffix("\n...")


def memory_line(plan: Plan) -> str:
    """One line about the memory of a plan."""
    peak, limit = plan.peak / GIB, plan.limit / GIB
    size = f"{peak:.1f} GiB at the peak, on {plan.where} with {limit:.1f} GiB"
    if not plan.problems:
        return f"it fits: {size}"
    would = what_would_fit(plan.model, plan.limit)
    return f"it does not fit: {size}; {' and '.join(plan.problems)}. Would fit: {would}"
