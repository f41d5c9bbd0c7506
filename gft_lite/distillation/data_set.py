"""The data set that a distillation writes, and the recipe fragment that reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gft_lite.distillation.progress import Distillation
from gft_lite.recipe.loader import Dumper
from gft_lite.recipe.sections import ColumnsSettings
from gft_lite.types import Problem
from gft_lite.utils.errors import UserError
from gft_lite.utils.files import atomic_write, write_text_atomic


def side_folder(out: Path) -> Path:
    """The folder beside a data set with its responses, summary and recipe fragment."""
    return out.with_suffix(".distill")


def write_data_set(
    path: Path, columns: ColumnsSettings, problems: Sequence[Problem], state: Distillation,
    teacher: str,
) -> None:  # fmt: skip
    """Write the data set and its recipe fragment. Raises: UserError for unwritable columns."""
    rows = list(_rows(problems, state, teacher))
    if path.suffix == ".jsonl":
        write_text_atomic(path, "".join(json.dumps(row, default=str) + "\n" for row in rows))
    else:
        _write_parquet(path, rows)
    write_text_atomic(
        side_folder(path) / "data.yaml", recipe_fragment(columns, path, state.settings.column)
    )


def _rows(
    problems: Sequence[Problem], state: Distillation, teacher: str
) -> Iterator[dict[str, Any]]:
    """The source's rows in the order of training, with the responses in additional columns."""
    name = state.settings.column
    for number, problem in enumerate(problems):
        graded, _ = state.demonstrations(number)
        yield {
            **problem.columns,
            name: [g.response.text for g in graded],
            f"{name}_rewards": [g.reward for g in graded],
            f"{name}_verdicts": [g.verdict for g in graded],
            f"{name}_model": teacher,
        }


def _write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises: UserError for columns without a common type."""
    import pyarrow
    import pyarrow.parquet

    names = dict.fromkeys(name for row in rows for name in row)
    try:
        table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            [f"--out: must be .jsonl for what parquet can't hold, got {str(path)!r} ({reason})."]
        ) from error
    with atomic_write(path) as partial:
        pyarrow.parquet.write_table(table, partial)


def recipe_fragment(columns: ColumnsSettings, path: Path, column: str) -> str:
    """The `data:` section that reads a distilled file, for a recipe to extend."""
    others = [name for name in columns.teacher if name != column]
    data = {
        "source": str(path),
        "shuffle": False,
        "columns": columns.model_copy(update={"teacher": [*others, column]}).model_dump(),
    }
    text = yaml.dump({"data": data}, Dumper=Dumper, sort_keys=False, allow_unicode=True)
    return f"# The rows are in the order of training: shuffled already.\n{text}"
