"""`gft-lite merge`: merge a trained adapter into its base and compare the log-probs."""

from __future__ import annotations

import functools
import math
import shlex
import shutil
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from gft_lite.data.prompts import PromptFormat
from gft_lite.evaluation.targets import Target, find_adapter
from gft_lite.objective.losses import k3
from gft_lite.policy.base import Policy, evaluating
from gft_lite.policy.batching import Row
from gft_lite.policy.registry import load_policy
from gft_lite.policy.serving_base import savable
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import PolicySettings, PromptSettings, RolloutSettings
from gft_lite.rollout.base import Request, Sampling
from gft_lite.rollout.sampling import make_prompt_format, sample_seed
from gft_lite.rollout.transformers_engine import TransformersEngine
from gft_lite.runs.folder import RunFolder, stage_folder
from gft_lite.runs.model_card import known_as, merged_card
from gft_lite.types import Problem
from gft_lite.utils.cpu import set_threads
from gft_lite.utils.errors import UserError
from gft_lite.utils.files import check_new_folder, write_text_atomic
from gft_lite.utils.progress import show_phase, stderr_console, track

# Nats per token. bf16 arithmetic alone causes a gap of 0.002 on the lab's own text, 0.012 for
# random weights and 0.04 on text unlike the lab's; a lost update causes 0.3 on the lab.
LIMIT = 0.05
# Minimum cosine between the update and its rounded form. On the lab, without the noise of bf16
# arithmetic, a merged model with 0.37 was closer to the base than to the policy, one with 0.61 not.
MIN_COSINE = 0.5
# Tokens compared, prompts included, and the maximum of each response.
TOKENS, RESPONSE_TOKENS = 4096, 256
# Prompts for an adapter without a run.
QUESTIONS = [f"What is {a} times {b}? Explain it." for a in (7, 12, 25, 38) for b in (6, 13)]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Log-prob differences between the merged model, as read from disk, and others, in nats.

    `gap` is the mean and `largest` the maximum difference to the unmerged policy in the same
    precision, `kl` the k3 estimate of KL(policy || merged) per token (unbiased for samples of the
    policy). `effect` is the mean difference between policy and base, `to_base` that between merged
    model and base, `as_trained` that between merged model and the policy on its quantized base.
    `kept` is the cosine between the update of the weights and its rounded form.
    """

    tokens: int
    gap: float
    largest: float
    kl: float
    effect: float
    to_base: float
    as_trained: float | None
    kept: float

    def problem(self, limit: float) -> str | None:
        """Why the merged model must not be used, None if it may be."""
        if not self.gap <= limit:  # Also rejects NaN.
            return f"--limit: must be at least the gap, {self.gap:.2g} nats per token, got {limit}"
        if self.kept < MIN_COSINE:
            return (f"rounding would lose the update: what is left has a cosine of {self.kept:.2f} "
                    "with it")  # fmt: skip
        if self.gap > self.to_base:
            return (f"the merged model is nearer to the base ({self.to_base:.2g} nats per token) "
                    f"than to the trained policy ({self.gap:.2g})")  # fmt: skip
        return None


def merge(
    target: str, out: str | Path, *, limit: float = LIMIT,
    dtype: Literal["bfloat16", "float32"] = "bfloat16", device: str = "cpu",
    console: Console | None = None,
) -> Comparison:  # fmt: skip
    """Merge the adapter of a run or folder into its unquantized base, in a new folder `out`.

    Raises: UserError for an unusable target or folder, and, with nothing left at `out`, if
    log-probs changed by more than `limit` nats per token or are closer to the base's.
    """
    console = console or stderr_console()
    check_new_folder(Path(out), "--out")
    found, out = find_adapter(target), Path(out).resolve()  # A rename onto a link would fail.
    partial = out.with_name(f"{out.name}.tmp")
    trained = found.policy.model_copy(update=_portable_settings(device))
    settings = trained.model_copy(update={"quantization": "none", "dtype": dtype})
    run = RunFolder(found.run) if found.run else None
    card = functools.partial(merged_card, known_as(settings.model), found.label, run)
    card("")  # Reads the files of the run before anything large is loaded.
    set_threads(settings.threads)
    shutil.rmtree(partial, ignore_errors=True)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, partial, ignore_errors=True)
        with show_phase(console, f"merging in {dtype}"):
            rows, scores, kept = _merge_into(partial, settings, found)
        merged = {"model": str(partial), "revision": None, "adapter": None}
        with show_phase(console, "reading the merged model and comparing log-probs"):
            scores["merged"] = _score(settings.model_copy(update=merged), rows)
        if found.run and trained.quantization != "none":
            with show_phase(console, f"comparing log-probs on the {trained.quantization} base"):
                scores["as_trained"] = _score(trained, rows)
        comparison = _compare(scores, kept)
        description = _describe(comparison, dtype, trained.quantization)
        console.print(description, markup=False, highlight=False, soft_wrap=True)
        if problem := comparison.problem(limit):
            wider = "" if dtype == "float32" else "Use --dtype float32, or serve"
            raise UserError([f"{problem}. Nothing was written. {wider or 'Serve'} the adapter as "
                             "it is."])  # fmt: skip
        write_text_atomic(partial / "README.md", card(description))
        partial.rename(out)
    return comparison


def next_commands(folder: str | Path, dtype: str) -> list[str]:
    """Shell commands that serve a merged model or convert it for llama.cpp."""
    kind = {"bfloat16": "bf16", "float32": "f32"}[dtype]
    name = str(Path(folder))
    model, gguf = shlex.quote(name), shlex.quote(f"{name}.gguf")
    return [
        f"vllm serve {model}",
        f"python convert_hf_to_gguf.py {model} --outfile {gguf} --outtype {kind}  # of llama.cpp",
    ]


def _portable_settings(device: str) -> dict[str, Any]:
    """Replacements for the settings that only make training faster on one machine."""
    return {"device": device, "attention": "sdpa", "layout": "auto",
            "offload_checkpoints": False, "offload_embedding": False}  # fmt: skip


def _merge_into(
    folder: Path, settings: PolicySettings, target: Target
) -> tuple[list[Row], dict[str, Tensor], float]:
    """Write the merged model; returns rows, their scores by policy and base, and `kept`.

    The model is merged in place, so that memory holds one copy of it.
    """
    policy = load_policy(settings)
    format = make_prompt_format(policy, prompt_settings_of(target, policy.tokenizer))
    rows = _rows(policy, format, target)
    scores = {"policy": _logprobs(policy, rows)}
    with policy.base():
        scores["base"] = _logprobs(policy, rows)
    kept = _merge_layers(policy.model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        model = policy.model.merge_and_unload().to(policy.dtype)
    ends = sorted(policy.eos_ids)
    model.generation_config = savable(model.generation_config)
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return rows, scores, kept


@torch.no_grad()
def _merge_layers(model: Any) -> float:
    """Merge each matrix in fp32 and round it once; returns the cosine of update and rounded update.

    peft's safe merge rounds the update and then the sum.
    """
    from peft.tuners.lora import LoraLayer  # After load_policy, which silences bitsandbytes.

    dot, squares = 0.0, [0.0, 0.0]
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in track(layers, "matrices"):
        weight: Any = layer.get_base_layer().weight
        dtype, before = weight.dtype, weight.float()
        weight.data = before.clone()
        layer.merge()
        wanted = weight.data - before
        weight.data = weight.data.to(dtype)
        stored = weight.float() - before
        dot += (wanted * stored).sum().item()
        squares = [s + x.square().sum().item()
                   for s, x in zip(squares, (wanted, stored), strict=True)]  # fmt: skip
    if not squares[0]:
        return 1.0  # The update is zero.
    return dot / math.sqrt(squares[0] * squares[1]) if squares[1] else 0.0


def prompt_settings_of(target: Target, tokenizer: Any) -> PromptSettings:
    """The prompt settings of the target's run; without a run, chat if the model has a template."""
    if target.run is not None:
        return Recipe.load(target.run / "recipe.yaml").data.prompt
    # The lab's base has a template, but was pretrained without it.
    chat = tokenizer.chat_template and target.policy.model != "lab"
    return PromptSettings(style="chat" if chat else "plain")


