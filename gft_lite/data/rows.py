"""One row to a problem: which columns hold what, and which rows can't be used."""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase as LETTERS
from typing import Any

from gft_lite.data.base import UNREADABLE, Rows, Unusable
from gft_lite.data.conversations import (
    Conversation,
    find_columns,
    is_message,
    last_answer,
    read_conversation,
)
from gft_lite.data.prompts import PromptFormat
from gft_lite.recipe.sections import ColumnsSettings
from gft_lite.rewards.extract import boxed_answer
from gft_lite.types import Problem
from gft_lite.utils.errors import RecipeError, nearest, short_repr

MAX_COLUMNS = 40  # listed in an error
# All rows of a table have the same columns, yet a nested column may be null in the first few.
TABLE_PROBE = 100
_MISSING = object()
_ANNOTATION = re.compile(r"<<[^<>]*>>")
# The beginning of a list of texts, or of messages, as Python, JSON or NumPy write it.
_LIST_AS_TEXT = re.compile(r"""\s*(?:array\()?\[\s*["'{]""")
_MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")
_FINAL_LINE = re.compile(r"####\s*(\S.*?)\s*\Z")


@dataclass(frozen=True, slots=True)
class RowReader:
    """Converts rows to problems; prompts longer than `max_prompt_tokens` are unusable.

    `field` is the settings' place in the recipe, for error texts.
    """

    columns: ColumnsSettings
    format: PromptFormat
    max_prompt_tokens: int | None
    field: str = "data"

    def read(self, row: Any, number: int, taken: Collection[str]) -> Problem:
        """The problem of row `number` (from 0), with an id that is not in `taken`.

        Raises: Unusable with the reason; RecipeError for a conversation in plain style.
        """
        if not isinstance(row, Mapping):
            raise Unusable("not an object with columns")
        if None in row:
            raise Unusable("more cells than columns")
        columns, limit = self.columns, self.max_prompt_tokens
        options = _options(row, columns)
        conversation = self._conversation(row)
        of = conversation or Conversation(_question(row, columns, options))
        if not of.question.strip():
            raise Unusable("no problem text")
        answer = _answer(row, columns)
        kind = {}
        if options and answer is not None:
            answer, kind = _letter(row, columns, options, answer), {"answer_type": "choice"}
        experts, teachers = (
            tuple(self._demonstrations(row, names, of=conversation))
            for names in (columns.expert, columns.teacher)
        )
        if of.demonstration is not None:
            experts = (_clean(of.demonstration, columns.clean), *experts)
        ids = self.format.prompt_ids(of.question, of.history, of.system)
        if limit is not None and len(ids) > limit:
            raise Unusable(f"prompt too long (> {limit} tokens)")
        name = _id(row, columns) or str(number + 1)
        while name in taken:
            name = f"{name}#{number + 1}"
        gold = None if answer is None else str(answer)
        data = kind | _readable(row)
        return Problem(name, of.question, gold, ids, experts, teachers, data, of.history, of.system)

    def _demonstrations(
        self, row: Mapping[str, Any], names: Sequence[str], of: Conversation | None
    ) -> Iterator[str]:
        """The demonstrations of a row; messages that answer a conversation are one turn of it."""
        for name in names:
            value = _cell(row, name)
            if of is not None and _is_messages(messages := _text_as_list(value, name)):
                value = last_answer(messages, name)
            yield from _demonstrations(value, name, self.columns.clean)

    def _conversation(self, row: Mapping[str, Any]) -> Conversation | None:
        """The row's conversation; None for a problem that is a text."""
        columns = self.columns
        if columns.messages is not None:
            name, value = columns.messages, _need(row, columns.messages)
        elif isinstance(columns.problem, str):
            name, value = columns.problem, _need(row, columns.problem)
            if not _is_messages(messages_from_text(value, name)):
                return None
        else:
            return None
        if self.format.chat is None:
            rule = f"must be chat for the conversations in column {name!r}, got 'plain'"
            raise RecipeError([f"{self.field}.prompt.style: {rule}."])
        found = read_conversation(_text_as_list(value, name), name)
        if columns.messages is None and found.demonstration is not None:
            raise Unusable(f"a prompt that ends with an assistant turn in column {name!r}")
        return found


def resolve_columns(parts: Sequence[Rows], columns: ColumnsSettings) -> ColumnsSettings:
    """The columns of the recipe, or those of conversations that are found by their names."""
    if not columns.found_by_name:
        return columns
    return columns.model_copy(update=find_columns(columns, _probe(parts)))


