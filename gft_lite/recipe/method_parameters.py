"""A method's own parameters as fields of `objective:`, checked against its loss."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError, create_model

from gft_lite.objective.methods import METHODS, Method, find_method
from gft_lite.recipe.objective_schema import as_yaml_values, builtin_schema, dotted_schema
from gft_lite.recipe.objective_sections import ObjectiveSettings
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.validation_errors import explain
from gft_lite.utils.errors import RecipeError


def complete_objective(recipe: Recipe) -> Recipe:
    """The recipe with `objective:` checked against the method's loss and its defaults filled in.

    Built-in methods are checked when the recipe is read. This function imports the module of a
    dotted method, so it must be called after the trust check. It checks the stages as well.

    Raises: RecipeError for a method that can't be imported, an unknown parameter, a value of the
        wrong type, or a parameter without default that the recipe does not set.
    """
    complete = recipe
    if recipe.method not in METHODS:
        objective = as_yaml_values(_checked_objective(recipe))
        complete = recipe.model_copy(update={"objective": objective})
    for number in range(len(recipe.stages)):
        complete_objective(complete.stage(number))
    return complete


def bind_method(recipe: Recipe) -> dict[str, Any]:
    """The keyword arguments of the method's loss, from the recipe's `objective:`.

    Raises: RecipeError, as `complete_objective`.
    """
    if recipe.method in METHODS:
        values = dict(builtin_schema(recipe.method).model_validate(recipe.objective.model_dump()))
    else:
        values = dict(_checked_objective(recipe))
    return {name: values[name] for name in _find_method(recipe.method).parameters}


def _checked_objective(recipe: Recipe) -> ObjectiveSettings:
    """The `objective:` of a dotted method, its parameters of the types that the loss declares."""
    section = dotted_schema(_find_method(recipe.method))
    schema: Any = create_model("Recipe", objective=(section, ...))
    try:
        # Where the recipe does not set tau, say, a loss that takes tau has its own default.
        tree = {"objective": recipe.objective.model_dump(exclude_unset=True)}
        return schema.model_validate(tree).objective
    except ValidationError as error:
        raise RecipeError(explain(error, schema, {})) from None


def _find_method(name: str) -> Method:
    try:
        return find_method(name)
    except ValueError as error:
        raise RecipeError([f"method: {error}, got {name!r}."]) from error
