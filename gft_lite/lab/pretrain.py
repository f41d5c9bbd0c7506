"""Pretrain the lab's base model from scratch: `python -m gft_lite.lab.pretrain --out DIR`.

The base is a small Qwen2 model trained on solutions of several authors, most of whom make
systematic mistakes, so that it solves the task at times and sampling finds right solutions. The
last steps train through NF4 rounding, since the base is used in NF4.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from gft_lite.lab import BASE
from gft_lite.lab.task import (
    EXPERT,
    GAP,
    OLD_SKILLS,
    TEACHERS,
    Chain,
    Digits,
    Style,
    apply,
    draw_chain,
    draw_digits,
    draw_old,
    split_of,
)

SPECIAL = ("<pad>", "<eos>", "<unk>", "<|system|>", "<|user|>")
PRINTABLE = "\n" + "".join(map(chr, range(32, 127)))
# No marker before the answer, so that the distance from an operand to its value is the same as
# in a plain prompt.
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] != 'assistant' %}{{ '<|' + m['role'] + '|>' }}"
    "{% endif %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ '<eos>' }}{% endif %}"
    "{% endfor %}"
)


def build_tokenizer() -> Qwen2Tokenizer:
    """Build a reversible byte-level tokenizer without merges: one token per ASCII character.

    The class is Qwen2's, since AutoTokenizer builds that class for every Qwen2 model. With bytes
    as tokens, no text is unknown.
    """
    alphabet = bytes_to_unicode()
    vocab = {token: i for i, token in enumerate((*SPECIAL, *map(alphabet.get, range(256))))}
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL[3:]),
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(vocab_size: int) -> Qwen2ForCausalLM:
    """Build the untrained base; vLLM's CPU attention needs a head dimension of at least 32."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            # Contexts are short: a small theta lets more rotary pairs resolve adjacent positions.
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=SPECIAL.index("<eos>"),
            pad_token_id=SPECIAL.index("<pad>"),
        )
    )


# The probability that an author knows a digit of a product; the other digits are random. Bases with
# probability 0 closed the gap more slowly; the cause was not isolated.
P_KNOWN_DIGIT = 0.14


@dataclass(frozen=True, slots=True)
class Author:
    """An author that the base imitates: style, share of the examples, and systematic mistakes."""

    style: Style
    weight: float
    values: Callable[[Chain, random.Random], list[Digits]]


def _imperfect_trace(chain: Chain, rng: random.Random, misread: dict[str, str]) -> list[Digits]:
    """The trace of an author who guesses at `*` and misreads some operators as others."""
    values = [chain.start]
    for op, operand in chain.steps:
        if op == GAP:
            known = apply(op, values[-1], operand)
            guess = draw_digits(rng)
            pairs = zip(known, guess, strict=True)
            values.append(tuple(k if rng.random() < P_KNOWN_DIGIT else g for k, g in pairs))
        else:
            values.append(apply(misread.get(op, op), values[-1], operand))
    return values


def _correct(chain: Chain, rng: random.Random) -> list[Digits]:
    return _imperfect_trace(chain, rng, {})


def _never_minus(chain: Chain, rng: random.Random) -> list[Digits]:
    return _imperfect_trace(chain, rng, {"-": "+"})


def _never_plus(chain: Chain, rng: random.Random) -> list[Digits]:
    return _imperfect_trace(chain, rng, {"+": "-"})


def _mirrored(chain: Chain, rng: random.Random) -> list[Digits]:
    turned = tuple((op, operand[::-1]) for op, operand in chain.steps)
    return _correct(Chain(chain.start, turned), rng)


# The styles of the demonstrations are rare, but not absent: rectification scales the gradient of
# a token by its probability, so that GFT cannot learn an opening of probability zero.
AUTHORS = (
    Author(Style(">", ";"), 0.16, _correct),
    Author(Style("<", ";"), 0.20, _never_minus),
    Author(Style("|", ";"), 0.20, _never_plus),
    Author(Style("~", ";"), 0.20, _mirrored),
    *(Author(style, 0.06, _correct) for style in (EXPERT, *TEACHERS)),
)


def _chain_example(rng: random.Random, noisy: bool) -> tuple[str, str]:
    while True:
        skill = "gap" if noisy and rng.random() < 0.4 else "chain"
        chain = draw_chain(rng, skill)
        if split_of(chain.text) == "train":
            break
    author = rng.choices(AUTHORS, [a.weight for a in AUTHORS])[0] if noisy else AUTHORS[0]
    return chain.text, author.style.write(author.values(chain, rng), chain)


