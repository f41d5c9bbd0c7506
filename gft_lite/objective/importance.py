"""Correction for the difference between the engine that sampled and the trainer.

Both compute the log-probs of the sampled tokens with other kernels, precisions and LoRA paths. The
weight w = p_trainer / p_engine, at the time of the rollout, makes an expectation over the engine's
samples one over the trainer's distribution. Both are untempered: what temperature, top-p and top-k
change is not corrected. Demonstrations and prefixes have weight 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Mode = Literal["none", "token_truncate", "token_band", "sequence_mask"]


@dataclass(frozen=True, slots=True)
class Importance:
    """How weights are limited.

    `token_truncate`: min(w, cap). `token_band`: 0 outside of [low, high]. `sequence_mask`: all
    tokens of a row have the product of their weights, and 0 where it exceeds the cap.
    """

    mode: Mode = "none"
    cap: float = 2.0
    low: float = 0.5
    high: float = 5.0

    def limited(self, ratio: Tensor) -> Tensor:
        """Where a ratio w is outside of the mode's limits; outside of the cap for `none`."""
        if self.mode == "token_band":
            return (ratio < self.low) | (ratio > self.high)
        return ratio > self.cap

    def weights(self, gap: Tensor) -> Tensor:
        """The weights for differences trainer - engine in nats, 1 where these are NaN.

        Shapes: [...] -> [...]; of tokens, or for `sequence_mask` of rows, summed over the tokens.
        """
        ratio = gap.nan_to_num(0.0).exp()
        if self.mode == "token_truncate":
            return ratio.clamp(max=self.cap)
        if self.mode == "none":
            return ratio.new_ones(ratio.shape)
        return ratio.masked_fill(self.limited(ratio), 0.0)


def gap_metrics(gap: Tensor, importance: Importance) -> dict[str, float] | None:
    """What the differences trainer - engine [T] in nats of a step's self tokens say; None of none.

    `mean` and `p95` of their absolute values; `effective` is the effective sample size of the
    ratios w as a share of the tokens, (sum w)^2 / (T sum w^2); `limited` the share of tokens whose
    w is outside of the limits.
    """
    if not gap.numel():
        return None
    ratio, size = gap.double().exp(), gap.double().abs()
    effective = ratio.sum().square() / (len(ratio) * ratio.square().sum())
    return {
        "mean": size.mean().item(),
        "p95": size.quantile(0.95).item(),
        "effective": effective.item(),
        "limited": importance.limited(ratio).double().mean().item(),
    }
