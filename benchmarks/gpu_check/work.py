"""A random model on the device, a batch of groups for it, and what a step of it costs."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

from benchmarks.gpu_check.compat import adapt_attention
from benchmarks.gpu_check.parts import Figures
from benchmarks.gpu_check.scale import Setup
from benchmarks.recorded import EOS, Group, Shape
from gft_lite.planning.memory import Batch, MemoryModel
from gft_lite.planning.model_shape import ModelShape
from gft_lite.policy.batching import MicroBatch
from gft_lite.policy.lora import LoraPolicy
from gft_lite.policy.qlora import (
    add_adapter,
    checkpoint_layers,
    keep_embedding_on_cpu,
    quantization_config_of,
)
from gft_lite.policy.registry import model_location
from gft_lite.recipe.sections import PolicySettings

T = TypeVar("T")

adapt_attention()  # Needed by every policy made here.

# --- a model that was never on a disk ---------------------------------------------------------


def random_policy(
    setup: Setup, settings: PolicySettings, *, rounded: bool = False, layers: int = 0
) -> LoraPolicy:
    """A policy of `settings.model`'s shape with random weights, created on the device.

    The weights are the same for every quantisation and precision; `rounded` ones are dequantised
    from NF4. `layers`, if not 0, is the number of layers.
    """
    fields = setup.config(settings.model) | ({"num_hidden_layers": layers} if layers else {})
    dtype = getattr(torch, settings.resolved_dtype(setup.device))
    config: Any = transformers.AutoConfig.for_model(**fields)
    with torch.device("meta"):
        base = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=settings.attention
        )
    generator = torch.Generator(setup.device).manual_seed(0)
    base.model.rotary_emb = type(base.model.rotary_emb)(config=config).to(setup.device)
    for name, module in list(base.named_modules()):
        if any(p.is_meta for p in module.parameters(recurse=False)):
            _fill(module, generator, dtype)
            if isinstance(module, nn.Linear) and ".layers." in name:
                base.set_submodule(name, _converted(module, settings, dtype, rounded))
    base.tie_weights()
    if settings.quantization == "nf4":
        base.is_loaded_in_4bit = True
        config.quantization_config = quantization_config_of(settings, dtype)
    model = add_adapter(base, settings, None, seed=0)
    checkpoint_layers(base, settings)
    if settings.offload_embedding is True:
        keep_embedding_on_cpu(base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_location("lab"))
    policy = _policy(model, tokenizer, settings, dtype)
    _shake(policy)
    return policy


def _fill(module: nn.Module, generator: torch.Generator, dtype: torch.dtype) -> None:
    """Initialise the weights of a module on the meta device."""
    module.to_empty(device=generator.device, recurse=False)
    with torch.no_grad():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1:
                drawn = torch.randn(parameter.shape, generator=generator, device=generator.device)
                parameter.copy_(drawn.mul_(0.02).bfloat16())  # As published: bf16, in any dtype.
            else:
                parameter.fill_(1.0 if name == "weight" else 0.0)


def _converted(
    linear: nn.Linear, settings: PolicySettings, dtype: torch.dtype, rounded: bool
) -> nn.Module:
    """The linear with weights as the settings require."""
    if settings.quantization == "none" and not rounded:
        return linear
    options: Any = {"quant_type": "nf4", "compress_statistics": settings.double_quantization}
    weight: Any = Params4bit(linear.weight.data, requires_grad=False, **options)
    weight = weight.to(linear.weight.device)  # Quantises.
    if settings.quantization == "none":
        linear.weight.data = dequantize_4bit(weight.data, weight.quant_state).to(dtype)
        return linear
    made: Any = Linear4bit(
        linear.in_features, linear.out_features, bias=linear.bias is not None,
        compute_dtype=dtype, device="meta", **options,
    )  # fmt: skip
    weight.module = made
    made.weight, made.bias = weight, linear.bias
    made.support_avx512bf16_for_cpu = False
    return made


def _shake(policy: LoraPolicy) -> None:
    """Fill the adapter with random weights, the same ones on every device."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def with_settings(policy: LoraPolicy, settings: PolicySettings) -> LoraPolicy:
    """A policy with other settings on the same model. The embedding does not come back."""
    base: Any = policy.model.get_base_model()
    base.gradient_checkpointing_disable()
    checkpoint_layers(base, settings)
    if settings.offload_embedding is True:
        keep_embedding_on_cpu(base)
    return _policy(policy.model, policy.tokenizer, settings, policy.dtype)


