"""The section `objective:` with the parameters of a method's own loss as further fields."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any

from pydantic import AfterValidator, Field, PydanticSchemaGenerationError, create_model
from pydantic_core import PydanticCustomError

from gft_lite.objective.methods import METHODS, Method
from gft_lite.recipe.objective_sections import ObjectiveSettings
from gft_lite.recipe.validation_errors import UNKNOWN_FIELD
from gft_lite.utils.errors import RecipeError


def check_objective(method: str, written: Any) -> ObjectiveSettings:
    """The `objective:` of a built-in method, with the defaults of the loss's own parameters.

    Raises: ValidationError for an unknown parameter or a value of the wrong type.
    """
    tree = written.model_dump() if isinstance(written, ObjectiveSettings) else written
    return as_yaml_values(builtin_schema(method).model_validate(tree))


def as_yaml_values(checked: ObjectiveSettings) -> ObjectiveSettings:
    """The same values as YAML can hold them, parameters as extra fields."""
    return ObjectiveSettings.model_validate(checked.model_dump(mode="json"))


@cache
def builtin_schema(method: str) -> type[ObjectiveSettings]:
    """The fields of ObjectiveSettings under their own rules, and the parameters it lacks."""
    parameters = METHODS[method].parameters
    return _schema({n: p for n, p in parameters.items() if n not in ObjectiveSettings.model_fields})


def dotted_schema(method: Method) -> type[ObjectiveSettings]:
    """The same with every parameter of the loss, which decides its type and default."""
    try:
        return _schema(method.parameters)
    except (NameError, TypeError, ValueError, PydanticSchemaGenerationError) as error:
        reason = " ".join(str(error).split())[:120]
        raise RecipeError(
            [f"method: the parameters of the loss must have types that YAML has, got {reason}. "
             "Annotate them with float, int, bool, str, Literal, list or dict."]
        ) from error  # fmt: skip


def _schema(parameters: Mapping[str, inspect.Parameter]) -> type[ObjectiveSettings]:
    """ObjectiveSettings with these parameters as fields, and with no others."""
    known = [*ObjectiveSettings.model_fields, *parameters]

    class Closed(ObjectiveSettings):
        __pydantic_extra__: dict[str, Annotated[Any, AfterValidator(_reject(known))]] = Field(
            init=False
        )

    fields: Any = {name: _field(parameter) for name, parameter in parameters.items()}
    return create_model("ObjectiveSettings", __base__=Closed, **fields)


def _field(parameter: inspect.Parameter) -> tuple[Any, Any]:
    annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
    if parameter.default is parameter.empty:
        return annotation, ...
    return annotation, Field(default=parameter.default, validate_default=True)


def _reject(known: list[str]) -> Callable[[Any], Any]:
    """A validator that rejects every value as an unknown field; `known` are the right names."""

    def reject(value: Any) -> Any:
        raise PydanticCustomError(UNKNOWN_FIELD, "unknown field", {"known": known})

    return reject
