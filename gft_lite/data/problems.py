"""Rows to problems: which columns mean what, which rows are usable, and in which order."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

from gft_lite.data.prompts import PromptFormat
from gft_lite.data.sources import Rows, Unusable, open_source
from gft_lite.recipe.sections import ColumnsSettings, DataSettings
from gft_lite.rewards.extract import boxed_answer
from gft_lite.types import Problem
from gft_lite.utils.errors import RecipeError, nearest

LAB_COLUMNS = ColumnsSettings(expert=["expert"], teacher=["teacher"], id="id")
MAX_EXAMPLES = 3
MAX_COLUMNS = 40  # that an error lists
# Rows of a table all have the same columns, yet a nested column may be null in the first few.
TABLE_PROBE = 100
_MISSING = object()
_ANNOTATION = re.compile(r"<<[^<>]*>>")
_FINAL_LINE = re.compile(r"####\s*(\S.*?)\s*\Z")


@dataclass(frozen=True, slots=True)
class Loaded:
    """The problems, and why other rows that were looked at are not among them.

    `total` counts all rows of the source; `examples` are the first few skipped ones.
    """

    problems: tuple[Problem, ...]
    total: int
    skipped: Mapping[str, int]
    examples: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line for the log: how many problems of how many rows, and what was skipped."""
        line = f"{len(self.problems)} problems of {self.total} rows"
        return f"{line}, skipped {_counts(self.skipped)}" if self.skipped else line


def columns_of(settings: DataSettings) -> ColumnsSettings:
    """Which columns mean what; the lab's need not be named."""
    lab = settings.source == "lab"
    return LAB_COLUMNS if lab and settings.columns == ColumnsSettings() else settings.columns


def load_problems(
    settings: DataSettings,
    format: PromptFormat,
    *,
    context: int | None = None,
    reserve: int = 1,
    field: str = "data",
) -> Loaded:
    """The first `settings.problems` usable rows, in the order of the seed, as problems.

    A prompt must fit `max_prompt_tokens`, and the policy's `context` with `reserve` tokens to
    spare. `field` is where the recipe holds the settings, for error texts.
    Raises: RecipeError for a source, split or column that isn't there, or without usable rows.
    """
    columns = columns_of(settings)
    parts = open_source(settings, field)
    places = [(part, i) for part in parts for i in range(part.count)]
    if not places:
        raise RecipeError([f"{field}.source: must have rows, got none in {settings.source!r}."])
    _check_columns(parts, columns, field)
    limits = [settings.max_prompt_tokens, None if context is None else context - reserve]
    limit = min((n for n in limits if n is not None), default=None)

    order = list(range(len(places)))
    if settings.shuffle:
        random.Random(settings.seed).shuffle(order)
    problems: list[Problem] = []
    names: set[str] = set()
    skipped: Counter[str] = Counter()
    examples: list[str] = []
    for number in order:
        if len(problems) == settings.problems:
            break
        part, i = places[number]
        try:
            problem = _problem(part.read(i), number, columns, format, limit, names)
        except Unusable as reason:
            skipped[str(reason)] += 1
            if len(examples) < MAX_EXAMPLES:
                examples.append(f"{part.name}, row {i + 1}: {reason}")
        else:
            problems.append(problem)
            names.add(problem.id)
    if not problems:
        why = f"{_counts(skipped)}. For example {'; '.join(examples)}"
        raise RecipeError(
            [f"{field}.source: must have usable rows, got {len(places)} that are not: {why}."]
        )
    return Loaded(tuple(problems), len(places), dict(skipped.most_common()), tuple(examples))


