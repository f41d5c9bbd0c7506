"""Rows to problems, and text to tokens: data sources, column mapping, prompts and chat templates.

May import `recipe`, `rewards`, `types`, `lab` and `utils`.

Adding a file format:
1. Write a reader `Path -> Rows` in `sources.py`; a row that can't be parsed raises `Unusable`.
2. Add its suffix to `FORMATS` and its reader to `_read` there.
3. Add a file of the format to `test_every_format_gives_the_same_problems` in
   `tests/unit/test_data.py`.

Adding a usual name of a column, or a kind of answers, that `gft-lite init` knows:
1. Add the name to its list in `detect.py`, or the kind to `answer_kinds.py` and its reward to
   `detect.py`.
2. Add rows of it to `tests/unit/test_detect.py`.
"""

from gft_lite.data.base import Rows, Unusable
from gft_lite.data.detect import Detected, Guess, detect
from gft_lite.data.problems import Loaded, load_problems, problems_of_step, split_holdout
from gft_lite.data.prompts import PromptFormat

__all__ = [
    "Detected",
    "Guess",
    "Loaded",
    "PromptFormat",
    "Rows",
    "Unusable",
    "detect",
    "load_problems",
    "problems_of_step",
    "split_holdout",
]
