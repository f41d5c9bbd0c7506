"""Helpers without knowledge of training: errors, files, progress, memory, statistics, processes.

May import nothing else of the package. A helper belongs here if at least two packages use it.
"""

from gft_lite.utils.errors import RecipeError, UserError
from gft_lite.utils.files import atomic_write, check_output_path, lock_folder, read_json
from gft_lite.utils.jsonl import JsonlFile

__all__ = [
    "JsonlFile",
    "RecipeError",
    "UserError",
    "atomic_write",
    "check_output_path",
    "lock_folder",
    "read_json",
]
