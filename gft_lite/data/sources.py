"""Data sources: the lab, local files, a folder of files, or a data set of the hub."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from gft_lite.data.base import UNREADABLE, Rows, Unusable
from gft_lite.recipe.base import is_hub_id
from gft_lite.recipe.sections import DataSettings
from gft_lite.utils.errors import RecipeError, short_repr

FORMATS = (".jsonl", ".json", ".parquet", ".csv")
_FORMAT_LIST = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
# Descriptions of data sets, which lie beside their rows.
_METADATA = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}
_READ_ERRORS = (
    ImportError, OSError, ValueError, LookupError, NotImplementedError, MemoryError,
)  # fmt: skip
MAX_REASON = 500  # characters of a library's error
_COMMA = re.compile(r",(?! )")
_SPLITS = {"train", "test", "validation", "valid", "val", "dev"}


def open_source(settings: DataSettings, field: str = "data") -> list[Rows]:
    """The rows of each file of the source, or of the data set that it names.

    Raises: RecipeError that names `field` if the source doesn't exist or can't be read.
    """
    if settings.source == "lab":
        return [_lab(settings.split, field)]
    # A source can be a name that the file system does not accept, or a folder of somebody else.
    try:
        local = _local(settings, field)
    except (OSError, ValueError, RuntimeError) as error:
        shown = short_repr(settings.source)
        raise RecipeError([f"{field}.source: can't read {shown}: {_one_line(error)}."]) from None
    return [_hub(settings, field)] if local is None else local


def is_local(settings: DataSettings, field: str = "data") -> bool:
    """True if the source is on this machine, False for the id of a hub data set.

    Raises: RecipeError that names `field` if it is neither.
    """
    if settings.source == "lab":
        return True
    try:
        path = Path(settings.source).expanduser()
        if path.exists():
            return True
    except (OSError, RuntimeError) as error:
        shown = short_repr(settings.source)
        raise RecipeError([f"{field}.source: can't read {shown}: {_one_line(error)}."]) from None
    _check_hub_id(path, settings.source, field)
    return False


def _local(settings: DataSettings, field: str) -> list[Rows] | None:
    """The rows of a local file or folder, None for the id of a hub data set."""
    source = settings.source
    path = Path(source).expanduser()
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return [_saved_to_disk(path, settings.split, field)]
    if path.is_dir():
        return [_read(p, field) for p in _files_of_split(path, settings.split, field)]
    if path.exists():
        return [_read(path, field)]
    _check_hub_id(path, source, field)
    return None


def _check_hub_id(path: Path, source: str, field: str) -> None:
    """Raises: RecipeError for what cannot be the id of a data set."""
    # A name without an owner could be a built-in reader of datasets; its `pandas` unpickles.
    looks_local = path.suffix.lower() in (*FORMATS, ".txt", ".gz", ".zip", ".zst")
    if looks_local or not is_hub_id(source):
        advice = "" if looks_local or "/" in source else " Hub data sets are written owner/name."
        raise RecipeError([f"{field}.source: no such file or folder, got {source!r}.{advice}"])


def _lab(split: str, field: str) -> Rows:
    from gft_lite.lab.task import rows

    try:
        return _listed("lab", rows(split))
    except ValueError as error:
        raise RecipeError([f"{field}.{error}"]) from None


def _hub(settings: DataSettings, field: str) -> Rows:
    source = settings.source
    file = {"data_files": {settings.split: settings.file}} if settings.file else {}
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise RecipeError([f"{field}.source: needs the package datasets ({error})."]) from None
    try:
        rows = datasets.load_dataset(
            source, name=settings.config, split=settings.split, revision=settings.revision, **file
        )
    except (DatasetsError, ImportError, OSError, ValueError, RuntimeError) as error:
        what = f"{source!r} (config {settings.config!r}, split {settings.split!r})"
        rule = f"no such file here, and the hub's data set {what} can't be loaded"
        raise RecipeError([f"{field}.source: {rule}: {_one_line(error)}."]) from None
    return _dataset(source, rows)


def _saved_to_disk(folder: Path, split: str, field: str) -> Rows:
    """A data set, or one split of several, that `save_to_disk` of `datasets` has written."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        found = datasets.load_from_disk(str(folder))
    except (DatasetsError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        rule = "must be what save_to_disk of datasets writes"
        raise RecipeError(
            [f"{field}.source: {rule}, got {str(folder)!r} ({_one_line(error)})."]
        ) from None
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            names = ", ".join(found)
            raise RecipeError([f"{field}.split: must be one of {names}, got {split!r}."])
        found = found[split]
    return _dataset(folder.name, found)


def _dataset(name: str, dataset: Any) -> Rows:
    """The rows of a data set of `datasets`."""
    tables = dataset.with_format("arrow")
    return Rows(name, len(dataset), lambda i: _arrow_row(tables[i], 0), table=True)


def _files_of_split(folder: Path, split: str, field: str) -> list[Path]:
    """The data files of a folder; where file names contain a split's name, those of `split`."""
    files = sorted(
        p
        for p in folder.iterdir()
        if p.suffix.lower() in FORMATS and p.name not in _METADATA and p.name[0] != "."
        if p.is_file()
    )
    if not files:
        raise RecipeError([f"{field}.source: must hold {_FORMAT_LIST} files, got {str(folder)!r}."])
    words = {p: set(re.split(r"[\W_]+", p.stem.lower())) for p in files}
    if not any(words[p] & (_SPLITS | {split.lower()}) for p in files):
        return files
    chosen = [p for p in files if split.lower() in words[p]]
    if not chosen:
        names = ", ".join(p.name for p in files[:10])
        raise RecipeError([f"{field}.split: must name one of {names}, got {split!r}."])
    return chosen


def _read(path: Path, field: str) -> Rows:
    readers = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".csv": _csv}
    read = readers.get(path.suffix.lower())
    if read is None:
        raise RecipeError([f"{field}.source: must be a {_FORMAT_LIST} file, got {str(path)!r}."])
    try:
        if not path.is_file():  # Reading a pipe or a device may never end.
            raise ValueError("it is not a regular file")
        return read(path)
    except _READ_ERRORS as error:
        raise RecipeError(
            [f"{field}.source: can't read {str(path)!r}: {_one_line(error)}."]
        ) from None


