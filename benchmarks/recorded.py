"""One recorded batch of groups and the model that it belongs to, for every side to replay.

The model is random, since only its shape counts here: layers of DeepSeekMath-7B's proportions
(feed-forward 2.75 times the width) with heads of 64 and grouped keys, and a vocabulary that leaves
the output head the share of the weights it has in Qwen2.5-1.5B (a sixth); 151,936 words would be
nine tenths of a model this narrow. `head.py` has the head at full size. Or the model is a real
one: a folder with weights, with a random adapter as well.

Response lengths are the quantiles of a log-normal distribution, so that no draw is lucky.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gft_lite.objective.advantages import group_advantages
from gft_lite.policy.registry import model_location

EOS = 1  # of the lab's tokenizer
RANK = 16
Group = dict[str, Any]  # prompt_ids, and for each member: responses, logprobs, rewards


@dataclass(frozen=True)
class Shape:
    """The model and the batch; the defaults are what `make bench` runs.

    `model` is the folder of a real model, which the sizes of the random one then don't apply to;
    `vocab` is the number of words to draw tokens from.
    """

    hidden: int = 512
    layers: int = 1
    ffn: int = 1408
    vocab: int = 1024
    groups: int = 5
    members: int = 8
    mean: float = 300.0
    p95: float = 900.0
    model: str = ""

    @property
    def heads(self) -> int:
        """Query heads; a quarter as many for keys and values."""
        return self.hidden // 64

    def lengths(self) -> list[int]:
        """Response lengths in tokens: quantiles of the log-normal with this mean and p95."""
        rows, z = self.groups * self.members, NormalDist().inv_cdf(0.95)
        sigma = z - math.sqrt(z * z - 2 * math.log(self.p95 / self.mean))
        spread = NormalDist(math.log(self.mean) - sigma**2 / 2, sigma)
        return [round(math.exp(spread.inv_cdf((i + 0.5) / rows))) for i in range(rows)]


def make_model(folder: Path, shape: Shape) -> None:
    """Write a random base with the lab's tokenizer, and an adapter that does something.

    With `shape.model` its files stand for the random base.
    """
    transformers.utils.logging.disable_progress_bar()
    if shape.model:
        for file in Path(shape.model).resolve().iterdir():
            (folder / file.name).symlink_to(file)
        _add_adapter(transformers.AutoModelForCausalLM.from_pretrained(folder), folder)
        return
    base_folder = Path(model_location("lab"))
    for file in base_folder.glob("tokenizer*"):
        shutil.copy(file, folder / file.name)
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, vocab_size=shape.vocab,
        intermediate_size=shape.ffn, num_attention_heads=shape.heads,
        num_key_value_heads=max(1, shape.heads // 4), max_position_embeddings=32768,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=EOS, pad_token_id=0,
    )  # fmt: skip
    base = transformers.Qwen2ForCausalLM(config)
    base.save_pretrained(folder)
    _add_adapter(base, folder)


def _add_adapter(base: Any, folder: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(base.float(), lora())
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)


def lora() -> LoraConfig:
    """The adapter of every benchmark, our default one."""
    return LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def plain_model(folder: Path) -> PeftModel:
    """The recorded model loaded by transformers and peft alone: fp32, SDPA."""
    transformers.utils.logging.disable_progress_bar()
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters in the order of their names."""
    return {n: p for n, p in sorted(model.named_parameters()) if p.requires_grad}


def gradient(model: nn.Module) -> Tensor:
    """The gradient of the adapter as one vector."""
    return torch.cat([p.grad.flatten() for p in trained(model).values() if p.grad is not None])


def make_groups(folder: Path, shape: Shape, prompt: int) -> None:
    """Record a batch: random tokens, and rewards without and with flat groups."""
    draw = random.Random(0)
    lengths = shape.lengths()
    draw.shuffle(lengths)
    sizes = [lengths[i :: shape.groups] for i in range(shape.groups)]
    flat = _flat_groups([sum(group) for group in sizes])
    groups = []
    for number, group in enumerate(sizes):
        rewards = [1.0, 0.0, *(float(draw.random() < 0.5) for _ in group[2:])]
        groups.append(
            {
                "prompt_ids": _tokens(draw, shape, prompt),
                "responses": [[*_tokens(draw, shape, size - 1), EOS] for size in group],
                "rewards": {"0": rewards, "40": [1.0] * len(group) if number in flat else rewards},
            }
        )
    _file(folder, prompt).write_text(json.dumps(groups), encoding="utf-8")