def split_holdout(
    problems: Sequence[Problem], holdout: int
) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """(train, held out): evenly spaced problems are held out, at most a fifth of them."""
    n = len(problems)
    count = min(holdout, n // 5)
    # The middles of `count` equal stretches: fair to data that are sorted by difficulty.
    held = {(2 * i + 1) * n // (2 * count) for i in range(count)}
    return (
        tuple(p for i, p in enumerate(problems) if i not in held),
        tuple(p for i, p in enumerate(problems) if i in held),
    )


def problems_of_step(
    problems: Sequence[Problem], step: int, per_step: int, seed: int
) -> tuple[Problem, ...]:
    """The problems of a step (from 0): every problem once an epoch, each epoch reshuffled.

    The position is a function of the step alone, so that a resumed run needs no state.
    """
    if not problems:
        raise ValueError("problems: must not be empty")
    positions = range(step * per_step, (step + 1) * per_step)
    turns = (divmod(position, len(problems)) for position in positions)
    return tuple(problems[_permutation(len(problems), seed, epoch)[i]] for epoch, i in turns)


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


# --- rows ------------------------------------------------------------------------------------


def _check_columns(parts: Sequence[Rows], columns: ColumnsSettings, field: str) -> None:
    """A column that no row has is a slip in the recipe, not a bad row."""
    unseen = {
        name: f"{field}.columns.{use}"
        for use in ("problem", "choices", "answer", "expert", "teacher", "id")
        for name in _as_names(getattr(columns, use))
    }
    known: dict[str, None] = {}
    for row in _probe(parts):
        unseen = {n: use for n, use in unseen.items() if _cell(row, n) is _MISSING}
        if not unseen:
            return
        known |= dict.fromkeys(_names(row, levels=3))
    if not known:
        return  # no row can be read at all: load_problems says why
    errors = []
    for name, use in unseen.items():
        close = nearest(name, known)
        hint = f" Did you mean {close}?" if close else ""
        more = ["..."] if len(known) > MAX_COLUMNS else []
        columns_are = f"columns are: {', '.join([*islice(known, MAX_COLUMNS), *more])}."
        errors.append(f"{use}: no row has a column {name!r}; {columns_are}{hint}")
    raise RecipeError(errors)


def _probe(parts: Sequence[Rows]) -> Iterator[Mapping[str, Any]]:
    for part in parts:
        for i in range(min(part.count, TABLE_PROBE) if part.table else part.count):
            try:
                row = part.read(i)
            except Unusable:
                continue
            if isinstance(row, Mapping):
                yield row


def _as_names(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def _names(row: Mapping[str, Any], levels: int) -> Iterator[str]:
    for name, value in row.items():
        yield str(name)
        if isinstance(value, Mapping) and levels > 1:
            yield from (f"{name}.{inner}" for inner in _names(value, levels - 1))


def _cell(row: Mapping[str, Any], name: str) -> Any:
    """A column's value, or of `a.b` the field b of column a; _MISSING if it is not there."""
    if name in row:
        return row[name]
    head, _, rest = name.partition(".")
    inner = row.get(head)
    return _cell(inner, rest) if rest and isinstance(inner, Mapping) else _MISSING


def _problem(
    row: Any,
    number: int,
    columns: ColumnsSettings,
    format: PromptFormat,
    limit: int | None,
    taken: set[str],
) -> Problem:
    """One row as a problem. Raises: Unusable with the reason."""
    if not isinstance(row, Mapping):
        raise Unusable("not an object with columns")
    if None in row:
        raise Unusable("more cells than columns")
    options = _options(row, columns)
    text = _question(row, columns, options)
    if not text.strip():
        raise Unusable("no problem text")
    answer = _answer(row, columns, options)
    experts, teachers = (
        tuple(t for name in names for t in _demonstrations(_cell(row, name), name, columns.clean))
        for names in (columns.expert, columns.teacher)
    )
    ids = format.prompt_ids(text)
    if limit is not None and len(ids) > limit:
        raise Unusable(f"prompt too long (> {limit} tokens)")
    name = _id(row, columns) or str(number + 1)
    while name in taken:
        name = f"{name}#{number + 1}"
    return Problem(name, text, answer, ids, experts, teachers, dict(row))


def _id(row: Mapping[str, Any], columns: ColumnsSettings) -> str:
    """The row's own name, empty if it has none."""
    given = None if columns.id is None else _cell(row, columns.id)
    return "" if given in (None, _MISSING) else _written(given, str(columns.id))


def _options(row: Mapping[str, Any], columns: ColumnsSettings) -> list[str]:
    """The choices that a problem leaves, none if it leaves none."""
    if columns.choices is None:
        return []
    offered = _need(row, columns.choices)
    if not isinstance(offered, list | None):
        raise Unusable(f"wrong type in column {columns.choices!r}")
    return [_written(option, columns.choices) for option in offered or []]


def _question(row: Mapping[str, Any], columns: ColumnsSettings, options: Sequence[str]) -> str:
    """The problem's columns one below the other, and the choices it leaves."""
    parts = [(name, _need(row, name)) for name in _as_names(columns.problem)]
    if isinstance(columns.problem, list):
        parts = [(n, f"Options: {', '.join(map(str, v))}" if isinstance(v, list) else v)
                 for n, v in parts]  # fmt: skip
    texts = [_text(value, name) for name, value in parts if value is not None]
    if options:
        listed = (f"({chr(65 + i)}) {option}" for i, option in enumerate(options))
        texts.append(f"Answer Choices: {' '.join(listed)}")
    return "\n".join(texts)


def _need(row: Mapping[str, Any], name: str) -> Any:
    value = _cell(row, name)
    if value is _MISSING:
        raise Unusable(f"missing column {name!r}")
    return value


def _text(value: Any, name: str) -> str:
    """The value if it is text that can be tokenised. Raises: Unusable if not."""
    if not isinstance(value, str):
        raise Unusable(f"wrong type in column {name!r}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Unusable(f"broken Unicode in column {name!r}") from None
    return value


def _written(value: Any, name: str) -> str:
    """A text or a number as text. Raises: Unusable for anything else."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return _text(str(value) if number else value, name)


def _answer(row: Mapping[str, Any], columns: ColumnsSettings, options: Sequence[str]) -> str | None:
    """The gold answer as text, None where the data have none.

    Raises: Unusable if there isn't exactly one.
    """
    if columns.answer is None:
        return None
    value = _need(row, columns.answer)
    if isinstance(value, list):
        if len(value) > 1:
            raise Unusable("more than one answer")
        value = value[0] if value else None
    if isinstance(value, float):
        # Pandas writes NaN for a missing answer, and 72.0 for 72 if any is missing.
        whole = math.isfinite(value) and value.is_integer()
        value = None if not math.isfinite(value) else int(value) if whole else value
    if value is None:
        raise Unusable("no answer")
    if options and type(value) is int:
        if not 0 <= value < len(options):
            raise Unusable(f"no choice of that number in column {columns.answer!r}")
        value = chr(65 + value)
    written = str(value) if isinstance(value, bool) else _written(value, columns.answer)
    text: str | None = written
    if columns.answer_from == "boxed":
        text = boxed_answer(written)
    elif columns.answer_from == "hash":
        text = written.rpartition("####")[2] if "####" in written else None
    if text is None or not text.strip():
        raise Unusable("no answer")
    return text.strip()


def _demonstrations(value: Any, name: str, clean: str | None, lists: int = 2) -> list[str]:
    """The texts of a demonstration column: none, one, several, or chats' last answers."""
    if isinstance(value, list) and value and all(_is_message(v) for v in value):
        value = next((m["content"] for m in reversed(value) if m["role"] == "assistant"), None)
    if isinstance(value, list) and lists:
        return [text for v in value for text in _demonstrations(v, name, clean, lists - 1)]
    if value is None or value is _MISSING or (isinstance(value, float) and math.isnan(value)):
        return []
    text = _text(value, name)
    if clean:
        text = _FINAL_LINE.sub(_boxed_line, _ANNOTATION.sub("", text))
    return [text] if text.strip() else []


def _boxed_line(match: re.Match[str]) -> str:
    return f"The final answer is $\\boxed{{{match[1]}}}$."


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and {"role", "content"} <= value.keys()


def _counts(skipped: Mapping[str, int]) -> str:
    return ", ".join(f"{n} with {reason}" for reason, n in skipped.items())
