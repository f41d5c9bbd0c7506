"""Teacher solutions for a data set: asked for, graded by the recipe's rule, written as data."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from gft_lite.data.problems import columns_of, load_problems
from gft_lite.data.prompts import PromptFormat
from gft_lite.distillation.answer_store import AnswerStore
from gft_lite.distillation.console import DistillConsole
from gft_lite.distillation.endpoint_teacher import EndpointTeacher
from gft_lite.distillation.local_teacher import LocalTeacher
from gft_lite.distillation.progress import Distillation, Graded
from gft_lite.distillation.teachers import (
    Say,
    Teacher,
    TeacherRequest,
    TeacherResponse,
    TeacherSettings,
)
from gft_lite.evaluation.metrics import correct
from gft_lite.evaluation.sets import open_scorer
from gft_lite.policy.registry import model_location
from gft_lite.recipe.loader import Dumper
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import PolicySettings
from gft_lite.rewards.scorer import Scorer
from gft_lite.rollout.sampling import sample_seed
from gft_lite.types import Group, Problem, Response
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.files import atomic_write, lock_folder, write_text_atomic

CHUNK = 1024  # Kept answers that are graded at a time.
MAX_EXAMPLES = 3


def distill(
    recipe: Recipe,
    teacher: str,
    out: str | Path | None = None,
    asking: TeacherSettings | None = None,
    *,
    console: Console | None = None,
) -> dict[str, Any]:
    """Have a teacher solve the recipe's problems; returns what `summary.json` then holds.

    `teacher` is the address of an OpenAI-compatible server, or a target as in `evaluate`. Every
    answer is graded by the recipe's rule and kept, wrong ones too. Answers that are kept beside
    `out` are not asked for again. Raises: RecipeError for what the user can put right.
    """
    console = console or Console(stderr=True)
    asking = asking or TeacherSettings()

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
        stack.enter_context(lock_folder(folder))
        who = source.start(folder / "engine", stack)
        work = Distillation(asking, _questions(recipe, source, who, asking, problems))
        _ask_all(work, source, AnswerStore(folder / "responses.jsonl"), scorer, format, console)
        summary = {
            "file": str(path), "teacher": source.name, "asking": asking.model_dump(),
            **work.summary(), "failures": dict(work.failures.most_common(MAX_EXAMPLES)),
        }  # fmt: skip
        _write(path, recipe, problems, work, source.name)
        write_text_atomic(folder / "summary.json", json.dumps(summary, indent=1))
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
    recipe: Recipe, teacher: Teacher, who: str, asking: TeacherSettings, problems: Sequence[Problem]
) -> list[TeacherRequest]:
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
            questions.append(TeacherRequest(problem, prompt, seed, key))
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
        DistillConsole(console, work) as screen,
    ):
        for start in range(0, len(kept), CHUNK):
            work.add(_grade(scorer, format, kept[start : start + CHUNK]))
            screen.show()
        for events in arriving:
            answered = [(q, answer) for q, answer in events if isinstance(answer, TeacherResponse)]
            work.asked += len(events)
            work.asked_tokens += sum(answer.completion_tokens for _, answer in answered)
            work.failures.update(reason for _, reason in events if isinstance(reason, str))
            work.add(_grade(scorer, format, answered))
            screen.show()


def _grade(
    scorer: Scorer, format: PromptFormat, answers: Sequence[tuple[TeacherRequest, TeacherResponse]]
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
        write_text_atomic(path, "".join(json.dumps(row, default=str) + "\n" for row in rows))
    else:
        _write_parquet(path, rows)
    write_text_atomic(beside(path) / "data.yaml", fragment(recipe, path, work.asking.column))


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
    with atomic_write(path) as partial:
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


def find_teacher(teacher: str, recipe: Recipe, asking: TeacherSettings, say: Say) -> Teacher:
    """The endpoint at an address, or the model on this machine.

    Raises: RecipeError for one that isn't there or doesn't let us in.
    """
    if re.match("https?://", teacher):
        return EndpointTeacher(teacher, recipe, asking, say)
    if asking.model is not None:
        raise RecipeError([f"model: must be left out for {teacher!r}, which is no address."])
    return LocalTeacher(teacher, recipe, asking)
