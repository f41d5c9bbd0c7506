"""The section `policy.lora`: the adapter that is trained."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from gft_lite.recipe.base import Fraction, Settings, at_most

_Rank = Annotated[PositiveInt, at_most(65_536)]
_Name = Annotated[str, Field(min_length=1)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | int) and not isinstance(value, bool) else value


class LoraSettings(Settings):
    """The adapter: W + s B A with s = alpha / rank. Source: LoRA, arXiv 2106.09685."""

    rank: _Rank = 16
    """Rank of the factors A and B; a higher one can learn more and takes more memory."""
    alpha: PositiveInt = 32
    """Numerator of the scale s, which acts like the learning rate."""
    dropout: Fraction = 0.0
    """Share of the adapter's inputs that are dropped in training. Off with several updates per
    rollout (`train.updates_per_rollout`) if the loss compares log-probs with those before them."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Linear modules to adapt, by the end of their path such as `q_proj`; `all-linear`: all but the
    output head."""
    exclude_modules: Annotated[
        list[_Name], BeforeValidator(_as_list, json_schema_input_type=str | list[str])
    ] = []
    """Modules not to adapt, with all below them."""
    layers_to_transform: Annotated[
        Annotated[list[NonNegativeInt], Field(min_length=1)] | None,
        BeforeValidator(_as_list, json_schema_input_type=int | list[int] | None),
    ] = None
    """Numbers, from 0, of the layers to adapt; null: all."""
    use_rslora: bool = False
    """Scale by s = alpha / sqrt(rank), so that high ranks keep their effect (arXiv 2312.03732)."""
    rank_pattern: dict[_Name, _Rank] = {}
    """Other ranks for some modules, by regular expressions of the end of their paths."""
    alpha_pattern: dict[_Name, PositiveInt] = {}
    """Other alphas for some modules, by the same kind of keys."""
    init: Literal["default", "pissa", "olora"] = "default"
    """Start: A random and B zero, or both the base's first singular vectors (`pissa`, arXiv
    2404.02948) or QR columns (`olora`, arXiv 2406.01775). The base stays as it is: the adapter
    subtracts the start, as a plain LoRA of twice the rank, in which it is trained and saved."""
    use_dora: bool = False
    """Train the norms of the weights too (DoRA, arXiv 2402.09353); vLLM can't serve it."""

    @model_validator(mode="before")
    @classmethod
    def _no_loftq(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and tree.get("init") == "loftq":
            raise ValueError(
                "init: must be default, pissa or olora; loftq corrects the quantised base by the "
                "adapter, which would then fit no other copy of the base"
            )
        return tree

    @model_validator(mode="after")
    def _patterns_are_valid(self) -> LoraSettings:
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                try:
                    re.compile(pattern)
                except re.error as error:
                    rule = f"must have regular expressions as keys, not {pattern!r} ({error})"
                    raise ValueError(f"{name}: {rule}") from error
        if self.use_dora and self.init != "default":
            raise ValueError("init: must be default with policy.lora.use_dora")
        return self

    @property
    def trained(self) -> LoraSettings:
        """The plain LoRA that is trained and saved, for `pissa` and `olora` of twice the rank.

        s stays the same. See policy/principal.py.
        """
        if self.init == "default":
            return self
        # With rslora, s = alpha / sqrt(rank).
        factor = math.sqrt(2) if self.use_rslora else 2
        return self.model_copy(
            update={
                "init": "default",
                "rank": 2 * self.rank,
                "alpha": factor * self.alpha,
                "rank_pattern": {name: 2 * rank for name, rank in self.rank_pattern.items()},
                "alpha_pattern": {n: factor * alpha for n, alpha in self.alpha_pattern.items()},
            }
        )

    @property
    def largest_rank(self) -> int:
        """The largest rank of a module."""
        return max([self.rank, *self.rank_pattern.values()])

    @property
    def selects(self) -> bool:
        """True if not all of `target_modules` are adapted."""
        return bool(self.exclude_modules) or self.layers_to_transform is not None

    def keeps(self, path: str) -> bool:
        """True unless a module is excluded or in a layer that is not trained."""
        if any(f".{name}." in f".{path}." for name in self.exclude_modules):
            return False
        return self.layers_to_transform is None or layer_of(path) in self.layers_to_transform

    def rank_of(self, path: str) -> int:
        """The rank of a linear module of the decoder's layers, 0 if it is not adapted."""
        targets = self.target_modules
        named = targets == "all-linear" or any(f".{path}".endswith(f".{t}") for t in targets)
        if not (named and self.keeps(path)):
            return 0
        found = (r for name, r in self.rank_pattern.items() if matches_pattern(name, path))
        return next(found, self.rank)


def layer_of(path: str) -> int | None:
    """The number of the layer that a module is in; None for a module outside of the layers."""
    return next((int(part) for part in path.split(".") if part.isdecimal()), None)


def matches_pattern(pattern: str, path: str) -> bool:
    """True if a key of a pattern applies to a module: peft's rule, and vLLM's."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None