def _one_line(error: Exception) -> str:
    """An error of a library as one line without its full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text)[:MAX_REASON].rstrip(". ")


def _listed(name: str, rows: list[Any]) -> Rows:
    return Rows(name, len(rows), rows.__getitem__)


def _jsonl(path: Path) -> Rows:
    # No row after the last newline; row numbers equal line numbers.
    data = path.read_bytes().rstrip()
    lines = data.split(b"\n") if data else []
    return Rows(path.name, len(lines), lambda i: _parse_line(lines[i]))


def _parse_line(line: bytes) -> Any:
    if not line.strip():
        raise Unusable("blank line")
    try:
        return json.loads(line)
    except UnicodeDecodeError:
        raise Unusable("not UTF-8") from None
    except (ValueError, RecursionError):
        raise Unusable("not valid JSON") from None


def _json(path: Path) -> Rows:
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return _jsonl(path)  # many .json files hold one object per line
    return _listed(path.name, rows if isinstance(rows, list) else [rows])


def _csv(path: Path) -> Rows:
    # The standard library's reader keeps answers such as 007 or 1e5 unchanged.
    csv.field_size_limit(2**31 - 1)
    text = path.read_text(encoding="utf-8-sig")
    lines, rows = text.split("\n"), list(_csv_records(text))
    if not rows:
        return _listed(path.name, [])
    _, header = rows[0]
    _check_names(header)

    def read(i: int) -> Any:
        first, cells = rows[i + 1]
        last = rows[i + 2][0] if i + 2 < len(rows) else len(lines)
        if len(header) > 1 and _looks_like_rows(lines[first:last], len(header)):
            raise Unusable("several rows in a cell between quotes")
        extra = {None: cells[len(header) :]} if len(cells) > len(header) else {}
        return dict(zip_longest(header, cells[: len(header)])) | extra

    return Rows(path.name, len(rows) - 1, read)


def _check_names(columns: Sequence[str]) -> None:
    if twice := sorted({name for name in columns if name and columns.count(name) > 1}):
        raise ValueError(f"column names must differ, got {', '.join(twice)} twice")


def _csv_records(text: str) -> Iterator[tuple[int, list[str]]]:
    """The records of a CSV text, each with the number of its first line, from 0.

    Raises: ValueError for a quote that isn't closed before the next comma or line.
    """
    reader = csv.reader(io.StringIO(text), strict=True)
    while True:
        first = reader.line_num
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            advice = "In a quoted cell, write a quote as two"
            raise ValueError(f"the row from line {first + 1} on: {error}. {advice}") from None
        if cells:
            yield first, cells


def _looks_like_rows(lines: Sequence[str], columns: int) -> bool:
    """True if each of several lines has as many cells as a row: two stray quotes join rows.

    Commas before a space are text.
    """
    lines = [line for line in lines if line.strip()]
    return len(lines) > 1 and all(len(_COMMA.findall(line)) == columns - 1 for line in lines)


def _parquet(path: Path) -> Rows:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    _check_names(file.schema_arrow.names)
    unreadable: dict[str, Any] = {}
    try:
        table = file.read()
    except _READ_ERRORS:
        table = _readable_columns(file)
        unreadable = dict.fromkeys(set(file.schema_arrow.names) - {*table.column_names}, UNREADABLE)
    return Rows(path.name, len(table), lambda i: _arrow_row(table, i) | unreadable, table=True)


def _readable_columns(file: Any) -> Any:
    """The table of the columns that can be read. Raises: the last error if none can be."""
    import pyarrow

    columns, failure = {}, None
    for name in file.schema_arrow.names:
        try:
            columns[name] = file.read(columns=[name]).column(name)
        except _READ_ERRORS as error:
            failure = error
    if not columns and failure:
        raise failure
    return pyarrow.table(columns)


def _arrow_row(table: Any, i: int) -> dict[str, Any]:
    columns = zip(table.column_names, table.columns, strict=True)
    return {name: _arrow_value(column[i]) for name, column in columns}


def _arrow_value(scalar: Any) -> Any:
    """A cell as a Python value; UNREADABLE where it is invalid UTF-8 or a date out of range."""
    import pyarrow

    try:
        return scalar.as_py()
    except (ValueError, ArithmeticError, pyarrow.ArrowException):
        if isinstance(scalar, pyarrow.StructScalar):
            return {name: _arrow_value(scalar[name]) for name in scalar}
        return UNREADABLE
