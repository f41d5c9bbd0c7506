"""Load the problems of a data set, split off the held-out ones, and order them by step."""

from __future__ import annotations

import hashlib
import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

from gft_lite.data.base import Rows, Unusable
from gft_lite.data.chat_rendering import END_THINK, THINK
from gft_lite.data.prompts import PromptFormat
from gft_lite.data.rows import RowReader, check_columns, resolve_columns
from gft_lite.data.sources import open_source
from gft_lite.recipe.objective_sections import RewardSettings
from gft_lite.recipe.sections import ColumnsSettings, DataSettings
from gft_lite.types import Problem
from gft_lite.utils.errors import RecipeError, short_repr

LAB_COLUMNS = ColumnsSettings(expert=["expert"], teacher=["teacher"], id="id")
MAX_EXAMPLES = 3
_PLACE = re.compile(r".*?(?=\.(prompt|columns)\b)")  # of a data set's settings in a recipe


@dataclass(frozen=True, slots=True)
class Loaded:
    """The problems of a data set, and the reasons why other rows and demonstrations were skipped.

    `total` counts all rows of the source; `skipped` and `unusable_demonstrations` count by reason;
    `examples` are the first few skipped rows. `columns` are those that were read, `notes` lines
    about them and the demonstrations. `read` are the problems before demonstrations were left out.
    """

    problems: tuple[Problem, ...]
    total: int
    skipped: Mapping[str, int]
    examples: tuple[str, ...] = ()
    unusable_demonstrations: Mapping[str, int] = field(default_factory=dict)
    columns: ColumnsSettings = field(default_factory=ColumnsSettings)
    notes: tuple[str, ...] = ()
    read: tuple[Problem, ...] = ()

    def describe(self) -> str:
        """One line for the log: how many problems of how many rows, and what was skipped."""
        line = f"{len(self.problems)} problems of {self.total} rows"
        if self.skipped:
            line += f", skipped {_counts(self.skipped)}"
        if self.unusable_demonstrations:
            number = sum(self.unusable_demonstrations.values())
            line += f"; {number} demonstrations left out: {_counts(self.unusable_demonstrations)}"
        return line

    def fingerprint(self) -> str:
        """A hash of the problems with their answers, demonstrations and columns, in their order.

        A resumed run compares it with that of its first start, and a sweep's trials with that of
        the trial whose base evaluation they share: it is the same for methods with and without
        demonstrations, which leave out other ones.
        """
        digest = hashlib.blake2b(digest_size=16)
        for p in self.read or self.problems:
            content: list[Any] = [p.id, p.text, p.answer, p.experts, p.teachers, p.columns]
            content += [p.system, p.history] if p.system or p.history else []
            digest.update(json.dumps(content, sort_keys=True, default=repr).encode())
        return digest.hexdigest()


def columns_of(settings: DataSettings) -> ColumnsSettings:
    """The column mapping of the settings; the lab's own if the recipe sets none for the lab."""
    lab = settings.source == "lab"
    return LAB_COLUMNS if lab and settings.columns == ColumnsSettings() else settings.columns


def lacks_answers(settings: DataSettings, reward: RewardSettings) -> bool:
    """True if a reward function compares with answers, and the data have no column of them.

    Raises: RecipeError for a source that can't be read.
    """
    columns = columns_of(settings)
    if columns.found_by_name:
        columns = resolve_columns(open_source(settings), columns)
    return reward.answer_rule(columns) is not None


