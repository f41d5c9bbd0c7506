"""Data sources: the lab, local files, a folder of files, or a data set of the hub."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from gft_lite.data.base import Rows, Unusable
from gft_lite.recipe.base import HUB_ID
from gft_lite.recipe.sections import DataSettings
from gft_lite.utils.errors import RecipeError

FORMATS = (".jsonl", ".json", ".parquet", ".csv")
_FORMAT_LIST = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
_SPLITS = {"train", "test", "validation", "valid", "val", "dev"}


def open_source(settings: DataSettings, field: str = "data") -> list[Rows]:
    """The rows of each file of the source, or of the data set that it names.

    Raises: RecipeError that names `field` if the source doesn't exist or can't be read.
    """
    source = settings.source
    if source == "lab":
        return [_lab(settings.split, field)]
    path = Path(source).expanduser()
    if path.is_dir():
        return [_read(p, field) for p in _files_of_split(path, settings.split, field)]
    if path.exists():
        return [_read(path, field)]
    # A name without an owner could be a built-in reader of datasets; its `pandas` unpickles.
    looks_local = path.suffix.lower() in (*FORMATS, ".txt", ".gz", ".zip", ".zst")
    if looks_local or not HUB_ID.fullmatch(source):
        advice = "" if looks_local or "/" in source else " Hub data sets are written owner/name."
        raise RecipeError([f"{field}.source: no such file or folder, got {source!r}.{advice}"])
    return [_hub(settings, field)]


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
        raise RecipeError(
            [
                f"{field}.source: no such file here, and the hub's data set {source!r} (config "
                f"{settings.config!r}, split {settings.split!r}) can't be loaded: {error}"
            ]
        ) from None
    return Rows(source, len(rows), rows.__getitem__, table=True)


def _files_of_split(folder: Path, split: str, field: str) -> list[Path]:
    """The data files of a folder; where file names contain a split's name, those of `split`."""
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in FORMATS)
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
        return read(path)
    except (ImportError, OSError, ValueError) as error:
        raise RecipeError([f"{field}.source: can't read {str(path)!r}: {error}."]) from None


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
    return _listed(path.name, list(csv.DictReader(io.StringIO(text))))


def _parquet(path: Path) -> Rows:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    return Rows(path.name, len(table), lambda i: table.slice(i, 1).to_pylist()[0], table=True)
