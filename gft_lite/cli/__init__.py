"""The command line: a file for each command, each with `add` (its arguments) and `run`.

A command imports torch and the packages above `recipe` inside `run`, so that `gft-lite --help`
and a recipe error take no time. May import every package.

Adding a command:
1. Write `cli/NAME.py` with `add(commands)` and `run(options) -> int`.
2. Name it in `COMMANDS` of `cli/entry_point.py`.
3. Test it in `tests/e2e` through `gft_lite.cli.main`.
"""

from gft_lite.cli.common import DONE, FAILED, INTERRUPTED, WRONG_INPUT
from gft_lite.cli.entry_point import main

__all__ = ["DONE", "FAILED", "INTERRUPTED", "WRONG_INPUT", "main"]
