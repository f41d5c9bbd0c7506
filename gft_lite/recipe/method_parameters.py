"""A method's own parameters as fields of `objective:`, checked against its loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    AfterValidator,
    Field,
    PydanticSchemaGenerationError,
    ValidationError,
    create_model,
)
from pydantic_core import PydanticCustomError

from gft_lite.objective.methods import METHODS, Method, find_method
from gft_lite.recipe.sections import ObjectiveSettings
from gft_lite.recipe.validation_errors import UNKNOWN_FIELD, explain
from gft_lite.utils.errors import RecipeError

if TYPE_CHECKING:
    from gft_lite.recipe.schema import Recipe


def check_objective(method: str, written: Any) -> ObjectiveSettings:
    """The `objective:` of a built-in method, with the defaults of the loss's own parameters.

    Raises: ValidationError for an unknown parameter or a value of the wrong type.
    """
    tree = written.model_dump() if isinstance(written, ObjectiveSettings) else written
    return _plain(_builtin_schema(method).model_validate(tree))


def complete_objective(recipe: Recipe) -> Recipe:
    """The recipe with `objective:` checked against the method's loss and its defaults filled in.

    Built-in methods are checked when the recipe is read. This function imports the module of a
    dotted method, so it must be called after the trust check. It checks the stages as well.

    Raises: RecipeError for a method that can't be imported, an unknown parameter, a value of the
        wrong type, or a parameter without default that the recipe does not set.
    """
    complete = recipe
    if recipe.method not in METHODS:
        complete = recipe.model_copy(update={"objective": _plain(_checked_objective(recipe))})
    for number in range(len(recipe.stages)):
        complete_objective(complete.stage(number))
    return complete


def bind_method(recipe: Recipe) -> dict[str, Any]:
    """The keyword arguments of the method's loss, from the recipe's `objective:`.

    Raises: RecipeError, as `complete_objective`.
    """
    if recipe.method in METHODS:
        values = dict(_builtin_schema(recipe.method).model_validate(recipe.objective.model_dump()))
    else:
        values = dict(_checked_objective(recipe))
    return {name: values[name] for name in _find_method(recipe.method).parameters}


def _checked_objective(recipe: Recipe) -> ObjectiveSettings:
    """The `objective:` of a dotted method, its parameters of the types that the loss declares."""
    section = _dotted_schema(_find_method(recipe.method))
    schema: Any = create_model("Recipe", objective=(section, ...))
    try:
        # Where the recipe does not set tau, say, a loss that takes tau has its own default.
        tree = {"objective": recipe.objective.model_dump(exclude_unset=True)}
        return schema.model_validate(tree).objective
    except ValidationError as error:
        raise RecipeError(explain(error, schema, {})) from None


def _plain(checked: ObjectiveSettings) -> ObjectiveSettings:
    """The same values as YAML can hold them, parameters as extra fields."""
    return ObjectiveSettings.model_validate(checked.model_dump(mode="json"))


def _find_method(name: str) -> Method:
    try:
        return find_method(name)
    except ValueError as error:
        raise RecipeError([f"method: {error}, got {name!r}."]) from error


@cache
def _builtin_schema(method: str) -> type[ObjectiveSettings]:
    """The fields of ObjectiveSettings under their own rules, and the parameters it lacks."""
    parameters = METHODS[method].parameters
    return _schema({n: p for n, p in parameters.items() if n not in ObjectiveSettings.model_fields})


def _dotted_schema(method: Method) -> type[ObjectiveSettings]:
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
