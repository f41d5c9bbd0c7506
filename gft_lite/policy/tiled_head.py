"""Log-probs, entropies and E[W] of tokens in one pass over tiles of the vocabulary.

A token's gradient needs the softmax only as the mean of the head's rows: with p the softmax of
the logits z = W h, d log p_t / d h = W_t - sum_v p_v W_v. That mean is accumulated beside the
sum of exponentials, rescaled when the largest logit so far grows, as in FlashAttention (arXiv
2205.14135) with W for keys and values. Two matrix products, and never more than a tile of logits.

Axis suffixes: T tokens, V vocabulary, d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from gft_lite.utils.memory import HEAD_BLOCK_TOKENS, HEAD_TILE_WORDS


@dataclass(frozen=True, slots=True)
class HeadSums:
    """Log-probs and entropies [T]; `slope` is d log p_t / d h [T, d]; all fp32."""

    logprobs: Tensor
    entropy: Tensor
    slope: Tensor


@torch.no_grad()
def tiled_head(hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> HeadSums:
    """Products in `dtype`, sums in fp32. Shapes: hidden [T, d], weight [V, d], targets [T]."""
    tokens = len(targets)
    block = HEAD_BLOCK_TOKENS if hidden.device.type == "cpu" else tokens
    new = torch.zeros(4, tokens, dtype=torch.float32, device=hidden.device)
    largest, total, weighted, own = new  # Sums of exp(z) and exp(z) z, without the target's.
    largest.fill_(-torch.inf)
    mean = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for start in range(0, len(weight), HEAD_TILE_WORDS):
        words = weight[start : start + HEAD_TILE_WORDS].to(dtype)
        logits = linear(hidden.to(dtype), words).float()
        place = targets - start
        inside = (place >= 0) & (place < len(words))
        place = place.clamp(0, len(words) - 1)[:, None]
        own.copy_(torch.where(inside, logits.gather(1, place)[:, 0], own))
        grown = torch.maximum(largest, logits.amax(1))
        shrink = (largest - grown).exp_()
        for sums in (total, weighted, mean.T):
            sums *= shrink
        largest.copy_(grown)
        for i in range(0, tokens, block):
            part = slice(i, i + block)
            z = logits[part]
            powers = (z - grown[part, None]).exp_()
            # Without the target: 1 - p_t keeps its digits where p_t is near 1, in bf16 too.
            kept = powers.gather(1, place[part])
            powers.scatter_(1, place[part], kept.masked_fill_(inside[part, None], 0))
            total[part] += powers.sum(1)
            weighted[part] += torch.bmm(powers[:, None], z[:, :, None])[:, 0, 0]
            z.copy_(powers)
            del powers  # Freed before the next block's are allocated; so are the logits below.
        mean += logits.to(dtype) @ words
        del logits, z
    target = (own - largest).exp_()
    whole = total + target
    return HeadSums(
        logprobs=own - largest - whole.log(),
        entropy=largest + whole.log() - (weighted + target * own) / whole,
        slope=(weight[targets].float().mul_(total[:, None]) - mean).div_(whole[:, None]),
    )
