"""What a training method is: its loss and everything else that a run has to know about it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal, get_type_hints

from gft_lite.objective.losses import LossOutput
from gft_lite.objective.reduction import Part
from gft_lite.types import SOURCES, Source

Need = Literal[
    "source",
    "old_logprobs",
    "engine_logprobs",
    "entropy",
    "row_entropy",
    "entropy_quantile",
    "reference_logprobs",
    "reference_kl",
    "teacher_logprobs",
    "correct",
    "success_share",
    "progress",
]


@dataclass(frozen=True, slots=True)
class Dial:
    """The parameter of a method that is tuned beside its learning rate, and the values to try.

    `parameter` is a keyword-only argument of the method's loss, `select` or `prefixes`. Parameters
    of `along` with the same value follow it, such as the other end of a constant schedule.
    """

    parameter: str
    values: tuple[float, ...]
    along: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """A training method: its loss, the sources it trains on, its default settings, its paper.

    - `loss` takes `LossInputs`. `needs` names the optional inputs that it reads.
    - `parts`: the terms of the loss, each with a mean of its own; a loss of P parts returns
      per-token values [P, T]. Without parts there is one, with the recipe's reduction.
    - `group_advantages`: rewards become advantages; otherwise each advantage is 1 and a run needs
      no reward. `baseline` are the sources whose rewards make up mean and standard deviation.
    - `scales_with_advantage`: loss and gradient are 0 where the advantage is 0, for all sources or
      those named, so that such rows are left out before the forward.
    - `select` takes a `ScoredGroup` and returns, for each response, whether it is trained on.
    - `prefixes` takes the number of self samples, the progress in [0, 1] and a `random.Random`, and
      returns for each sample the share of an expert demonstration that is put before it.
    - `teacher_sees_demonstration`: teacher log-probs are those after a prompt with a demonstration.
    - `dial`: the parameter that a comparison of methods tunes beside the learning rate.

    The keyword-only arguments of `loss`, `select` and `prefixes` are the method's parameters, which
    the recipe sets under `objective:`. `defaults` is a recipe fragment under the user's recipe.
    """

    loss: Callable[..., LossOutput]
    sources: tuple[Source, ...]
    citation: str
    formula: str = ""
    needs: tuple[Need, ...] = ()
    parts: tuple[Part, ...] = ()
    group_advantages: bool = True
    baseline: tuple[Source, ...] = SOURCES
    scales_with_advantage: bool | tuple[Source, ...] = False
    select: Callable[..., Sequence[bool]] | None = None
    prefixes: Callable[..., Sequence[float]] | None = None
    teacher_sees_demonstration: bool = False
    dial: Dial | None = None
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The keyword-only arguments of the method's functions, by name."""
        functions = [f for f in (self.loss, self.select, self.prefixes) if f]
        return {name: p for f in functions for name, p in _keyword_only(f).items()}

    @property
    def uses_demonstrations(self) -> bool:
        """True if the method reads demonstrations that are not responses of a group."""
        return self.prefixes is not None or self.teacher_sees_demonstration

    @property
    def on_policy(self) -> bool:
        """True if self samples must be those of the current policy."""
        reads = {"old_logprobs", "teacher_logprobs"} & set(self.needs)
        return "self" in self.sources and bool(reads or self.prefixes)

    def ignores_flat(self, source: Source) -> bool:
        """True if a row of this source with advantage 0 adds nothing to loss and gradient."""
        scales = self.scales_with_advantage
        return scales if isinstance(scales, bool) else source in scales


def call_with_parameters(
    function: Callable[..., Any], *arguments: Any, parameters: Mapping[str, Any]
) -> Any:
    """`function(*arguments)` with those of the parameters that are its keyword-only arguments."""
    names = _keyword_only(function)
    return function(*arguments, **{name: parameters[name] for name in names})


def _keyword_only(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    found = inspect.signature(function).parameters
    return {n: _resolve(p, function) for n, p in found.items() if p.kind is p.KEYWORD_ONLY}


def _resolve(parameter: inspect.Parameter, function: Callable[..., Any]) -> inspect.Parameter:
    """The parameter with its annotation as a type, which the recipe checks its value against."""
    if not isinstance(parameter.annotation, str):
        return parameter
    names = getattr(inspect.unwrap(function), "__globals__", {})
    holder = SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    hints = get_type_hints(holder, names, include_extras=True)
    return parameter.replace(annotation=hints[parameter.name])


def defaults(
    expert: int, teacher: int, self_: int, lr: float, **objective: Any
) -> dict[str, dict[str, Any]]:
    """A method's recipe fragment: its group, its loss settings, a QLoRA learning rate."""
    group: dict[str, Any] = {"expert": expert, "teacher": teacher, "self": self_}
    if self_ == 0:
        group["shortfall"] = "drop"
    return {"group": group, "objective": objective, "optim": {"lr": lr}}
