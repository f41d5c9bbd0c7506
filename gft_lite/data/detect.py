"""Guesses the columns, the reward and the prompt of a data set from its first rows."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gft_lite.data.answer_kinds import MOST, AnswerKind, answer_kind
from gft_lite.data.base import Rows, Unusable
from gft_lite.data.cells import (
    cell_text,
    cells_by_column,
    count_answers,
    is_conversation,
    is_list_of_texts,
    share,
)
from gft_lite.data.rows import check_columns
from gft_lite.data.sources import open_source
from gft_lite.recipe.sections import DataSettings
from gft_lite.utils.errors import RecipeError

LOOKED_AT = 300  # rows, evenly spaced
MARKER = "####"
# Usual names of columns, the most usual first; compared in lower case, without outer fields.
_PROBLEMS = ("problem", "question", "prompt", "instruction", "query", "input", "task", "user")
_ANSWERS = (
    "answer", "final_answer", "ground_truth", "gold", "gold_answer", "expected_answer",
    "correct_answer", "reference_answer", "target", "answerkey", "label",
)  # fmt: skip
_EXPERTS = (
    "expert", "solution", "response", "completion", "output", "chosen", "demonstration",
    "rationale", "explanation", "reasoning", "assistant", "generation",
)  # fmt: skip
_TEACHERS = ("teacher", "teachers", "model_answer", "generations", "distillations")
_CHOICES = ("choices", "options")
_CONTEXTS = ("context", "passage", "article", "document")
_BOX = "{problem} Let's think step by step and output the final answer within \\boxed{}."
TEMPLATES = {
    "math": _BOX,
    "choice": "{problem}\nThink step by step and write the letter of the answer within \\boxed{}.",
    "exact": f"{{problem}}\nWrite the answer alone on the last line, after {MARKER}.",
}
_OPTION_B = re.compile(r"(^|\W)B[).:]")
_REWARDS = {"hash": "math", "boxed": "math", "math": "math", "letter": "choice", "text": "exact"}


@dataclass(frozen=True, slots=True)
class Guess:
    """A value for a field of the recipe, the reason for it, and a doubt if there is one."""

    field: str
    value: Any
    reason: str
    doubt: str = ""


@dataclass(frozen=True, slots=True)
class Detected:
    """What a data set was taken for.

    `unusable` of the `looked_at` rows can't be read. `reward` is a rule that can grade its
    answers, None if none can. `teachers` is the number of another model's answers to a problem,
    the median of the rows. `problems` and `demonstrations` are texts of the rows that were read,
    for their lengths.
    """

    rows: int
    looked_at: int
    unusable: int
    columns: tuple[str, ...]
    guesses: tuple[Guess, ...]
    reward: str | None
    why_reward: str
    experts: bool
    teachers: int
    conversations: bool
    problems: tuple[str, ...]
    demonstrations: tuple[str, ...]


def detect(settings: DataSettings, given: Mapping[str, Any]) -> Detected:
    """Look at the rows of a source; `given` are columns that the user names.

    Raises: RecipeError for a source that can't be read, for a column of the user's that no row has,
    and where no column can be a prompt.
    """
    parts = open_source(settings)
    not_given = {name: None for name in type(settings.columns).model_fields if name not in given}
    check_columns(parts, settings.columns.model_copy(update=not_given), "data")
    total = sum(part.count for part in parts)
    sample = list(_sample(parts, total))
    usable = [row for row in sample if not isinstance(row, str)]
    table = cells_by_column(usable)
    if not table:
        rule = "data.source: must have rows that are objects with columns"
        why = next((f" ({row})" for row in sample if isinstance(row, str)), "")
        raise RecipeError([f"{rule}, got {total} rows without in {settings.source!r}{why}."])
    return _Reading(table, given).detected(total, len(sample), len(sample) - len(usable))


def _sample(parts: Sequence[Rows], total: int) -> Iterator[Mapping[str, Any] | str]:
    """Rows at even distances; the reason in place of one that can't be read."""
    step = max(1, total // LOOKED_AT)
    offset = 0
    for part in parts:
        for i in range(-offset % step, part.count, step):
            try:
                row = part.read(i)
            except Unusable as error:
                yield str(error)
                continue
            yield row if isinstance(row, Mapping) else "not an object with columns"
        offset += part.count


class _Reading:
    """The guesses about one table of columns, collected in the order in which they are shown."""

    def __init__(self, table: dict[str, list[Any]], given: Mapping[str, Any]) -> None:
        self.table, self.given = table, given
        self.guesses: list[Guess] = []
        self.reward: str | None = None
        self.why_reward = "the data have no answers"

    def detected(self, rows: int, looked_at: int, unusable: int) -> Detected:
        """All guesses."""
        problem, conversations = self._problem()
        experts, teachers = self._demonstrations(problem)
        self._choices()
        answer = self._answer(problem, experts)
        if answer and not experts and answer[1].is_solution:
            experts = [answer[0]]
        usable = looked_at - unusable
        self._demonstration_guesses(experts, teachers, answer, usable)
        if self.reward:
            self._template(problem)
        return Detected(
            rows, looked_at, unusable, tuple(self.table), tuple(self.guesses), self.reward,
            self.why_reward,
            bool(experts) or self._ends_with_answers(problem, conversations),
            self._answers_a_row(teachers, usable),
            conversations, self._texts(problem, prompt=True),
            self._texts(experts or (problem if conversations else []), prompt=False),
        )  # fmt: skip

    # --- columns -----------------------------------------------------------------------------

    def _problem(self) -> tuple[list[str], bool]:
        """The columns of the prompt, and whether they are conversations."""
        if "messages" in self.given:
            name = self.given["messages"]
            if not self._is_messages(name):
                rule = "data.columns.messages: must name a column of conversations"
                raise RecipeError([f"{rule}, got {name!r}. Use data.columns.problem for text."])
            return [name], True
        if "problem" in self.given:
            names = self.given["problem"]
            names = [names] if isinstance(names, str) else list(names)
            return names, any(self._is_messages(name) for name in names)
        chats = [name for name in self.table if self._is_messages(name)]
        prompt = self._named(_PROBLEMS)
        whole = [n for n in chats if n not in prompt and n.lower() not in (*_EXPERTS, "rejected")]
        whole = whole or ([] if prompt else [n for n in chats if n.lower() == "chosen"])
        if whole and not (prompt and prompt[0] in chats):
            doubt = f"also {', '.join(whole[1:])}" if whole[1:] else ""
            self._guess("columns.messages", whole[0], "it holds conversations", doubt)
            return whole[:1], True
        return self._text_problem(prompt), bool(prompt) and prompt[0] in chats

    def _text_problem(self, named: list[str]) -> list[str]:
        texts = [name for name in self.table if self._is_text(name)]
        if not named and len(texts) < 2:
            known = ", ".join(list(self.table)[:20])
            rule = "data.columns.problem: must name the column of the prompts, got none of the "
            raise RecipeError(
                [f"{rule}usual names ({', '.join(_PROBLEMS)}) in the columns {known}. Add "
                 "data.columns.problem=NAME; text without a prompt can't be trained on."]
            )  # fmt: skip
        if not named:
            doubt = f"no column has a usual name; there are {', '.join(self.table)}"
            self._guess("columns.problem", texts[0], "the first column of text", doubt)
            return texts[:1]
        lower = [name.lower() for name in named]
        if lower[0] == "instruction" and "input" in lower:
            names = [named[0], named[lower.index("input")]]
            self._guess("columns.problem", names, "instructions with their input, as in Alpaca")
            return names
        others = [*named[1:], *(n for n in texts if _last(n) in _CONTEXTS)]
        doubt = f"also {', '.join(others)}: a list of columns joins several" if others else ""
        self._guess("columns.problem", named[0], "the usual name of a prompt", doubt)
        return named[:1]

    def _demonstrations(self, problem: Sequence[str]) -> tuple[list[str], list[str]]:
        def given(use: str) -> list[str]:
            names = self.given.get(use) or []
            return [names] if isinstance(names, str) else list(names)

        experts = [n for n in self._named(_EXPERTS) if n not in problem]
        teachers = [n for n in self._named(_TEACHERS) if n not in problem]
        return (
            given("expert") if "expert" in self.given else experts,
            given("teacher") if "teacher" in self.given else teachers,
        )

    def _choices(self) -> None:
        if "choices" in self.given:
            return
        lists = [n for n in self.table if share(self.table[n], is_list_of_texts) >= MOST]
        for name in lists:
            head, _, inner = name.rpartition(".")
            if (head or name).lower() in _CHOICES and inner != "label":
                self._guess("columns.choices", name, "lists of options, which get letters")
                return

    def _answer(
        self, problem: Sequence[str], experts: Sequence[str]
    ) -> tuple[str, AnswerKind] | None:
        """The column of the answers with their kind; sets the reward."""
        if "answer" in self.given:
            chosen = self._given_answer()
        else:
            chosen = self._find_answer(problem, experts)
        has_choices = any(g.field == "data.columns.choices" for g in self.guesses)
        others = ", ".join(self._other_answers(problem, experts))
        unnamed = f"{others} may be, without a usual name" if others else ""
        if chosen is None:
            self._guess("columns.answer", None, self.why_reward, unnamed)
            return None
        name, kind = chosen
        self.reward = _REWARDS.get(kind.kind)
        if has_choices or "choices" in self.given:
            self.reward = "choice"
        self.why_reward = f"column {name!r}: {kind.reason}"
        if self.reward is None:
            self._guess("columns.answer", None, f"{self.why_reward}", kind.doubt or unnamed)
            return chosen
        doubt = kind.doubt or self._missing_options(problem, kind, has_choices)
        if "answer" not in self.given and name not in (
            *self._named(_ANSWERS, texts=False),
            *experts,
        ):
            doubt = doubt or "no column has a usual name; the demonstrations end with its values"
        self._guess("columns.answer", name, kind.reason, doubt)
        if kind.kind in ("hash", "boxed"):
            self._guess("columns.answer_from", kind.kind, "where the column states the answer")
        return chosen

    def _missing_options(self, problem: Sequence[str], kind: AnswerKind, has_choices: bool) -> str:
        """A doubt about answers that are letters of options which no prompt shows."""
        if kind.kind != "letter" or has_choices:
            return ""
        shown = share(self._texts(problem, prompt=True), lambda t: bool(_OPTION_B.search(t)))
        return "" if shown >= MOST else "the problems show no options (A), (B) to choose from"

    def _given_answer(self) -> tuple[str, AnswerKind] | None:
        name = self.given["answer"]
        return None if name is None else (name, answer_kind(self.table.get(name, [])))

    def _other_answers(self, problem: Sequence[str], experts: Sequence[str]) -> list[str]:
        """Columns without a usual name whose values can be graded."""
        used = (*problem, *experts, *self._named(_TEACHERS), "id", "idx", "index")
        return [
            n for n in self.table if n not in used and answer_kind(self.table[n]).kind == "math"
        ]

    def _find_answer(
        self, problem: Sequence[str], experts: Sequence[str]
    ) -> tuple[str, AnswerKind] | None:
        found = [(n, answer_kind(self.table[n])) for n in self._named(_ANSWERS, texts=False)]
        found = [(n, kind) for n, kind in found if kind.kind != "none"]
        gradable = [pair for pair in found if pair[1].kind in _REWARDS]
        if not found and experts:
            others = self._other_answers(problem, experts)
            gradable = [(n, answer_kind(self.table[n])) for n in others
                        if self._agreement(experts[0], n) >= MOST]  # fmt: skip
        if not gradable:
            solutions = [(n, answer_kind(self.table.get(n, []))) for n in experts]
            gradable = [(n, kind) for n, kind in solutions if kind.kind in ("hash", "boxed")]
            found = found or [(n, kind) for n, kind in solutions if kind.kind != "none"]
        return gradable[0] if gradable else found[0] if found else None

    def _demonstration_guesses(
        self,
        experts: list[str],
        teachers: list[str],
        answer: tuple[str, AnswerKind] | None,
        rows: int,
    ) -> None:
        if experts and "expert" not in self.given:
            doubt = f"not used: {', '.join(experts[1:])}" if experts[1:] else ""
            doubt = self._missing(experts[0], rows) or doubt
            doubt = self._disagreement(experts[0], answer) or doubt
            self._guess("columns.expert", [experts[0]], "worked answers to learn from", doubt)
        del experts[1:]
        if teachers and "teacher" not in self.given:
            doubt = self._missing(teachers[0], rows)
            self._guess("columns.teacher", [teachers[0]], "answers of another model", doubt)
            del teachers[1:]
        if answer and answer[1].kind == "hash" and answer[0] in experts:
            self._guess("columns.clean", "gsm8k", "demonstrations end with \\boxed{}, not ####")
        labels = self.table.get("label", [])
        if experts and labels and all(isinstance(v, bool) for v in labels) and not all(labels):
            last = self.guesses.pop()
            doubt = f"column label is false for {labels.count(False)} of {len(labels)} rows"
            self.guesses.append(Guess(last.field, last.value, last.reason, doubt))

    def _missing(self, name: str, rows: int) -> str:
        """A doubt about demonstrations that at most half of the rows have."""
        have = sum(count_answers(cell) > 0 for cell in self.table.get(name, []))
        return "" if have > rows / 2 else f"only {have} of {rows} rows have one"

    def _answers_a_row(self, names: Sequence[str], rows: int) -> int:
        """The medians of the answers in each column, added up; at least 1 if there is a column."""
        counts = []
        for name in names:
            found = [count_answers(cell) for cell in self.table.get(name, [])]
            counts.append(statistics.median_low([*found, *[0] * (rows - len(found))]))
        return max(1, sum(counts)) if counts else 0

    def _agreement(self, expert: str, answer: str) -> float:
        """The share of demonstrations that end with the answer beside them; 0 without pairs."""
        golds, texts = self.table.get(answer, []), self.table.get(expert, [])
        if len(golds) != len(texts):
            return 0.0
        return share(list(zip(golds, texts, strict=True)), _ends_with)

    def _disagreement(self, expert: str, answer: tuple[str, AnswerKind] | None) -> str:
        """A doubt if few demonstrations end with the answer beside them."""
        golds, texts = self.table.get(answer[0] if answer else "", []), self.table.get(expert, [])
        if not answer or answer[0] == expert or not self.reward or len(golds) != len(texts):
            return ""
        right = sum(map(_ends_with, zip(golds, texts, strict=True)))
        if right >= len(golds) / 2:
            return ""
        return f"only {right} of {len(golds)} end with the answer in column {answer[0]!r}"

    def _template(self, problem: Sequence[str]) -> None:
        texts = self._texts(problem, prompt=True)
        if "boxed" in "".join(texts[:50]):
            self._guess("prompt.template", "{problem}", "the problems say how to answer")
            return
        template = TEMPLATES[str(self.reward)]
        self._guess("prompt.template", template, f"the form that reward {self.reward} reads")

    # --- helpers -----------------------------------------------------------------------------

    def _guess(self, field: str, value: Any, reason: str, doubt: str = "") -> None:
        self.guesses.append(Guess(f"data.{field}", value, reason, doubt))

    def _named(self, usual: Sequence[str], *, texts: bool = True) -> list[str]:
        """The columns with a usual name, the most usual first."""
        ok = [n for n in self.table if not texts or self._is_text(n) or self._is_messages(n)
              or share(self.table[n], is_list_of_texts) >= MOST]  # fmt: skip
        return [name for word in usual for name in ok if _last(name) == word]

    def _is_text(self, name: str) -> bool:
        return share(self.table.get(name, []), lambda v: isinstance(v, str)) >= MOST

    def _is_messages(self, name: str) -> bool:
        return share(self.table.get(name, []), is_conversation) >= MOST

    def _ends_with_answers(self, problem: Sequence[str], conversations: bool) -> bool:
        """True for whole conversations of which most end with the assistant's turn."""
        if not conversations or "data.columns.problem" in {g.field for g in self.guesses}:
            return False
        last = [v[-1].get("role", v[-1].get("from")) for v in self.table[problem[0]]]
        return share(last, lambda role: role in ("assistant", "gpt")) >= 0.5

    def _texts(self, names: Sequence[str], *, prompt: bool) -> tuple[str, ...]:
        """The texts of columns, row by row; of conversations all turns, or the last one."""
        cells = [self.table.get(name, []) for name in names]
        return tuple("\n".join(cell_text(c, prompt=prompt) for c in row) for row in _zip(cells))


def _zip(cells: Sequence[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    return zip(*cells, strict=False) if cells else iter(())


def _ends_with(pair: tuple[Any, Any]) -> bool:
    gold, text = pair
    return str(gold).strip() in str(text)[-200:]


def _last(name: str) -> str:
    return name.rpartition(".")[2].lower()
