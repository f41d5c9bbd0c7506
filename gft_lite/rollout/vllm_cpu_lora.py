"""vLLM's worker for CPUs with faster LoRA: one product per adapter instead of one per token.

vLLM's own functions (`vllm.lora.ops.torch_ops`) copy the adapter's matrices for every token of a
batch before they multiply, and are called for each of the linears that vLLM has fused. Where all
tokens have one adapter, as in training, two products are made for all of these linears. The
functions here take the same arguments and give the same results up to rounding. vLLM imports this
module by its name, in the process that holds the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from vllm.lora.punica_wrapper import punica_cpu
from vllm.v1.worker.cpu_worker import CPUWorker

VLLMS_LINEAR = punica_cpu.PunicaWrapperCPU.add_lora_linear
Stack = tuple[Tensor, ...]  # A matrix [slots, 1, O, I] for each of the linears that are fused.
Runs = list[tuple[slice, int]]  # Successive rows, and the slot of their adapter or -1 for none.


class CpuLoraWorker(CPUWorker):
    """vLLM's worker with the functions of this module in the place of vLLM's."""

    def init_device(self) -> None:
        """Replace the functions where vLLM looks them up, and initialise the device."""
        for function in REPLACEMENTS:
            setattr(punica_cpu, function.__name__, function)
        setattr(punica_cpu.PunicaWrapperCPU, add_lora_linear.__name__, add_lora_linear)
        super().init_device()


# --- the fused linears -------------------------------------------------------------------------


def add_lora_linear(
    self: Any, y: Tensor, x: Tensor, lora_a: Stack, lora_b: Stack, scale: float,
    output_slices: tuple[int, ...], **kwargs: Any,
) -> None:  # fmt: skip
    """Add the adapter's part to the fused output of some linears, in place.

    Shapes: y [T, sum of output_slices], x [T, I].
    """
    if self.is_prefill and self.no_lora:
        return
    if not self.is_prefill or self.batch_size != 1 or kwargs:  # Rows of several adapters, or none.
        VLLMS_LINEAR(self, y, x, lora_a, lora_b, scale, output_slices, **kwargs)
        return
    a, b = fused(lora_a, lora_b, int(self._lora_indices_per_batch[0]))
    hidden = linear(x.float(), a)
    if scale != 1:
        hidden *= scale
    y.addmm_(hidden.to(y.dtype), b)


def fused(lora_a: Stack, lora_b: Stack, slot: int) -> tuple[Tensor, Tensor]:
    """The adapter in `slot` as [R, I] in fp32 and block-diagonal [R, O], kept until it changes."""
    stacks = (*lora_a, *lora_b)
    # torch counts changes of a tensor in place, but not of tensors made in inference mode.
    counted = not any(stack.is_inference() for stack in stacks)
    state = (slot, *(stack._version for stack in stacks)) if counted else None
    known, matrices = getattr(lora_a[0], "_gft_lite_fused", (None, None))
    if matrices is None or state is None or state != known:
        a = torch.cat([stack[slot, 0] for stack in lora_a]).float()
        b = torch.block_diag(*(stack[slot, 0] for stack in lora_b)).T.contiguous()
        matrices = a, b
        lora_a[0]._gft_lite_fused = state, matrices  # type: ignore[attr-defined]
    return matrices


# --- the replacements --------------------------------------------------------------------------
# Shapes: inputs [T, I], weights [slots, O, I] or [slots, 1, O, I], output [T, >= O]. A `bgmv`
# function has the slot of each row, `indices` [T]; an `sgmv` function has runs of rows: their
# starts, lengths and slots, how many there are, the longest, and the number of rows.


def bgmv_shrink(
    inputs: Tensor, weights: Tensor, output: Tensor, indices: Tensor, scaling: float = 1.0
) -> None:
    """Set the first O columns of `output` to the products times `scaling`."""
    _shrink(inputs, weights, output, _find_runs(indices), scaling)


def sgmv_shrink(inputs: Tensor, weights: Tensor, output: Tensor, *arguments: Any) -> None:
    """`bgmv_shrink` with `scaling` as the last argument."""
    _, lengths, slots, *_, scaling = arguments
    _shrink(inputs, weights, output, _runs(lengths, slots), scaling)


def bgmv_expand(
    inputs: Tensor, weights: Tensor, output: Tensor, indices: Tensor, add_inputs: bool = True
) -> None:
    """Add the products to the first columns of `output`, or set these to them."""
    _expand(inputs, weights, output, _find_runs(indices), add_inputs)


def sgmv_expand(inputs: Tensor, weights: Tensor, output: Tensor, *arguments: Any) -> None:
    """`bgmv_expand` with `add_inputs` as the last argument."""
    _, lengths, slots, *_, add_inputs = arguments
    _expand(inputs, weights, output, _runs(lengths, slots), add_inputs)


def bgmv_expand_slice(
    inputs: Tensor, weights: Tensor, output: Tensor, indices: Tensor, *arguments: Any
) -> None:
    """`bgmv_expand` for columns of `output`: the first one, their number, `add_inputs`."""
    offset, size, add_inputs = arguments
    _expand(inputs, weights, output[:, offset : offset + size], _find_runs(indices), add_inputs)


def sgmv_expand_slice(inputs: Tensor, weights: Tensor, output: Tensor, *arguments: Any) -> None:
    """`bgmv_expand_slice` with its three arguments as the last ones."""
    _, lengths, slots, *_, offset, size, add_inputs = arguments
    columns = output[:, offset : offset + size]
    _expand(inputs, weights, columns, _runs(lengths, slots), add_inputs)


REPLACEMENTS = (
    bgmv_shrink, sgmv_shrink, bgmv_expand, sgmv_expand, bgmv_expand_slice, sgmv_expand_slice,
)  # fmt: skip


# --- products ----------------------------------------------------------------------------------


def _find_runs(indices: Tensor) -> Runs:
    slots, lengths = torch.unique_consecutive(indices, return_counts=True)
    return _runs(lengths, slots)


def _runs(lengths: Tensor, slots: Tensor) -> Runs:
    if len(slots) == 1:  # As in training; 14 calls a layer.
        return [(slice(None), int(slots))]
    runs, start = [], 0
    for length, slot in zip(lengths.tolist(), slots.tolist(), strict=True):
        runs.append((slice(start, start + length), slot))
        start += length
    return runs


def _shrink(inputs: Tensor, weights: Tensor, output: Tensor, runs: Runs, scaling: float) -> None:
    width = weights.shape[-2]
    for rows, slot in runs:
        if slot < 0:
            output[rows, :width] = 0
        else:
            matrix = _matrix(weights, slot, output.dtype)
            output[rows, :width] = linear(inputs[rows].to(output.dtype), matrix).mul_(scaling)


def _expand(inputs: Tensor, weights: Tensor, output: Tensor, runs: Runs, add_inputs: bool) -> None:
    width = min(weights.shape[-2], output.shape[1])  # Both may pad the vocabulary differently.
    for rows, slot in runs:
        target = output[rows, :width]
        if slot >= 0:
            matrix = _matrix(weights, slot, output.dtype)[:width]
            target.addmm_(inputs[rows].to(output.dtype), matrix.T, beta=int(add_inputs))
        elif not add_inputs:
            target.zero_()


def _matrix(weights: Tensor, slot: int, dtype: torch.dtype) -> Tensor:
    """The matrix [O, I] of the adapter in a slot."""
    return (weights[slot] if weights.dim() == 3 else weights[slot, 0]).to(dtype)
