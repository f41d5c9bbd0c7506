"""The recipe: one typed schema, `extends:`, `key=value` overrides, errors with file and line.

May import `objective` and `rewards` (their tables of names) and the foundation; never torch.

Adding a field:
1. Add it with its rule to its section, in the file from which `sections.py` imports it. A rule
   that concerns several sections is a validator in `schema.py`.
2. Write what it means in a string below it, which the site shows: what it does, its unit, what
   null or auto means, when to change it; not its type, default and limits.
3. Name the results that depend on it in its metadata (`effects.py`), unless its section does.
4. Test a valid and a wrong value in `tests/unit/test_recipe.py`, and what a change of the field
   affects in `tests/unit/test_effects.py`.

Parameters of a method's own loss are no fields: `objective_schema.py` reads its signature, and
the site their meanings in the `Args:` of its docstring.
"""

from gft_lite.recipe.effects import Affects, differences, values_affecting
from gft_lite.recipe.loader import find_recipe
from gft_lite.recipe.method_parameters import bind_method, complete_objective
from gft_lite.recipe.schema import Recipe
from gft_lite.utils.errors import RecipeError

__all__ = [
    "Affects",
    "Recipe",
    "RecipeError",
    "bind_method",
    "complete_objective",
    "differences",
    "find_recipe",
    "values_affecting",
]