def load_problems(
    settings: DataSettings,
    format: PromptFormat,
    *,
    context: int | None = None,
    reserve: int = 1,
    max_response_tokens: int | None = None,
    field: str = "data",
) -> Loaded:
    """The first `settings.problems` usable rows, in the order of the seed, as problems.

    A prompt must fit into `max_prompt_tokens`, and into the policy's `context` minus `reserve`
    tokens. With `max_response_tokens`, demonstrations that are longer or can't follow the prompt
    are left out. `field` is the settings' place in the recipe, for error texts.
    Raises: RecipeError for a source, split or column that doesn't exist, without usable rows, or
    if all demonstrations are left out.
    """
    parts = open_source(settings, field)
    places = [(part, i) for part in parts for i in range(part.count)]
    if not places:
        raise RecipeError([f"{field}.source: must have rows, got none in {settings.source!r}."])
    columns = resolve_columns(parts, columns_of(settings))
    check_columns(parts, columns, field)
    limits = [settings.max_prompt_tokens, None if context is None else context - reserve]
    limit = min((n for n in limits if n is not None), default=None)
    reader = RowReader(columns, format, limit, field)

    order = list(range(len(places)))
    if settings.shuffle:
        random.Random(settings.seed).shuffle(order)
    most = None if settings.problems is None else settings.skip + settings.problems
    loaded = _read_problems(places, order, reader, most)
    if not loaded.problems:
        why = f"{_counts(loaded.skipped)}. For example {'; '.join(loaded.examples)}"
        raise RecipeError(
            [f"{field}.source: must have usable rows, got {len(places)} that are not: {why}."]
        )
    if settings.skip:
        loaded = _after(loaded, settings.skip, field)
    loaded = replace(loaded, columns=columns, notes=_notes(settings, columns, format, field))
    if max_response_tokens is None:
        return loaded
    return with_usable_demonstrations(loaded, format, max_response_tokens, field)


def with_usable_demonstrations(
    loaded: Loaded, format: PromptFormat, max_response_tokens: int, field: str
) -> Loaded:
    """Without the demonstrations that are longer or can't follow the prompt.

    Raises: RecipeError if all are left out.
    """
    unusable: Counter[str] = Counter()
    problems = tuple(
        _with_usable(p, format, max_response_tokens, unusable) for p in loaded.problems
    )
    if unusable and not any(p.experts or p.teachers for p in problems):
        rule = "must have demonstrations that can be trained on, got"
        raise RecipeError(
            [f"{field}.columns: {rule} {sum(unusable.values())} that can't: {_counts(unusable)}."]
        )
    notes = (*loaded.notes, *_note_on_thoughts(problems, format, field))
    counts = dict(unusable.most_common())
    return replace(
        loaded, problems=problems, unusable_demonstrations=counts, notes=notes, read=loaded.problems
    )


def is_ungraded(problems: Sequence[Problem], reward: RewardSettings) -> bool:
    """True if a reward function compares with answers, and no problem has one."""
    no_answers = ColumnsSettings(answer=None)
    return bool(reward.answer_rule(no_answers)) and all(p.answer is None for p in problems)


def answer_errors(
    field: str, columns: ColumnsSettings, problems: Sequence[Problem], reward: RewardSettings
) -> list[str]:
    """The rule that an evaluation set breaks by having neither answers nor demonstrations."""
    rule = reward.answer_rule(columns)
    if rule is None or any(problem.experts or problem.teachers for problem in problems):
        return []
    advice = f"Demonstrations ({field}.columns.expert) are evaluated by their likelihood"
    return [f"{field}.columns.answer: {rule}, got null. {advice}."]


def _after(loaded: Loaded, count: int, field: str) -> Loaded:
    """Without the first problems and copies of them. Raises: RecipeError if none are left."""
    taken = {problem_key(problem) for problem in loaded.problems[:count]}
    rest = tuple(p for p in loaded.problems[count:] if problem_key(p) not in taken)
    if not rest:
        rule = f"{field}.skip: must leave some of the {len(loaded.problems)} usable problems"
        raise RecipeError([f"{rule}, got {count}. Skip fewer, or give more data."])
    return replace(loaded, problems=rest)


def _notes(
    settings: DataSettings, columns: ColumnsSettings, format: PromptFormat, field: str
) -> tuple[str, ...]:
    """Lines about variables that the template doesn't use, and columns found by their names."""
    given, found = columns_of(settings).model_dump(), columns.model_dump()
    named = [f"{name}: {short_repr(v)}" for name, v in found.items() if v != given[name]]
    lines = [f"{field}.columns: {', '.join(named)}, found by their names"] if named else []
    return (*format.notes, *lines)


def distinct_notes(loaded: Iterable[Loaded]) -> list[str]:
    """The notes of several data sets, once where only the field's place differs."""
    notes = {_PLACE.sub("", note): note for data in reversed([*loaded]) for note in data.notes}
    return [*reversed(notes.values())]