def _policy(model: Any, tokenizer: Any, settings: PolicySettings, dtype: torch.dtype) -> LoraPolicy:
    """The policy, with padded rows if segments can't be tested; every figure has its layout."""
    try:
        policy = LoraPolicy(model, tokenizer, settings, dtype)
    except (RuntimeError, TypeError):
        if settings.layout != "auto":
            raise
        settings = settings.model_copy(update={"layout": "padded"})
        policy = LoraPolicy(model, tokenizer, settings, dtype)
    policy.model.train()
    return policy


def free() -> None:
    """Free unreferenced memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- a batch ---------------------------------------------------------------------------------


def make_groups(setup: Setup, vocabulary: int, *, flat: int = 0) -> list[Group]:
    """Random tokens in groups, as `recorded.py` has them, the first `flat` with equal rewards."""
    sizes, draw = setup.sizes, random.Random(0)
    lengths = Shape(groups=sizes.groups, members=sizes.members, mean=sizes.mean, p95=sizes.p95)
    capped = [min(length, sizes.response) for length in lengths.lengths()]
    draw.shuffle(capped)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(2, vocabulary) for _ in range(count)]

    return [
        {
            "prompt_ids": tokens(sizes.prompt),
            "responses": [[*tokens(length - 1), EOS] for length in capped[i :: sizes.groups]],
            "rewards": [1.0] * sizes.members if i < flat else [1.0, 0.0] * (sizes.members // 2),
        }
        for i in range(sizes.groups)
    ]


# --- what it costs ---------------------------------------------------------------------------


def timed(setup: Setup, function: Callable[[], T]) -> tuple[T, float]:
    """The result of a function, and the seconds until the device has finished."""
    if setup.device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if setup.device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def held(policy: LoraPolicy) -> list[Tensor]:
    """The tensors of a policy, which exist before a step."""
    return [*policy.model.parameters(), *policy.model.buffers()]


def predicted_gib(model: MemoryModel, choice: Any, batches: Sequence[MicroBatch]) -> float:
    """The planner's peak for the largest of the micro-batches, of what `Peak` measures."""
    tensors = ("base", "lora", "optimiser", "checkpoints", "activations", "head")
    resting = 0
    if model.device == "cpu":  # What is there before: base, adapter and the optimiser's states.
        resting = model.base(choice.offload_embedding) + 4 * model.lora_parameters
        resting += model.optimizer(gradients=False)
    peaks = [model.training(choice, seen_by_plan(batch)) for batch in batches]
    largest = max(sum(p[name] for name in tensors) for p in peaks)
    return (largest - resting) / 2**30


def seen_by_plan(batch: MicroBatch) -> Batch:
    """A micro-batch as the planner's formulas need it."""
    tokens = batch.input_ids.numel()
    sizes = [(s.prompt_end - s.prompt_start, s.end - s.start) for s in batch.segments]
    keys = sum(prompt + own for prompt, own in sizes)
    masks = sum(own * (prompt + own) for prompt, own in set(sizes) if prompt)
    return Batch(tokens, batch.targets.numel(), keys or tokens, masks)


def flops(shape: ModelShape, batches: Sequence[MicroBatch], recomputed: float) -> float:
    """Floating-point operations of forward and backward over micro-batches.

    Per token and weight 2 in the forward, 2 in the backward (activations only: the base is
    frozen), 2 more in the share of layers that is recomputed; attention's backward is 2.5 times
    its forward; the head runs over the targets alone. The adapter, below 1%, is left out.
    """
    tokens = sum(batch.input_ids.numel() for batch in batches)
    targets = sum(batch.targets.numel() for batch in batches)
    pairs = sum(_pairs(batch) for batch in batches)
    linear = 2 * shape.linear_parameters * tokens
    attention = 4 * shape.layers * shape.heads * shape.head_size * pairs
    head = 2 * shape.vocabulary * shape.hidden * targets
    return (2 + recomputed) * linear + (3.5 + recomputed) * attention + 2 * head


def _pairs(batch: MicroBatch) -> float:
    """The number of token pairs of causal attention in a micro-batch."""
    if not batch.segments:
        lines, width = batch.input_ids.shape
        return lines * width**2 / 2
    sizes = [(s.prompt_end - s.prompt_start, s.end - s.start) for s in batch.segments]
    return sum(own * (prompt + own / 2) for prompt, own in sizes)


def compared(found: Tensor, wanted: Tensor) -> Figures:
    """Cosine of two vectors, and their distance relative to the reference."""
    found, wanted = found.double().flatten(), wanted.double().flatten()
    return {
        "cosine": nn.functional.cosine_similarity(found, wanted, dim=0).item(),
        "relative_gap": ((found - wanted).norm() / wanted.norm()).item(),
    }
