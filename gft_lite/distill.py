"""Teacher solutions for a data set: asked for, graded by the recipe's rule, written as data."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gft_lite.data import columns_of, load_problems
from gft_lite.figures import correct
from gft_lite.groups import sample_seed
from gft_lite.policy import model_location
from gft_lite.prompts import PromptFormat
from gft_lite.recipe import PolicySettings, Recipe, RecipeError
from gft_lite.recipe_file import Dumper
from gft_lite.responses import whole_lines
from gft_lite.rewards.scorer import Scorer, open_scorer
from gft_lite.runlog import alone_in, whole, write_whole
from gft_lite.teachers import Answer, Asking, Question, Teacher, find_teacher
from gft_lite.types import Group, Problem, Response

CHUNK = 1024  # Kept answers that are graded at a time.
MAX_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Graded:
    """An answer and what the reward rule says of it."""

    answer: Answer
    reward: float
    verdict: str
    right: bool


class AnswerStore:
    """Answers by key, a JSON line each, appended as they come; used by several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._known: dict[str, Answer] = {}
        for line in whole_lines(path):
            entry = json.loads(line)
            key = entry.pop("key")
            self._known[key] = Answer(**entry)

    def get(self, question: Question) -> Answer | None:
        """The answer that was kept, if there is one."""
        return self._known.get(question.key)

    def keep(self, question: Question, answer: Answer) -> None:
        """Append an answer; it survives whatever ends the process afterwards."""
        line = json.dumps({"key": question.key, **asdict(answer)}) + "\n"
        with self._lock, self.path.open("a") as file:
            file.write(line)