def _note_on_thoughts(
    problems: Sequence[Problem], format: PromptFormat, field: str
) -> tuple[str, ...]:
    """A line if the chat template writes an empty block of thoughts to demonstrations."""
    if format.chat is None or not format.chat.adds_thoughts:
        return ()
    texts = [text for p in problems for text in (*p.experts, *p.teachers)]
    if not (plain := sum(END_THINK not in text for text in texts)):
        return ()
    return (
        f"{field}.prompt: {plain} of {len(texts)} demonstrations have no {THINK} block; the chat "
        f"template writes an empty one, which is trained{format.chat.switch(False)}",
    )


def _read_problems(
    places: Sequence[tuple[Rows, int]], order: Sequence[int], reader: RowReader, most: int | None
) -> Loaded:
    """At most `most` problems of the rows at `places`, taken in `order`."""
    problems: list[Problem] = []
    names: set[str] = set()
    skipped: Counter[str] = Counter()
    examples: list[str] = []
    for number in order:
        if len(problems) == most:
            break
        part, i = places[number]
        try:
            problem = reader.read(part.read(i), number, names)
        except Unusable as reason:
            skipped[str(reason)] += 1
            if len(examples) < MAX_EXAMPLES:
                examples.append(f"{part.name}, row {i + 1}: {reason}")
        else:
            problems.append(problem)
            names.add(problem.id)
    return Loaded(tuple(problems), len(places), dict(skipped.most_common()), tuple(examples))


def _with_usable(
    problem: Problem, format: PromptFormat, max_tokens: int, unusable: Counter[str]
) -> Problem:
    """The problem with its usable demonstrations; the others are counted by reason."""

    conversation = bool(problem.history or problem.system)

    def usable(text: str) -> bool:
        try:
            if conversation and format.response_text(text, problem) != format.response_text(text):
                raise Unusable("an end of the conversation that the chat template writes otherwise")
            if format.fits(text, max_tokens):
                return True
            raise Unusable(f"more tokens than rollout.max_tokens ({max_tokens})")
        except Unusable as reason:
            unusable[str(reason)] += 1
            return False

    experts = tuple(filter(usable, problem.experts))
    return replace(problem, experts=experts, teachers=tuple(filter(usable, problem.teachers)))


def _counts(skipped: Mapping[str, int]) -> str:
    return ", ".join(f"{n} with {reason}" for reason, n in skipped.items())


def split_holdout(
    problems: Sequence[Problem], holdout: int
) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """(train, held out): evenly spaced problems are held out, at most a fifth of them.

    A problem that the data repeat is either trained on or held out, and held out once.
    """
    first: dict[str, int] = {}
    for i, problem in enumerate(problems):
        first.setdefault(problem_key(problem), i)
    distinct = list(first)
    n = len(distinct)
    count = min(holdout, n // 5)
    # The middles of `count` equal stretches represent data that are sorted by difficulty too.
    held = {distinct[(2 * i + 1) * n // (2 * count)] for i in range(count)}
    return (
        tuple(p for p in problems if problem_key(p) not in held),
        tuple(
            p
            for i, p in enumerate(problems)
            if problem_key(p) in held and first[problem_key(p)] == i
        ),
    )


def problem_key(problem: Problem) -> str:
    """What repetitions of a problem have in common: its text but for spaces, case and encoding.

    Of a conversation, the text is that of all turns.
    """
    texts = [text for turn in problem.history for text in turn]
    text = "\n".join([problem.system or "", *texts, problem.text])
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def problems_of_step(
    problems: Sequence[Problem],
    step: int,
    per_step: int,
    seed: int,
    order_of: Callable[[int], Sequence[int]] | None = None,
) -> tuple[Problem, ...]:
    """The problems of a step (from 0): every problem once an epoch, each epoch reshuffled.

    `order_of` gives the order of an epoch, by default a random one of the seed. The order is a
    function of the step alone, so that a resumed run needs no state.
    Raises: ValueError without problems.
    """
    if not problems:
        raise ValueError("problems: must not be empty")
    positions = range(step * per_step, (step + 1) * per_step)
    visits = [divmod(position, len(problems)) for position in positions]
    order_of = order_of or partial(_permutation, len(problems), seed)
    orders = {epoch: order_of(epoch) for epoch in {epoch for epoch, _ in visits}}
    return tuple(problems[orders[epoch][i]] for epoch, i in visits)


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)