def _rows(policy: Policy, format: PromptFormat, target: Target) -> list[Row]:
    """The self samples of the run's last step; if there are none, new samples."""
    groups = _last_groups(target.run) if target.run else []
    prompts = [format.problem_ids(Problem.from_json(group["problem"])) for group in groups]
    rows = [
        Row(prompt, tuple(ids[:RESPONSE_TOKENS]))
        for group, prompt in zip(groups, prompts, strict=True)
        for ids in (r["token_ids"] for r in group["responses"] if r["source"] == "self")
        if ids
    ]
    if not rows:
        rows = _sample(policy, prompts or [format.prompt_ids(text) for text in QUESTIONS], target)
    lengths = accumulate(map(len, rows))
    return [row for row, total in zip(rows, lengths, strict=True) if total <= TOKENS] or rows[:1]


def _last_groups(run: Path) -> list[dict[str, Any]]:
    recipe, folder = Recipe.load(run / "recipe.yaml"), RunFolder(run)
    if recipe.stages:
        folder = stage_folder(recipe, folder, len(recipe.stages) - 1)
    steps = folder.group_steps()
    return folder.groups(steps[-1]) if steps else []


def _sample(policy: Policy, prompts: Sequence[tuple[int, ...]], target: Target) -> list[Row]:
    engine = TransformersEngine(RolloutSettings(), policy, Path())
    engine.sync(target.adapter, 1)
    requests = [Request(p, (sample_seed(0, "merge", i),)) for i, p in enumerate(prompts)]
    answers = engine.generate(requests, Sampling(max_tokens=RESPONSE_TOKENS))
    return [Row(p, answer.token_ids) for p, [answer] in zip(prompts, answers, strict=True)]