def check_columns(parts: Sequence[Rows], columns: ColumnsSettings, field: str) -> None:
    """Check that every column of the recipe exists in some row.

    Raises: RecipeError for those that no row has; one bad row is not an error.
    """
    unseen = {
        name: f"{field}.columns.{use}"
        for use in ("messages", "problem", "choices", "answer", "expert", "teacher", "id")
        if use != "problem" or columns.messages is None
        for name in _as_names(getattr(columns, use))
    }
    known: dict[str, None] = {}
    for row in _probe(parts):
        unseen = {n: use for n, use in unseen.items() if _find(row, n) is _MISSING}
        if not unseen:
            return
        known |= dict.fromkeys(_names(row, levels=3))
    if known:  # else no row can be parsed, and load_problems says why
        raise RecipeError([_missing_column(name, use, known) for name, use in unseen.items()])


def _missing_column(name: str, use: str, known: Collection[str]) -> str:
    close = nearest(name, known)
    hint = f" Did you mean {close}?" if close and close.isprintable() else ""
    more = ["..."] if len(known) > MAX_COLUMNS else []
    shown = [n if n.isprintable() and len(n) <= 60 else short_repr(n) for n in known]
    columns_are = f"columns are: {', '.join([*shown[:MAX_COLUMNS], *more])}."
    return f"{use}: no row has a column {name!r}; {columns_are}{hint}"


def _probe(parts: Iterable[Rows]) -> Iterator[Mapping[str, Any]]:
    """The rows that show which columns exist: the first ones of a table, else all."""
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
    """The names of the columns, and of nested fields as `a.b`."""
    for name, value in row.items():
        if name is None:  # the cells of a CSV row without a column
            continue
        yield str(name)
        if isinstance(value, Mapping) and levels > 1:
            yield from (f"{name}.{inner}" for inner in _names(value, levels - 1))


def _find(row: Mapping[str, Any], name: str) -> Any:
    """A column's value, or for `a.b` that of field b of column a; _MISSING if absent."""
    if name in row:
        return row[name]
    head, _, rest = name.partition(".")
    inner = row.get(head)
    return _find(inner, rest) if rest and isinstance(inner, Mapping) else _MISSING


def _cell(row: Mapping[str, Any], name: str) -> Any:
    """The same. Raises: Unusable for a value that can't be read."""
    value = _find(row, name)
    if value is UNREADABLE:
        raise Unusable(f"unreadable value in column {name!r}")
    return value


