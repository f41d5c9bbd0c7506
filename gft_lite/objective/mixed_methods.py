"""Published methods that mix demonstrations with on-policy samples, or learn from a teacher.

Objectives, sources and differences are in the docstrings of the losses. Learning rates are
starting points for LoRA, not the papers', which are for full fine-tuning.
"""

from __future__ import annotations

from gft_lite.objective.method import Dial, Method, Part, defaults
from gft_lite.objective.mixed_losses import (
    chord_loss,
    hpt_loss,
    luffy_loss,
    prefix_rft_loss,
    relift_loss,
    rl_plus_loss,
    sft_rl_loss,
    srft_loss,
    teacher_loss,
    uft_loss,
)
from gft_lite.objective.selection import (
    binomial_hints,
    cosine_prefix,
    select_by_gate,
    select_unsolved,
)
from gft_lite.types import SOURCES, Source

_SELF: tuple[Source, ...] = ("self",)
_DEMONSTRATIONS: tuple[Source, ...] = ("expert", "teacher")
# GRPO on self samples with the recipe's reduction, SFT on demonstrations with its own mean.
_RL_AND_SFT = (Part(_SELF), Part(_DEMONSTRATIONS, "token_mean"))

MIXED_METHODS: dict[str, Method] = {
    "sft_rl": Method(
        sft_rl_loss, SOURCES, "arXiv 2504.14945, its multitask baseline",
        "s: GRPO; d: -c log p", needs=("old_logprobs",), parts=_RL_AND_SFT,
        baseline=_SELF, scales_with_advantage=_SELF,
        dial=Dial("sft_weight", (0.1, 0.3, 1.0)),
        defaults=defaults(1, 0, 7, 2e-5),
    ),
    "luffy": Method(
        luffy_loss, SOURCES, "arXiv 2504.14945",
        "d: -A p/(p + g); s: -rho A", needs=("source", "old_logprobs"),
        scales_with_advantage=True,
        dial=Dial("gamma", (0.03, 0.1, 0.3)),
        defaults=defaults(1, 0, 7, 2e-5, std="none", reduction="constant", entropy=0.001),
    ),
    "srft": Method(
        srft_loss, SOURCES, "arXiv 2506.19767",
        "d: -log p/2e^H - A f(p); s: -+log p", needs=("source", "row_entropy", "correct"),
        parts=(Part(), Part(_DEMONSTRATIONS, "token_mean")),
        dial=Dial("sft_weight", (0.25, 0.5, 1.0)),
        defaults=defaults(1, 0, 7, 2e-5, std="none", entropy=0.001),
    ),
    "chord": Method(
        chord_loss, SOURCES, "arXiv 2508.11408",
        "(1-mu) s: GRPO; mu d: -p(1-p) log p", needs=("old_logprobs", "progress"),
        parts=_RL_AND_SFT, baseline=_SELF, scales_with_advantage=_SELF,
        dial=Dial("mu", (0.1, 0.3, 0.5), along=("mu_end",)),
        defaults=defaults(1, 0, 8, 2e-5),
    ),
    "hpt": Method(
        hpt_loss, SOURCES, "arXiv 2509.04419",
        "s: -rho A, or d: -c log p", needs=("old_logprobs",), parts=_RL_AND_SFT,
        baseline=_SELF, scales_with_advantage=_SELF, select=select_by_gate,
        dial=Dial("gate", (0, 1, 2)),
        defaults=defaults(1, 0, 8, 2e-5, std="none", entropy=0.001),
    ),
    "rl_plus": Method(
        rl_plus_loss, SOURCES, "arXiv 2508.00222",
        "d: -2A p sqrt(1-p)/q; s: -rho A", needs=("source", "old_logprobs"),
        scales_with_advantage=True,
        dial=Dial("exponent", (0.5, 1.0, 2.0)),
        defaults=defaults(1, 0, 7, 2e-5, std="none", reduction="constant", entropy=0.001),
    ),
    "relift": Method(
        relift_loss, SOURCES, "arXiv 2506.07527",
        "s: -rho A; d if unsolved: -c log p", needs=("old_logprobs",), parts=_RL_AND_SFT,
        baseline=_SELF, scales_with_advantage=_SELF, select=select_unsolved,
        dial=Dial("sft_weight", (0.1, 0.3, 1.0)),
        defaults=defaults(1, 0, 8, 2e-5, std="none", entropy=0.001),
    ),
    "prefix_rft": Method(
        prefix_rft_loss, _SELF, "arXiv 2507.01679",
        "-min(rho A, clip(rho) A), prefixes", needs=("source", "old_logprobs", "entropy_quantile"),
        scales_with_advantage=True, prefixes=cosine_prefix,
        dial=Dial("prefix_share", (0.2, 0.5, 1.0)),
        defaults=defaults(0, 0, 8, 2e-5, std="none", entropy=0.001),
    ),
    "uft": Method(
        uft_loss, _SELF, "arXiv 2505.16984",
        "s: GRPO; hint: -b log p", needs=("old_logprobs",),
        parts=(Part(_SELF), Part(("expert",), "token_mean")),
        scales_with_advantage=_SELF, prefixes=binomial_hints,
        dial=Dial("hint_weight", (0.001, 0.01, 0.1)),
        defaults=defaults(0, 0, 8, 2e-5, kl=0.001, entropy=0.001),
    ),
    "sdft": Method(
        teacher_loss, _SELF, "arXiv 2601.19897",
        "-sg(log p_T - log p) log p", needs=("teacher_logprobs",),
        group_advantages=False, teacher_sees_demonstration=True,
        defaults=defaults(0, 0, 8, 2e-5) | {"teacher": {"model": "average"}},
    ),
    "opd": Method(
        teacher_loss, _SELF, "arXiv 2306.13649",
        "-sg(log p_T - log p) log p", needs=("teacher_logprobs",),
        group_advantages=False, defaults=defaults(0, 0, 8, 2e-5),
    ),
}  # fmt: skip
