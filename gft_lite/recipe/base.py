"""What every section of the recipe is built on: the base class, field types, reading a file."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from gft_lite.recipe.annotations import union_members
from gft_lite.recipe.loader import gather
from gft_lite.recipe.validation_errors import Places, explain
from gft_lite.utils.errors import RecipeError


def named_in(known: Collection[str]) -> AfterValidator:
    """A validator: the name is one of `known`, or a dotted path to the user's own object."""

    def check(name: str) -> str:
        if name in known or re.fullmatch(r"[A-Za-z_][\w.]*[.:][A-Za-z_]\w*", name):
            return name
        rule = "must be one of {names}, or a dotted path"
        context = {"names": ", ".join(sorted(known)), "known": list(known)}
        raise PydanticCustomError("unknown_name", rule, context)

    return AfterValidator(check)


def matching(pattern: str, rule: str) -> AfterValidator:
    """Text must match `pattern`; `rule` says so in words."""

    def check(text: str) -> str:
        if re.fullmatch(pattern, text):
            return text
        raise ValueError(rule)

    return AfterValidator(check)


HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # Of a model, an adapter or a data set.
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]


class Settings(BaseModel):
    """A section of the recipe: unknown fields are errors, values don't change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = union_members(cls.model_fields[str(info.field_name)].annotation)
        number = (int in kinds or float in kinds) and bool not in kinds
        if isinstance(value, bool) and number:
            raise ValueError("must be a number")
        return value


S = TypeVar("S", bound=Settings)


def read_settings(schema: type[S], path: Path, overrides: Sequence[str] = ()) -> tuple[S, Places]:
    """A file, what it extends and overrides, checked, and where each value was written.

    Raises: RecipeError with every error found.
    """
    tree, places, problems = gather(path, overrides)
    try:
        value = schema.model_validate(tree)
    except ValidationError as error:
        # Where a file could not be read, its fields would be missed in cross-field checks.
        problems += explain(error, schema, places, cross_fields=not problems)
    if problems:
        raise RecipeError(problems)
    return value, places
