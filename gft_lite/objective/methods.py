"""What a training method is, and the table `METHODS` of all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal, get_type_hints

from gft_lite.objective.losses import (
    LossOutput,
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

Need = Literal[
    "source",
    "old_logprobs",
    "engine_logprobs",
    "entropy",
    "reference_logprobs",
    "reference_kl",
    "success_share",
    "progress",
]


@dataclass(frozen=True)
class Method:
    """A training method: its loss, the sources it trains on, its default settings, its paper.

    `loss` takes `LossInputs`; its keyword-only arguments are the method's parameters, which the
    recipe sets under `objective:`. `needs` names the optional inputs that it reads. With
    `scales_with_advantage`, loss and gradient are 0 where the advantage is 0, so that such rows
    are left out before the forward. `defaults` is a recipe fragment under the user's recipe.
    """

    loss: Callable[..., LossOutput]
    sources: tuple[Source, ...]
    citation: str
    formula: str = ""
    needs: tuple[Need, ...] = ()
    group_advantages: bool = True
    scales_with_advantage: bool = False
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The keyword-only arguments of the loss, by name."""
        signature = inspect.signature(self.loss)
        names = [n for n, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY]
        return {name: _resolve(signature.parameters[name], self.loss) for name in names}


def _resolve(parameter: inspect.Parameter, function: Callable[..., Any]) -> inspect.Parameter:
    """The parameter with its annotation as a type, which the recipe checks its value against."""
    if not isinstance(parameter.annotation, str):
        return parameter
    names = getattr(inspect.unwrap(function), "__globals__", {})
    holder = SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    hints = get_type_hints(holder, names, include_extras=True)
    return parameter.replace(annotation=hints[parameter.name])


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
        needs=("reference_kl",),
        group_advantages=False, defaults=_defaults(1, 0, 0, 1e-4, lam=0.1),
    ),
    "psft": Method(
        psft_loss, _DEMONSTRATIONS, "arXiv 2508.17784", "-min(rho, clip(rho))",
        needs=("old_logprobs",),
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
        scales_with_advantage=True, defaults=_defaults(1, 3, 4, 2e-5),
    ),
    "gft_no_gal": Method(
        gft_no_gal_loss, _DEMONSTRATIONS, "arXiv 2604.14258, ablation", "-C(p) log p",
        group_advantages=False, defaults=_defaults(1, 3, 0, 2e-5),
    ),
    "gft_no_dcr": Method(
        gft_no_dcr_loss, _MIXED, "arXiv 2604.14258, ablation", "-A log p",
        scales_with_advantage=True, defaults=_defaults(1, 3, 4, 2e-5),
    ),
    "gft_no_mix": Method(
        gft_loss, ("expert", "self"), "arXiv 2604.14258, ablation", "-A C(p) log p",
        scales_with_advantage=True, defaults=_defaults(1, 0, 7, 2e-5),
    ),
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