def _readable(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without the cells that can't be read."""
    return {
        name: _readable(value) if isinstance(value, Mapping) else value
        for name, value in row.items()
        if value is not UNREADABLE
    }


def _id(row: Mapping[str, Any], columns: ColumnsSettings) -> str:
    """The row's own id, empty if it has none."""
    given = None if columns.id is None else _cell(row, columns.id)
    return "" if given in (None, _MISSING) else _as_text(given, str(columns.id))


def _options(row: Mapping[str, Any], columns: ColumnsSettings) -> list[str]:
    """The choices of a multiple-choice problem, empty for other problems."""
    if columns.choices is None:
        return []
    offered = _text_as_list(_need(row, columns.choices), columns.choices)
    if not isinstance(offered, list | None):
        raise Unusable(f"wrong type in column {columns.choices!r}")
    options = [_as_text(option, columns.choices) for option in offered or []]
    if len(options) > len(LETTERS):
        raise Unusable(f"more than {len(LETTERS)} choices in column {columns.choices!r}")
    return options


def _letter(
    row: Mapping[str, Any], columns: ColumnsSettings, options: Sequence[str], answer: str | int
) -> str:
    """The letter of the gold choice.

    An answer is, in this order, a label of the data set, the number of a choice from 0, a capital
    letter, the text of a choice, or a letter. Labels are in field `label` beside the choices, as
    in ARC; without them, the text "3" may count from 0 or from 1 and is not accepted.
    Raises: Unusable for an answer that is none of the choices.
    """
    name = str(columns.choices)
    labels = _find(row, f"{name.rpartition('.')[0]}.label") if "." in name else None
    if isinstance(labels, list) and len(labels) == len(options):
        labels = [str(_whole(label)).strip() for label in labels]
    else:
        labels = []
    written, texts = str(answer).strip(), [option.strip() for option in options]
    letters = LETTERS[: len(options)]
    single = written.strip(" ().:$")
    if written in labels:
        return letters[labels.index(written)]
    if type(answer) is int:
        # Where labels are numbers, one that is no label has another meaning.
        if 0 <= answer < len(options) and not any(map(str.isdecimal, labels)):
            return letters[answer]
        raise Unusable(f"no choice of that number in column {columns.answer!r}")
    if len(single) == 1 and single in letters:
        return single
    if texts.count(written) == 1:
        return letters[texts.index(written)]
    if len(single) == 1 and single.upper() in letters:
        return single.upper()
    raise Unusable(f"an answer that is none of the choices in column {columns.answer!r}")


def _question(row: Mapping[str, Any], columns: ColumnsSettings, options: Sequence[str]) -> str:
    """The problem's columns joined by newlines, and the choices with their letters."""
    parts = [(name, _need(row, name)) for name in _as_names(columns.problem)]
    if isinstance(columns.problem, list):
        parts = [(n, f"Options: {', '.join(map(str, v))}" if isinstance(v, list) else v)
                 for n, v in parts]  # fmt: skip
    texts = [_text(value, name) for name, value in parts if value is not None]
    if options:
        listed = (f"({letter}) {o}" for letter, o in zip(LETTERS, options, strict=False))
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


def _as_text(value: Any, name: str) -> str:
    """A text or a number as text. Raises: Unusable for anything else."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return _text(str(value) if number else value, name)


def _answer(row: Mapping[str, Any], columns: ColumnsSettings) -> str | int | None:
    """The gold answer, None where the data have none.

    Raises: Unusable if there isn't exactly one.
    """
    if columns.answer is None:
        return None
    value = _need(row, columns.answer)
    if isinstance(value, list):
        if len(value) > 1:
            raise Unusable("more than one answer")
        value = value[0] if value else None
    value = _whole(value)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        raise Unusable("no answer")
    written = str(value) if isinstance(value, bool) else _as_text(value, columns.answer)
    text: str | None = written
    if columns.answer_from == "boxed":
        text = boxed_answer(written)
    elif columns.answer_from == "hash":
        text = written.rpartition("####")[2] if "####" in written else None
    if text is None or not text.strip():
        raise Unusable("no answer")
    return value if type(value) is int else text.strip()


def _whole(value: Any) -> Any:
    """The integer that a float is: pandas writes 72.0 for 72 if any value is missing."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _text_as_list(value: Any, name: str) -> Any:
    """The list of texts that a text is in the notation of JSON or Python; else the value itself.

    CSV files have no other lists. Raises: Unusable for a list in another notation.
    """
    is_list = isinstance(value, str) and _LIST_AS_TEXT.match(value)
    if not is_list or not value.rstrip().endswith(("]", ")")):
        return value
    text = value.strip()
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of backslashes in a user's text
            found = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        found = None
    # NumPy writes no commas: Python would join the texts.
    if repr(found) != text:
        raise Unusable(f"a list as text in column {name!r}")
    return found


def messages_from_text(value: Any, name: str) -> Any:
    """The messages that a text is in the notation of JSON or Python; else the value itself.

    Raises: Unusable for a list in another notation.
    """
    written = isinstance(value, str) and _MESSAGES_AS_TEXT.match(value)
    return _text_as_list(value, name) if written else value


def _demonstrations(value: Any, name: str, clean: str | None, lists: int = 2) -> list[str]:
    """The texts of a demonstration column: none, one, several, or the last answers of chats."""
    value = _text_as_list(value, name)
    if isinstance(value, str) and value.strip() in ("[]", "[None]", "[null]"):  # as CSV writes them
        return []
    if isinstance(value, list) and value and all(_is_openai_message(v) for v in value):
        value = next((m["content"] for m in reversed(value) if m["role"] == "assistant"), None)
    if isinstance(value, list) and lists:
        return [text for v in value for text in _demonstrations(v, name, clean, lists - 1)]
    if value is None or value is _MISSING or (isinstance(value, float) and math.isnan(value)):
        return []
    text = _clean(_text(value, name), clean)
    return [text] if text.strip() else []


def _clean(text: str, clean: str | None) -> str:
    return _FINAL_LINE.sub(_boxed_line, _ANNOTATION.sub("", text)) if clean else text


def _boxed_line(match: re.Match[str]) -> str:
    return f"The final answer is $\\boxed{{{match[1]}}}$."


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_message, value))


def _is_openai_message(value: Any) -> bool:
    return isinstance(value, Mapping) and {"role", "content"} <= value.keys()