# --- comparison ------------------------------------------------------------------------------


def _score(settings: PolicySettings, rows: Sequence[Row]) -> Tensor:
    """Load a model and return its log-probs of the rows [T]."""
    policy = load_policy(settings)
    with nullcontext() if settings.adapter else policy.base():
        return _logprobs(policy, rows)


@torch.no_grad()
def _logprobs(policy: Policy, rows: Sequence[Row]) -> Tensor:
    """Log-probs of all response tokens in nats, in the order of the rows [T]."""
    batches = policy.batches(rows, TOKENS)
    with evaluating(policy):
        scores = torch.cat(
            [policy.token_scores(b).logprobs.cpu() for b in track(batches, "micro-batches")]
        )
    return scores.double()[torch.cat([batch.row for batch in batches]).argsort(stable=True)]


def _compare(scores: dict[str, Tensor], kept: float) -> Comparison:
    policy, base, merged = scores["policy"], scores["base"], scores["merged"]
    trained = scores.get("as_trained")
    return Comparison(
        tokens=len(policy),
        gap=_mean_distance(policy, merged),
        largest=(policy - merged).abs().max().item(),
        kl=k3(policy, merged).mean().item(),
        effect=_mean_distance(policy, base),
        to_base=_mean_distance(merged, base),
        as_trained=None if trained is None else _mean_distance(trained, merged),
        kept=kept,
    )


def _mean_distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().mean().item()


def _describe(found: Comparison, dtype: str, quantization: str) -> str:
    """The comparison as text that is valid Markdown."""
    lines = [
        f"Merged in {dtype}; log-probs of {found.tokens:,} tokens, in nats per token:",
        "",
        f"- of the weights' update, rounding left a cosine of {found.kept:.4f}",
        f"- merged against unmerged, both in {dtype}: {found.gap:.2g} on average, "
        f"{found.largest:.2g} at most, KL {found.kl:.2g}",
        f"- for scale, what training changed: {found.effect:.2g} on average",
    ]
    if found.as_trained is not None:
        lines.append(
            f"- merged against the policy as it was trained, on its {quantization} base: "
            f"{found.as_trained:.2g} on average, for the base has another precision now"
        )
    return "\n".join(lines)
