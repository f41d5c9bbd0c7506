"""Segment attention on the device against plain attention under a mask, forward and backward.

On CUDA in half precision it is torch's flash kernel for segments of any length; elsewhere tiles of
masked attention. The measure is fp32 under the dense mask that the segments mean; beside it, how
far the same in half precision is from it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.against_trl import rows
from benchmarks.gpu_check.compat import native_groups
from benchmarks.gpu_check.meter import Peak
from benchmarks.gpu_check.parts import Figures, Notes
from benchmarks.gpu_check.scale import LARGE, MIDDLE, SMALL, Setup
from benchmarks.gpu_check.work import compared, free, make_groups, random_policy, timed
from gft_lite.policy.attention import SegmentAttention
from gft_lite.policy.batching import Segment, cut

# Query heads, heads of keys and values, and a window: the models', one without groups, one with.
HEADS = {
    "qwen_1.5b": (12, 2, None), "qwen_7b": (28, 4, None), "llama_8b": (32, 8, None),
    "deepseek_7b": (32, 32, None), "window": (12, 2, 256),
}  # fmt: skip
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def check(setup: Setup, notes: Notes) -> None:
    """Note how far the kernel is from the definition, and which layout each model then takes."""
    notes.add("varlen_attn", {"enable_gqa": native_groups()})
    for name, (heads, kv_heads, window) in HEADS.items():
        notes.case_once(name, against_mask, setup, heads, kv_heads, window)
        free()
    for model in (SMALL, MIDDLE, LARGE):
        notes.case_once(f"layout of {model}", chosen_layout, setup, model)
        free()


def against_mask(setup: Setup, heads: int, kv_heads: int, window: int | None) -> Figures:
    """Relative errors of output and gradients, and milliseconds of both."""
    if setup.tiny:
        window = window and 8
    size = 32 if setup.tiny else 128
    length, segments = packed_line(setup)
    generator = torch.Generator(setup.device).manual_seed(0)
    half = torch.float32 if setup.device == "cpu" else torch.bfloat16

    def draw(count: int, *shape: int) -> Tensor:
        x = torch.randn(1, count, *shape, generator=generator, device=setup.device)
        return x.to(half).requires_grad_()

    inputs = [draw(heads, length, size), *(draw(kv_heads, length, size) for _ in range(2))]
    upstream = draw(length, heads, size).detach()
    mask = dense_mask(segments, length, window, setup.device)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = scaled_dot_product_attention(q, k, v, mask, enable_gqa=heads != kv_heads)
        return out.transpose(1, 2)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attention = SegmentAttention(segments, torch.device(setup.device))
        return attention(q, k, v, None, window)

    exact = with_gradients(masked, [x.detach().float().requires_grad_() for x in inputs], upstream)
    found: Figures = {"tokens": length, "segments": len(segments)}
    for name, function in (("ours", ours), ("masked", masked)):
        with_gradients(function, inputs, upstream)  # Warms up.
        with Peak(setup.device, [*inputs, upstream, mask]) as peak:
            got, seconds = timed(setup, partial(with_gradients, function, inputs, upstream))
        names = ("output", "query", "key", "value")
        gaps = {part: compared(g, e)["relative_gap"]
                for part, g, e in zip(names, got, exact, strict=True)}  # fmt: skip
        found[name] = {"relative_gap": gaps, "ms": 1e3 * seconds, "peak_gib": peak.gib}
    worst = {name: max(found[name]["relative_gap"].values()) for name in ("ours", "masked")}
    return found | {"right": worst["ours"] <= 2 * worst["masked"] + 1e-6}


def with_gradients(attend: Attend, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """The output [1, S, H, D] and the gradients of query, key and value."""
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]


def packed_line(setup: Setup) -> tuple[int, tuple[Segment, ...]]:
    """Two prompts with three responses each, in one line without padding."""
    groups = make_groups(setup, 512)[:2]
    for group in groups:
        group |= {name: group[name][:3] for name in ("responses", "rewards")}
    [batch] = cut(rows(setup.recipe(SMALL), groups), 10**9, layout="shared")
    return batch.input_ids.numel(), batch.segments


def dense_mask(
    segments: tuple[Segment, ...], length: int, window: int | None, device: str
) -> Tensor:
    """Which key each query of a packed line sees, [S, S]: of its own segment those up to itself,
    and its prompt's, no more than the last `window` of them all."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for s in segments:
        for place in range(s.start, s.end):
            end = place + 1
            left = window or length
            mask[place, max(s.start, end - left) : end] = True
            left = max(0, left - (end - s.start))
            mask[place, max(s.prompt_start, s.prompt_end - left) : s.prompt_end] = True
    return mask.to(device)


def chosen_layout(setup: Setup, model: str) -> Figures:
    """The layout that `auto` takes for two layers of a model, as every policy tries it out."""
    policy = random_policy(setup, setup.recipe(model).policy, layers=2)
    return {"layout": policy.layout, "expected": "shared", "right": policy.layout == "shared"}
