"""TODO: gft_lite/objective/methods.py"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

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
from gft_lite.types import Source
from gft_lite.utils.imports import load_dotted

if TYPE_CHECKING:
    from torch import Tensor

Need = Literal["old_logprobs", "reference_kl"]


# --- the table -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """What a training method is: its loss, the rows it trains on, its defaults, its source.

    `loss` takes log-probs, advantages, the `parameters` named here, all of them fields of the
    recipe's `objective:`, and what it `needs`: `old_logprobs`, those at the rollout (None where
    a single update follows it), `reference_kl`, the exact KL(reference || policy) of each token
    with gradient. `scales_with_advantage` says that loss and gradient are 0 where the advantage
    is, so that such rows need not go through the model. `defaults` is a recipe fragment that
    lies under the user's recipe.
    """

    loss: Callable[..., Tensor]
    sources: tuple[Source, ...]
    source: str
    formula: str = ""
    parameters: tuple[str, ...] = ()
    needs: tuple[Need, ...] = ()
    group_advantages: bool = True
    scales_with_advantage: bool = False
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def _defaults(
    expert: int, teacher: int, self_: int, lr: float, **objective: Any
) -> dict[str, dict[str, Any]]:
    """A method's recipe fragment: its group, its loss settings, a QLoRA learning rate."""
    group: dict[str, Any] = {"expert": expert, "teacher": teacher, "self": self_}
    if self_ == 0:
        group["shortfall"] = "drop"
    return {"group": group, "objective": objective, "optim": {"lr": lr}}


_DEMONSTRATIONS: tuple[Source, ...] = ("expert", "teacher")
_MIXED: tuple[Source, ...] = ("expert", "teacher", "self")
_LIKELIHOOD = "maximum likelihood"
_SURROGATE: dict[str, Any] = {
    "formula": "-min(rho A, clip(rho) A)",
    "parameters": ("clip_low", "clip_high"),
    "needs": ("old_logprobs",),
    "scales_with_advantage": True,
}

METHODS: dict[str, Method] = {
    "sft": Method(
        sft_loss, ("expert",), _LIKELIHOOD, "-log p",
        group_advantages=False, defaults=_defaults(1, 0, 0, 1e-4),
    ),
    "sft_mix": Method(
        sft_loss, _DEMONSTRATIONS, _LIKELIHOOD, "-log p",
        group_advantages=False, defaults=_defaults(1, 3, 0, 1e-4),
    ),
    "distillation": Method(
        sft_loss, ("teacher",), _LIKELIHOOD, "-log p",
        group_advantages=False, defaults=_defaults(0, 3, 0, 1e-4),
    ),
    "dft": Method(
        dft_loss, _DEMONSTRATIONS, "arXiv 2508.05629", "-sg(p) log p",
        group_advantages=False, defaults=_defaults(1, 0, 0, 1e-4),
    ),
    "asft": Method(
        asft_loss, _DEMONSTRATIONS, "arXiv 2509.23753", "-sg(p) log p + lam KL",
        parameters=("lam",), needs=("reference_kl",),
        group_advantages=False, defaults=_defaults(1, 0, 0, 1e-4, lam=0.1),
    ),
    "psft": Method(
        psft_loss, _DEMONSTRATIONS, "arXiv 2508.17784", "-min(rho, clip(rho))",
        parameters=("clip_low", "clip_high"), needs=("old_logprobs",),
        # Eight as in the authors' script; with one, rho is 1 and the gradient that of SFT.
        group_advantages=False, defaults=_defaults(1, 0, 0, 1e-4, clip_high=0.28)
        | {"train": {"updates_per_rollout": 8}},
    ),
    "grpo": Method(
        clipped_loss, ("self",), "arXiv 2402.03300, Eq. 3", **_SURROGATE,
        defaults=_defaults(0, 0, 8, 2e-5, reduction="sequence_mean", eps=1e-4),
    ),
    "dr_grpo": Method(
        clipped_loss, ("self",), "arXiv 2503.20783", **_SURROGATE,
        defaults=_defaults(0, 0, 8, 2e-5, reduction="constant", std="none"),
    ),
    "dapo": Method(
        clipped_loss, ("self",), "arXiv 2503.14476, Eq. 8", **_SURROGATE,
        defaults=_defaults(0, 0, 8, 2e-5, clip_high=0.28, eps=1e-4, mask_truncated=True),
    ),
    "gft": Method(
        gft_loss, _MIXED, "arXiv 2604.14258, Eq. 21", "-A C(p) log p",
        parameters=("tau",), scales_with_advantage=True, defaults=_defaults(1, 3, 4, 2e-5),
    ),
    "gft_no_gal": Method(
        gft_no_gal_loss, _DEMONSTRATIONS, "arXiv 2604.14258, ablation", "-C(p) log p",
        parameters=("tau",), group_advantages=False, defaults=_defaults(1, 3, 0, 2e-5),
    ),
    "gft_no_dcr": Method(
        gft_no_dcr_loss, _MIXED, "arXiv 2604.14258, ablation", "-A log p",
        scales_with_advantage=True, defaults=_defaults(1, 3, 4, 2e-5),
    ),
    "gft_no_mix": Method(
        gft_loss, ("expert", "self"), "arXiv 2604.14258, ablation", "-A C(p) log p",
        parameters=("tau",), scales_with_advantage=True, defaults=_defaults(1, 0, 7, 2e-5),
    ),
}  # fmt: skip


def find_method(name: str) -> Method:
    """The method of that name, or the user's own `Method` at a dotted path.

    Raises: ValueError that says what is missing.
    """
    method = METHODS[name] if name in METHODS else load_dotted(name)
    if not isinstance(method, Method):
        raise ValueError(
            f"must be a gft_lite.objective.methods.Method, got a {type(method).__name__}"
        )
    return method
