"""The command line: one file per command, each with `add` (its arguments) and `run`.

The top of a file imports the standard library and light helpers only. Everything else, from
pydantic to torch, is imported inside `run`, so that `gft-lite --help` and completion are fast.
May import every package.

Adding a command:
1. Write `cli/NAME.py` with `add(commands)` and `run(options) -> int`. `add_command` of
   `cli/parser.py` takes its description and its examples. Options that are numbers or output paths
   get their types from `cli/common.py`, which checks them before anything is loaded.
2. Add it to `COMMANDS` of `cli/entry_point.py`.
3. Test it in `tests/e2e` through `gft_lite.cli.main`; `tests/e2e/test_cli_arguments.py` fuzzes its
   options without an edit.
"""

from gft_lite.cli.common import DONE, FAILED, INTERRUPTED, WRONG_INPUT
from gft_lite.cli.entry_point import main

__all__ = ["DONE", "FAILED", "INTERRUPTED", "WRONG_INPUT", "main"]
