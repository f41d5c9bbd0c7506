"""Rows to problems, and text to tokens: data sources, column mapping, prompts and chat templates.

May import `recipe`, `rewards`, `types`, `lab` and `utils`.

Adding a file format:
1. Write a reader `Path -> Rows` in `sources.py`; a row that can't be parsed raises `Unusable`.
2. Add its suffix to `FORMATS` and its reader to `_read` there.
3. Add a file of the format to `test_every_format_gives_the_same_problems` in
   `tests/unit/test_data.py`.
"""

from gft_lite.data.base import Rows, Unusable
from gft_lite.data.problems import Loaded, load_problems, problems_of_step, split_holdout
from gft_lite.data.prompts import PromptFormat

__all__ = [
    "Loaded",
    "PromptFormat",
    "Rows",
    "Unusable",
    "load_problems",
    "problems_of_step",
    "split_holdout",
]
