"""The table `METHODS` of all training methods.

A method that mixes demonstrations with on-policy samples is an entry of `mixed_methods.py`.
"""

from __future__ import annotations

from typing import Any

from gft_lite.objective.losses import (
    asft_loss,
    clipped_loss,
    dft_loss,
    gft_loss,
    gft_no_dcr_loss,
    gft_no_gal_loss,
    psft_loss,
    sft_loss,
)
from gft_lite.objective.method import Dial, Method, Need, Part, defaults
from gft_lite.objective.mixed_methods import MIXED_METHODS
from gft_lite.types import SOURCES, Source
from gft_lite.utils.imports import load_dotted

__all__ = ["METHODS", "Dial", "Method", "Need", "Part", "find_method"]

_DEMONSTRATIONS: tuple[Source, ...] = ("expert", "teacher")
_LIKELIHOOD = "maximum likelihood"
_SURROGATE: dict[str, Any] = {
    "formula": "-min(rho A, clip(rho) A)",
    "needs": ("old_logprobs",),
    "scales_with_advantage": True,
}

METHODS: dict[str, Method] = {
    "sft": Method(
        sft_loss, ("expert",), _LIKELIHOOD, "-log p",
        group_advantages=False, defaults=defaults(1, 0, 0, 1e-4),
    ),
    "sft_mix": Method(
        sft_loss, _DEMONSTRATIONS, _LIKELIHOOD, "-log p",
        group_advantages=False, defaults=defaults(1, 3, 0, 1e-4),
    ),
    "distillation": Method(
        sft_loss, ("teacher",), _LIKELIHOOD, "-log p",
        group_advantages=False, defaults=defaults(0, 3, 0, 1e-4),
    ),
    "dft": Method(
        dft_loss, _DEMONSTRATIONS, "arXiv 2508.05629", "-sg(p) log p",
        group_advantages=False, defaults=defaults(1, 0, 0, 1e-4),
    ),
    "asft": Method(
        asft_loss, _DEMONSTRATIONS, "arXiv 2509.23753", "-sg(p) log p + lam KL",
        needs=("reference_kl",),
        dial=Dial("lam", (0.03, 0.1, 0.3)),
        group_advantages=False, defaults=defaults(1, 0, 0, 1e-4, lam=0.1),
    ),
    "psft": Method(
        psft_loss, _DEMONSTRATIONS, "arXiv 2508.17784", "-min(rho, clip(rho))",
        needs=("old_logprobs",),
        dial=Dial("clip_high", (0.2, 0.28, 0.4)),
        # Eight as in the authors' script; with one, rho is 1 and the gradient that of SFT.
        group_advantages=False, defaults=defaults(1, 0, 0, 1e-4, clip_high=0.28)
        | {"train": {"updates_per_rollout": 8}},
    ),
    "grpo": Method(
        clipped_loss, ("self",), "arXiv 2402.03300, Eq. 3", **_SURROGATE,
        defaults=defaults(0, 0, 8, 2e-5, reduction="sequence_mean", eps=1e-4),
    ),
    "dr_grpo": Method(
        clipped_loss, ("self",), "arXiv 2503.20783", **_SURROGATE,
        defaults=defaults(0, 0, 8, 2e-5, reduction="constant", std="none"),
    ),
    "dapo": Method(
        clipped_loss, ("self",), "arXiv 2503.14476, Eq. 8", **_SURROGATE,
        dial=Dial("clip_high", (0.2, 0.28, 0.4)),
        defaults=defaults(0, 0, 8, 2e-5, clip_high=0.28, eps=1e-4, mask_truncated=True),
    ),
    "gft": Method(
        gft_loss, SOURCES, "arXiv 2604.14258, Eq. 21", "-A C(p) log p",
        dial=Dial("tau", (0.1, 0.3, 0.7)),
        scales_with_advantage=True, defaults=defaults(1, 3, 4, 2e-5),
    ),
    "gft_no_gal": Method(
        gft_no_gal_loss, _DEMONSTRATIONS, "arXiv 2604.14258, ablation", "-C(p) log p",
        dial=Dial("tau", (0.1, 0.3, 0.7)),
        group_advantages=False, defaults=defaults(1, 3, 0, 2e-5),
    ),
    "gft_no_dcr": Method(
        gft_no_dcr_loss, SOURCES, "arXiv 2604.14258, ablation", "-A log p",
        scales_with_advantage=True, defaults=defaults(1, 3, 4, 2e-5),
    ),
    "gft_no_mix": Method(
        gft_loss, ("expert", "self"), "arXiv 2604.14258, ablation", "-A C(p) log p",
        dial=Dial("tau", (0.1, 0.3, 0.7)),
        scales_with_advantage=True, defaults=defaults(1, 0, 7, 2e-5),
    ),
    **MIXED_METHODS,
}  # fmt: skip


def find_method(name: str) -> Method:
    """The method of that name, or the user's own `Method` at a dotted path.

    Raises: ValueError if there is none, with the reason.
    """
    method = METHODS[name] if name in METHODS else load_dotted(name)
    if not isinstance(method, Method):
        raise ValueError(
            f"must be a gft_lite.objective.methods.Method, got a {type(method).__name__}"
        )
    return method