def _tokens(draw: random.Random, shape: Shape, count: int) -> list[int]:
    return [draw.randrange(2, shape.vocab) for _ in range(count)]


def _flat_groups(tokens: list[int]) -> set[int]:
    """Two fifths of the groups, those that hold closest to two fifths of the tokens."""
    candidates = itertools.combinations(range(len(tokens)), round(0.4 * len(tokens)))
    share = 0.4 * sum(tokens)
    return set(min(candidates, key=lambda some: abs(sum(tokens[i] for i in some) - share)))


def read_groups(folder: Path, prompt: int, flat: str) -> list[Group]:
    """The recorded groups with the rewards of one case; `flat` is "0" or "40" percent."""
    groups = json.loads(_file(folder, prompt).read_text(encoding="utf-8"))
    return [group | {"rewards": group["rewards"][flat]} for group in groups]


def advantages(groups: list[Group]) -> list[list[float]]:
    """Eq. 4 with GRPO's eps, as TRL's GRPO and our `grpo` have it."""
    return [group_advantages(group["rewards"], eps=1e-4).tolist() for group in groups]


def _file(folder: Path, prompt: int) -> Path:
    return folder / f"groups-{prompt}.json"


def warm_up(groups: list[Group]) -> list[Group]:
    """The same groups shortened to a few tokens, for a warm-up step."""
    return [
        group
        | {"prompt_ids": group["prompt_ids"][:8]}
        | {name: [values[:4] for values in group[name]] for name in ("responses", "logprobs")}
        for group in groups
    ]


class Clock:
    """The CPU-seconds of each optimiser step; `profile_step.py` has one that also profiles."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def start(self, model: Any) -> None:
        """A step of the trained `model` begins."""
        self._start = time.process_time()

    def stop(self) -> None:
        """It has ended."""
        self.seconds.append(time.process_time() - self._start)


class Forwarded:
    """Counts the token positions, padding included, that enter a model's decoder.

    A recomputation under gradient checkpointing starts behind the embedding and is not counted.
    """

    def __init__(self, model: Any) -> None:
        self.reset()
        model.get_input_embeddings().register_forward_pre_hook(self._count)

    def reset(self) -> None:
        """Start again from 0."""
        self.counts = {"with_gradient": 0, "without_gradient": 0}

    def _count(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kind = "with_gradient" if torch.is_grad_enabled() else "without_gradient"
        self.counts[kind] += inputs[0].numel()


# --- the reference ---------------------------------------------------------------------------


def make_reference(folder: Path, prompt: int) -> None:
    """The log-probs of the recording, and both cases' gradients, row by row in fp32.

    Each row is forwarded by transformers alone, with full logits and no padding, independent of any
    layout. The loss is GRPO's on policy with TRL's default reduction, the mean over
    all response tokens.
    """
    torch.set_num_threads(1)
    model = plain_model(folder)
    groups = json.loads(_file(folder, prompt).read_text(encoding="utf-8"))
    tokens = sum(len(response) for group in groups for response in group["responses"])
    scale = {flat: advantages(read_groups(folder, prompt, flat)) for flat in ("0", "40")}
    found: dict[str, Any] = dict.fromkeys(scale, 0.0)
    for number, group in enumerate(groups):
        group["logprobs"] = []
        for member, response in enumerate(group["responses"]):
            logprobs = _logprobs(model, group["prompt_ids"], response)
            group["logprobs"].append(logprobs.tolist())
            (-logprobs.sum() / tokens).backward()
            for flat, values in scale.items():
                found[flat] = found[flat] + values[number][member] * gradient(model)
            model.zero_grad()
    _file(folder, prompt).write_text(json.dumps(groups), encoding="utf-8")
    for flat, vector in found.items():
        save_file({"gradient": vector}, folder / f"gradient-{prompt}-{flat}.safetensors")


def _logprobs(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    ids = torch.tensor([prompt + response])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]


def against_reference(vector: Tensor, folder: Path, prompt: int, flat: str) -> dict[str, float]:
    """Cosine and relative distance of a gradient [N] to the reference's."""
    wanted = load_file(folder / f"gradient-{prompt}-{flat}.safetensors")["gradient"].double()
    vector = vector.double()
    return {
        "cosine": torch.nn.functional.cosine_similarity(vector, wanted, dim=0).item(),
        "relative_gap": ((vector - wanted).norm() / wanted.norm()).item(),
    }
