"""The base class of all sections, common field types, and the reading of a settings file."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError

from gft_lite.recipe.annotations import union_members
from gft_lite.recipe.loader import MAX_BITS, gather
from gft_lite.recipe.validation_errors import Places, explain
from gft_lite.utils.errors import RecipeError


@dataclass(frozen=True)
class _NameValidator(AfterValidator):
    """A validator of names, which editors offer by the JSON schema."""

    known: Collection[str] = ()

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [{"enum": list(self.known)}, handler(schema)]}


def named_in(known: Collection[str], pattern: str = "") -> AfterValidator:
    """A validator for a name among `known`, one of a pattern, or a dotted path to an object."""
    accepted = rf"[A-Za-z_][\w.]*[.:][A-Za-z_]\w*|{pattern}"

    def check(name: str) -> str:
        if name in known or (name and re.fullmatch(accepted, name)):
            return name
        rule = "must be one of {names}, or a dotted path"
        context = {"names": ", ".join(sorted(known)), "known": list(known)}
        raise PydanticCustomError("unknown_name", rule, context)

    return _NameValidator(check, known)


def matching(pattern: str, rule: str) -> AfterValidator:
    """A validator for text that matches `pattern`; `rule` is the error text."""

    def check(text: str) -> str:
        if re.fullmatch(pattern, text):
            return text
        raise ValueError(rule)

    return AfterValidator(check)


# As huggingface_hub checks an id: parts of at most 96 characters that begin and end with \w.
_HUB_ID = re.compile(
    r"(?!.*(?:--|\.\.|\.git$))\w(?:[\w.-]{0,94}\w)?/\w(?:[\w.-]{0,94}\w)?", re.ASCII
)
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]


def _sampleable(temperature: float) -> float:
    # Logits over a smaller one overflow, and vLLM raises it to 0.01 without an error.
    if 0 < temperature < 0.01:
        raise ValueError("must be 0, which is greedy, or at least 0.01")
    return temperature


Temperature = Annotated[float, Field(ge=0, le=100), AfterValidator(_sampleable)]


def at_most(limit: int) -> Any:
    """A validator for counts of what is made at once, so that a typing error exhausts no memory."""
    return Field(le=limit)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


# Of a list of texts, which may be given as one text alone.
ONE_OR_MORE = BeforeValidator(_as_list, json_schema_input_type=str | list[str])


def is_hub_id(name: str) -> bool:
    """True if `name` may be the id of a model, an adapter or a data set, not a path in a file."""
    # os.path, unlike pathlib, finds nothing at a name that is too long.
    return bool(_HUB_ID.fullmatch(name)) and not os.path.isfile(os.path.dirname(name))


class Settings(BaseModel):
    """A section of the recipe: immutable, without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _check_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Reject booleans as numbers, and whole numbers that YAML would not be read with."""
        kinds = union_members(cls.model_fields[str(info.field_name)].annotation)
        if (int in kinds or float in kinds) and bool not in kinds and isinstance(value, bool):
            raise ValueError("must be a number")
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise ValueError("must be a smaller number")
        return value

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any], places: Places | None = None) -> Self:
        """Check a nested dict against the schema. Raises: RecipeError with every error found."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise RecipeError(explain(error, cls, places or {})) from None


S = TypeVar("S", bound=Settings)


def read_settings(schema: type[S], path: Path, overrides: Sequence[str] = ()) -> tuple[S, Places]:
    """The checked settings of a file with its bases and overrides, and the place of each value.

    Raises: RecipeError with every error found.
    """
    tree, places, problems = gather(path, overrides)
    try:
        value = schema.model_validate(tree)
    except ValidationError as error:
        # A file that could not be read may hold the fields that a cross-field check misses.
        problems += explain(error, schema, places, cross_fields=not problems)
    if problems:
        raise RecipeError(problems)
    return value, places