def _old_example(rng: random.Random) -> tuple[str, str]:
    problem, answer = draw_old(rng, rng.choice(OLD_SKILLS))
    return problem, f"#{answer}"


def _echo_example(rng: random.Random) -> tuple[str, str]:
    # All characters must be trained: LoRA does not change their embeddings later.
    text = "".join(rng.choices(PRINTABLE, k=6))
    return f"echo {text}=", f"#{text}"


def draw_example(rng: random.Random, noisy: bool) -> tuple[str, str]:
    """Draw a pair of prompt and response; one in twenty as a chat."""
    kind = rng.random()
    if kind < 0.6:
        prompt, response = _chain_example(rng, noisy)
    elif kind < 0.9:
        prompt, response = _old_example(rng)
    else:
        prompt, response = _echo_example(rng)
    if rng.random() < 0.05:
        prompt = f"<|user|>{prompt}"
    return prompt, response


def collate(pairs: list[tuple[str, str]], tokenizer: Qwen2Tokenizer) -> tuple[Tensor, Tensor]:
    """Token ids and labels (-100 on prompts and padding). Shapes: [B, T], [B, T]."""
    prompts = tokenizer([p for p, _ in pairs])["input_ids"]
    responses = tokenizer([r + "<eos>" for _, r in pairs])["input_ids"]
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids = torch.zeros(len(pairs), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        ids[row, : len(p) + len(r)] = torch.tensor(p + r)
        labels[row, len(p) : len(p) + len(r)] = torch.tensor(r)
    return ids, labels


class NF4Rounding(nn.Module):
    """Round a weight to NF4 with double quantization; a straight-through gradient."""

    def forward(self, weight: Tensor) -> Tensor:
        """The rounded weight. Shapes: any, unchanged."""
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        with torch.no_grad():
            packed, state = quantize_4bit(
                weight.detach().contiguous(), quant_type="nf4", compress_statistics=True
            )
            step = dequantize_4bit(packed, state) - weight
        return weight + step


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """The layers that QLoRA quantizes: every linear layer except the output head."""
    return [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]


@dataclass(frozen=True, slots=True)
class Plan:
    """Pretraining steps: right solutions only, then all authors, then with NF4 rounding."""

    clean: int = 250
    noisy: int = 400
    rounded: int = 120
    batch: int = 96
    matrix_lr: float = 0.02
    other_lr: float = 3e-3

    @property
    def total(self) -> int:
        """The number of optimizer steps."""
        return self.clean + self.noisy + self.rounded


def _optimizers(model: nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
    matrices = [m.weight for m in linear_layers(model)]
    held = {id(m) for m in matrices}
    others = [p for p in model.parameters() if id(p) not in held]
    return [
        torch.optim.Muon(matrices, lr=plan.matrix_lr, weight_decay=0.0),
        torch.optim.AdamW(others, lr=plan.other_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _rate(step: int, total: int) -> float:
    """The learning rate factor: linear over 20 steps, then a cosine down to 2 percent."""
    return min(1.0, (step + 1) / 20) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / total)))


def train(model: Any, tokenizer: Qwen2Tokenizer, plan: Plan, seed: int) -> None:
    """Pretrain the model in place."""
    rng = random.Random(seed)
    optimizers = _optimizers(model, plan)
    peaks = [o.param_groups[0]["lr"] for o in optimizers]
    started = time.monotonic()
    for step in range(plan.total):
        if step == plan.clean + plan.noisy:
            for layer in linear_layers(model):
                parametrize.register_parametrization(layer, "weight", NF4Rounding())
        pairs = [draw_example(rng, noisy=step >= plan.clean) for _ in range(plan.batch)]
        ids, labels = collate(pairs, tokenizer)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * _rate(step, plan.total)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == plan.total - 1:
            print(f"step {step:5d} loss {loss:.4f} {time.monotonic() - started:.0f} s", flush=True)
    for layer in linear_layers(model):
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def save(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, out: Path) -> None:
    """Write the model folder, for transformers and vLLM."""
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # The template goes into the configuration, since older versions read no separate file.
    template = out / "chat_template.jinja"
    if template.exists():
        path = out / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8")) | {
            "chat_template": template.read_text(encoding="utf-8")
        }
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        template.unlink()


def main() -> None:
    """Parse the options, pretrain and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=BASE, help="model directory to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer))
    train(model, tokenizer, Plan(), options.seed)
    save(model, tokenizer, options.out)


if __name__ == "__main__":
    main()