@dataclass
class Distillation:
    """The answers so far, and what went wrong in this call."""

    asking: Asking
    questions: Sequence[Question]
    graded: dict[str, Graded] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)
    asked: int = 0
    asked_tokens: int = 0
    right: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    started: float = field(default_factory=time.perf_counter)

    def offered(self, number: int) -> tuple[list[Graded], Counter[str]]:
        """The answers that a problem's row gets, in the order of sampling, and what else came.

        Left out: an answer that was cut off, which would teach to stop in the middle, one
        without any text, and the repetition of one that is there.
        """
        first = number * self.asking.samples
        found: dict[str, Graded] = {}
        others: Counter[str] = Counter()
        for question in self.questions[first : first + self.asking.samples]:
            graded = self.graded.get(question.key)
            if graded is None:
                others["missing"] += 1
            elif graded.answer.finish_reason == "length":
                others["truncated"] += 1
            elif not graded.answer.text.strip():
                others["empty"] += 1
            elif graded.answer.text in found:
                others["duplicates"] += 1
            else:
                found[graded.answer.text] = graded
        return list(found.values()), others

    def add(self, graded: Mapping[str, Graded]) -> None:
        """Take further answers, whether asked for now or kept before."""
        self.graded |= graded
        self.right += sum(g.right for g in graded.values())
        self.prompt_tokens += sum(g.answer.prompt_tokens for g in graded.values())
        self.completion_tokens += sum(g.answer.completion_tokens for g in graded.values())

    def cost(self) -> float | None:
        """Dollars for all answers, None without a price."""
        price_in, price_out = self.asking.price_in, self.asking.price_out
        if price_in is None and price_out is None:
            return None
        spent = self.prompt_tokens * (price_in or 0) + self.completion_tokens * (price_out or 0)
        return spent / 1e6

    def summary(self) -> dict[str, Any]:
        """The figures of the whole data set, and the pace of this call."""
        rows = [self.offered(i) for i in range(len(self.questions) // self.asking.samples)]
        others = sum((other for _, other in rows), Counter[str]())
        seconds = time.perf_counter() - self.started
        return {
            "problems": len(rows),
            "wanted": len(self.questions),
            "asked": self.asked,
            "reused": len(self.graded) - self.asked + self.failures.total(),
            "answered": len(self.graded),
            "failed": self.failures.total(),
            "right": self.right,
            "acceptance": self.right / len(self.graded) if self.graded else None,
            "problems_without_right_answer": sum(not any(g.right for g in r) for r, _ in rows),
            "offered": sum(len(answers) for answers, _ in rows),
            **{name: others[name] for name in ("duplicates", "truncated", "empty")},
            "verdicts": dict(Counter(g.verdict for g in self.graded.values()).most_common()),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cost": self.cost(),
            "seconds": seconds,
            "tokens_per_second": self.asked_tokens / seconds,
        }


def distill(
    recipe: Recipe,
    teacher: str,
    out: str | Path | None = None,
    asking: Asking | None = None,
    *,
    console: Console | None = None,
) -> dict[str, Any]:
    """Have a teacher solve the recipe's problems; returns what `summary.json` then holds.

    `teacher` is the address of an OpenAI-compatible server, or a target as in `evaluate`. Every
    answer is graded by the recipe's rule and kept, wrong ones too. Answers that are kept beside
    `out` are not asked for again. Raises: RecipeError for what the user can put right.
    """
    console = console or Console(stderr=True)
    asking = asking or Asking()

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    with ExitStack() as stack:
        style = recipe.data.prompt.style
        scorer = stack.enter_context(open_scorer(recipe.reward, conversational=style == "chat"))
        format = PromptFormat(_tokenizer(recipe.policy), recipe.data.prompt)
        source = find_teacher(teacher, recipe, asking, say)
        path = _output(recipe, source.name, out)
        # The same rows that training would take, with room for what it samples.
        loaded = load_problems(
            recipe.data, format, context=recipe.policy.context,
            reserve=recipe.rollout.max_tokens + 1,
        )  # fmt: skip
        say(f"data: {loaded.describe()}")
        problems = loaded.problems[: asking.limit]
        if asking.column in problems[0].columns:
            say(f"column: the data's own {asking.column!r} is replaced")
        folder = beside(path)
        stack.enter_context(alone_in(folder))
        who = source.start(folder / "engine", stack)
        work = Distillation(asking, _questions(recipe, source, who, asking, problems))
        _ask_all(work, source, AnswerStore(folder / "responses.jsonl"), scorer, format, console)
        summary = {
            "file": str(path), "teacher": source.name, "asking": asking.model_dump(),
            **work.summary(), "failures": dict(work.failures.most_common(MAX_EXAMPLES)),
        }  # fmt: skip
        _write(path, recipe, problems, work, source.name)
        write_whole(folder / "summary.json", json.dumps(summary, indent=1))
    return summary


def beside(out: Path) -> Path:
    """The folder of all that belongs to a distilled file and is no data."""
    return out.with_suffix(".distill")


def _tokenizer(settings: PolicySettings) -> Any:
    """The policy's tokenizer, which decides what prompts are too long."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(
            model_location(settings.model), revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        rule = "must be a model folder or hub id with a tokenizer"
        raise RecipeError([f"policy.model: {rule}, got {settings.model!r} ({reason})"]) from error


def _output(recipe: Recipe, teacher: str, out: str | Path | None) -> Path:
    """The file to write. Raises: RecipeError for one that is somebody else's."""
    slug = re.sub(r"[^\w.-]+", "-", teacher.rstrip("/").rpartition("/")[2]).strip("-.") or "teacher"
    path = Path(out) if out is not None else Path("data") / f"{recipe.name}-{slug}.jsonl"
    if path.suffix not in (".jsonl", ".parquet"):
        raise RecipeError([f"--out: must be a .jsonl or .parquet file, got {str(path)!r}."])
    if path.exists() and not beside(path).is_dir():
        rule = "must be a new file, or one that this command has written"
        raise RecipeError([f"--out: {rule}, got {str(path)!r}. Choose another."])
    return path


def _questions(
    recipe: Recipe, teacher: Teacher, who: str, asking: Asking, problems: Sequence[Problem]
) -> list[Question]:
    """All there is to ask, problem by problem, under keys that say who is asked what and how."""
    most = asking.max_tokens or recipe.rollout.max_tokens
    how = [asking.temperature, asking.top_p, most]
    questions = []
    for problem in problems:
        prompt = teacher.prompt(problem)
        for number in range(asking.samples):
            seed = sample_seed(recipe.seed, "teacher", problem.id, number)
            text = json.dumps([who, prompt, how, seed])
            key = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
            questions.append(Question(problem, prompt, seed, key))
    return questions


def _ask_all(
    work: Distillation, teacher: Teacher, store: AnswerStore, scorer: Scorer,
    format: PromptFormat, console: Console,
) -> None:  # fmt: skip
    """Grade what was kept, ask for the rest, and grade it as it comes."""
    kept = [(q, answer) for q in work.questions if (answer := store.get(q)) is not None]
    todo = [q for q in work.questions if store.get(q) is None]
    # Closed before anything else when we are interrupted: what is in flight is waited for.
    with (
        closing(teacher.answers(todo, store.keep, bool(kept))) as arriving,
        _Screen(console, work) as screen,
    ):
        for start in range(0, len(kept), CHUNK):
            work.add(_grade(scorer, format, kept[start : start + CHUNK]))
            screen.show()
        for events in arriving:
            answered = [(q, answer) for q, answer in events if isinstance(answer, Answer)]
            work.asked += len(events)
            work.asked_tokens += sum(answer.completion_tokens for _, answer in answered)
            work.failures.update(reason for _, reason in events if isinstance(reason, str))
            work.add(_grade(scorer, format, answered))
            screen.show()


def _grade(
    scorer: Scorer, format: PromptFormat, answers: Sequence[tuple[Question, Answer]]
) -> dict[str, Graded]:
    """The answers under their keys, graded as demonstrations are in training."""
    groups = [
        Group(
            question.problem,
            (Response(format.response_ids(a.text)[0], a.text, "teacher", a.finish_reason),),
        )
        for question, a in answers
    ]
    return {
        question.key: Graded(answer, r.reward or 0.0, r.verdict or "ok", correct(r))
        for (question, answer), [r] in zip(answers, scorer.score(groups), strict=True)
    }


# --- what is written -------------------------------------------------------------------------


def _write(
    path: Path, recipe: Recipe, problems: Sequence[Problem], work: Distillation, teacher: str
) -> None:
    """The data set, and the part of a recipe that reads it back."""
    rows = list(_rows(problems, work, teacher))
    if path.suffix == ".jsonl":
        write_whole(path, "".join(json.dumps(row, default=str) + "\n" for row in rows))
    else:
        _write_parquet(path, rows)
    write_whole(beside(path) / "data.yaml", fragment(recipe, path, work.asking.column))


def _rows(
    problems: Sequence[Problem], work: Distillation, teacher: str
) -> Iterator[dict[str, Any]]:
    """The source's rows in the order of training, with the answers in further columns."""
    name = work.asking.column
    for number, problem in enumerate(problems):
        answers, _ = work.offered(number)
        yield {
            **problem.columns,
            name: [g.answer.text for g in answers],
            f"{name}_rewards": [g.reward for g in answers],
            f"{name}_verdicts": [g.verdict for g in answers],
            f"{name}_model": teacher,
        }


def _write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises: RecipeError for columns that are of no one type."""
    import pyarrow
    import pyarrow.parquet

    names = dict.fromkeys(name for row in rows for name in row)
    try:
        table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError) as error:
        raise RecipeError(
            [f"--out: must be .jsonl for what parquet can't hold, got {str(path)!r} ({error})."]
        ) from error
    with whole(path) as partial:
        pyarrow.parquet.write_table(table, partial)


def fragment(recipe: Recipe, path: Path, column: str) -> str:
    """The `data:` section that reads a distilled file back, to be extended by a recipe."""
    columns = columns_of(recipe.data)
    others = [name for name in columns.teacher if name != column]
    data = {
        "source": str(path),
        "shuffle": False,
        "columns": columns.model_copy(update={"teacher": [*others, column]}).model_dump(),
    }
    text = yaml.dump({"data": data}, Dumper=Dumper, sort_keys=False, allow_unicode=True)
    return f"# The rows are in the order of training: shuffled already.\n{text}"


# --- what is shown ---------------------------------------------------------------------------


class _Screen:
    """Live progress on a terminal; a line now and then where there is none."""

    def __init__(self, console: Console, work: Distillation) -> None:
        self._console, self._work = console, work
        self._told = 0
        self._progress = Progress(
            TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TextColumn("left"),
            TimeRemainingColumn(), TextColumn("{task.description}"), console=console,
            transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=len(work.questions))

    def __enter__(self) -> _Screen:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self) -> None:
        """Show how far it is."""
        done, total = len(self._work.graded), len(self._work.questions)
        text = f"right {self._work.right / done:.0%}" if done else ""
        if (cost := self._work.cost()) is not None:
            text += f"  ${cost:,.2f}"
        if self._work.failures:
            text += f"  failed {self._work.failures.total():,}"
        if self._console.is_terminal:
            self._progress.update(self._task, completed=done, description=text)
        elif (share := 20 * done // total) > self._told:
            self._told = share
            self._console.print(f"{done:,} of {total:,} answers  {text}", markup=False)


def table(summary: Mapping[str, Any]) -> Table:
    """The figures worth reading."""
    shown = {name: f"{summary[name]:,}" for name in _SHOWN}
    if summary["acceptance"] is not None:
        shown["right"] += f" ({summary['acceptance']:.1%} of the answers)"
    shown["seconds"] = f"{summary['seconds']:,.0f}"
    shown["answer tokens a second"] = f"{summary['tokens_per_second']:,.0f}"
    if summary["cost"] is not None:
        shown["cost"] = f"${summary['cost']:,.4f}"
    title = escape(f"{summary['file']}: {summary['teacher']}")
    made = Table(title=title, show_header=False)
    for name, value in shown.items():
        made.add_row(name.replace("_", " "), value)
    return made


_SHOWN = (
    "problems", "asked", "reused", "answered", "failed", "right", "problems_without_right_answer",
    "offered", "duplicates", "truncated", "empty", "prompt_tokens", "completion_tokens",
)  # fmt: skip
