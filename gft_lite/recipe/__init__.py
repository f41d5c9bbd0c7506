"""The recipe: one typed schema, `extends:`, `key=value` overrides, errors with file and line.

May import `objective` and `rewards` (their tables of names) and the foundation; never torch.

Adding a field:
1. Add it to its section in `sections.py` with its rule; rules across sections stand in `schema.py`.
2. Say in the field's metadata (`base.py`) what depends on it.
3. Test a right and a wrong value in `tests/unit/test_recipe.py`.
"""

from gft_lite.recipe.loader import find_recipe
from gft_lite.recipe.schema import Recipe
from gft_lite.utils.errors import RecipeError

__all__ = ["Recipe", "RecipeError", "find_recipe"]
