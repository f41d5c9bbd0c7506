"""The `distill` pipeline: sample a teacher, grade its responses, write them as a data set."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from gft_lite.data.base import Unusable
from gft_lite.data.problems import columns_of, load_problems
from gft_lite.data.prompts import PromptFormat
from gft_lite.distillation.answer_store import AnswerStore
from gft_lite.distillation.console import progress_text
from gft_lite.distillation.data_set import side_folder, write_data_set
from gft_lite.distillation.endpoint_teacher import EndpointTeacher
from gft_lite.distillation.local_teacher import LocalTeacher
from gft_lite.distillation.progress import UNUSABLE, Distillation, GradedResponse
from gft_lite.distillation.teachers import (
    Log,
    Teacher,
    TeacherRequest,
    TeacherResponse,
    TeacherSettings,
    is_endpoint,
)
from gft_lite.evaluation.sets import open_scorer
from gft_lite.policy.load_errors import LOAD_ERRORS
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import ColumnsSettings, PolicySettings
from gft_lite.rewards.judge_client import FILE as JUDGEMENTS
from gft_lite.rewards.scorer import Scorer
from gft_lite.rollout.prompt_check import load_tokenizer
from gft_lite.rollout.sampling import sample_seed
from gft_lite.types import Group, Problem
from gft_lite.utils.errors import RecipeError, UserError, short_repr
from gft_lite.utils.files import check_output_path, lock_folder, write_text_atomic
from gft_lite.utils.progress import ProgressDisplay, show_phase, stderr_console

CHUNK = 1024  # Stored responses that are graded at a time.
MAX_REQUESTS = 10**7  # All are held in memory.
MAX_REASONS = 3  # Reasons of failures in the summary.


def distill(
    recipe: Recipe,
    teacher: str,
    out: str | Path | None = None,
    settings: TeacherSettings | None = None,
    *,
    console: Console | None = None,
) -> dict[str, Any]:
    """Have a teacher answer the recipe's problems; returns the content of `summary.json`.

    `teacher` is the address of an OpenAI-compatible server, or a target as in `evaluate`. Every
    response is graded by the recipe's rule and stored, also an incorrect one. A response that is
    stored beside `out` is not sampled again. Raises: UserError; TeacherError if the teacher stops
    responding.
    """
    console = console or stderr_console()
    settings = settings or TeacherSettings()

    def log(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    if out is not None:
        _check_output(Path(out))
    _check_column(recipe, settings.column)
    with ExitStack() as stack:
        conversational = recipe.data.prompt.style == "chat"
        scorer = stack.enter_context(
            open_scorer(recipe.reward, conversational=conversational, log=log)
        )
        with show_phase(console, "reading the tokenizer", announce=False):
            format = PromptFormat(_load_tokenizer(recipe.policy), recipe.data.prompt)
        source = find_teacher(teacher, recipe, settings, log)
        path = Path(out) if out is not None else _default_output(recipe, source.name)
        problems, columns = _load_problems(recipe, format, settings, log)
        folder = side_folder(path)
        stack.enter_context(lock_folder(folder))
        if scorer.judge is not None:
            scorer.judge.keep(folder / JUDGEMENTS)
        with show_phase(console, f"starting the teacher {source.name}", announce=False):
            identity = source.start(folder / "engine", stack)
        requests = _make_requests(recipe, source, identity, settings, problems)
        state = Distillation(settings, requests)
        store = AnswerStore(folder / "responses.jsonl")
        _collect(state, source, store, Grader(scorer, format), console)
        summary = {
            "file": str(path), "teacher": source.name, "asking": settings.model_dump(),
            **state.summary(), "failures": dict(state.failures.most_common(MAX_REASONS)),
            **({} if scorer.judge is None else {"judge": scorer.judge.totals()}),
        }  # fmt: skip
        write_data_set(path, columns, problems, state, source.name)
        write_text_atomic(folder / "summary.json", json.dumps(summary, indent=1))
    return summary


def find_teacher(teacher: str, recipe: Recipe, settings: TeacherSettings, log: Log) -> Teacher:
    """The endpoint at an address, or a local model.

    Raises: UserError for one that does not exist or rejects the key.
    """
    if is_endpoint(teacher, settings):
        return EndpointTeacher(teacher, recipe, settings, log)
    return LocalTeacher(teacher, recipe, settings)


def _load_tokenizer(settings: PolicySettings) -> Any:
    """The policy's tokenizer, by which too long prompts are skipped as in training."""
    try:
        return load_tokenizer(settings)
    except LOAD_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        rule = "must be a model folder or hub id with a tokenizer"
        raise RecipeError([f"policy.model: {rule}, got {settings.model!r} ({reason})"]) from error


def _load_problems(
    recipe: Recipe, format: PromptFormat, settings: TeacherSettings, log: Log
) -> tuple[Sequence[Problem], ColumnsSettings]:
    """The first `limit` problems that training would use, and the columns. Raises: UserError."""
    reserve = recipe.rollout.max_tokens + 1
    loaded = load_problems(recipe.data, format, context=recipe.policy.context, reserve=reserve)
    log(f"data: {loaded.describe()}")
    for note in loaded.notes:
        log(note)
    problems = loaded.problems[: settings.limit]
    if (count := len(problems) * settings.samples) > MAX_REQUESTS:
        rule = f"must make at most {MAX_REQUESTS:,} requests of {len(problems):,} problems"
        raise UserError([f"samples: {rule}, got {count:,}. Use --limit or fewer samples."])
    if settings.column in problems[0].columns:
        log(f"column: the data's own {settings.column!r} is replaced")
    return problems, loaded.columns


def _check_column(recipe: Recipe, name: str) -> None:
    """Raises: UserError for a new column that would replace one that the recipe reads."""
    columns = columns_of(recipe.data)
    problem = [columns.problem] if isinstance(columns.problem, str) else columns.problem
    read = [
        *problem,
        columns.messages,
        columns.choices,
        columns.answer,
        columns.id,
        *columns.expert,
    ]
    if name in (column.partition(".")[0] for column in read if column):
        rule = "must not be a column that the recipe reads"
        raise UserError([f"column: {rule}, got {name!r}. Choose another name."])


def _default_output(recipe: Recipe, teacher: str) -> Path:
    """The data set of a teacher if the user gives no path. Raises: UserError."""
    last = teacher.rstrip("/").rpartition("/")[2][:64]
    slug = re.sub(r"[^\w.-]+", "-", last, flags=re.ASCII).strip("-.") or "teacher"
    path = Path("data") / f"{recipe.name}-{slug}.jsonl"
    _check_output(path)
    return path


def _check_output(path: Path) -> None:
    """Raises: UserError for a path that cannot be written to, or is not of this command."""
    if path.suffix not in (".jsonl", ".parquet"):
        rule = "must be a .jsonl or .parquet file"
        raise UserError([f"--out: {rule}, got {short_repr(str(path))}. Change the ending."])
    check_output_path(path, "--out", "file")
    check_output_path(side_folder(path), "--out", "folder")
    if path.exists() and not side_folder(path).is_dir():
        rule = "must be a new file, or one that this command has written"
        raise UserError([f"--out: {rule}, got {str(path)!r}. Choose another."])


def _make_requests(
    recipe: Recipe,
    teacher: Teacher,
    identity: str,
    settings: TeacherSettings,
    problems: Sequence[Problem],
) -> list[TeacherRequest]:
    """`samples` requests per problem, each with a seed and key of its own."""
    max_tokens = settings.max_tokens or recipe.rollout.max_tokens
    sampling = [settings.temperature, settings.top_p, max_tokens]
    requests = []
    for problem in problems:
        prompt = teacher.prompt(problem)
        for number in range(settings.samples):
            seed = sample_seed(recipe.seed, "teacher", problem.id, number)
            text = json.dumps([identity, prompt, sampling, seed])
            key = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
            requests.append(TeacherRequest(problem, prompt, seed, key))
    return requests


@dataclass(frozen=True, slots=True)
class Grader:
    """Grades teacher responses as demonstrations are graded in training."""

    scorer: Scorer
    format: PromptFormat

    def grade(
        self, answered: Sequence[tuple[TeacherRequest, TeacherResponse]]
    ) -> dict[str, GradedResponse]:
        """The graded responses by request key."""
        graded: dict[str, GradedResponse] = {}
        pairs, groups = [], []
        for request, response in answered:
            try:
                demonstration = self.format.demonstration(response.text, "teacher")
            except Unusable:
                graded[request.key] = GradedResponse(response, None, UNUSABLE, False)
                continue
            pairs.append((request, response))
            whole = replace(demonstration, finish_reason=response.finish_reason)
            groups.append(Group(request.problem, (whole,)))
        for (request, response), [scored] in zip(pairs, self.scorer.score(groups), strict=True):
            grade = scored.reward, scored.verdict or "ok", scored.correct
            graded[request.key] = GradedResponse(response, *grade)
        return graded


def _collect(
    state: Distillation, teacher: Teacher, store: AnswerStore, grader: Grader, console: Console
) -> None:
    """Grade the stored responses, request the others, and grade each as it arrives."""
    stored = [(r, response) for r in state.requests if (response := store.get(r)) is not None]
    missing = [r for r in state.requests if store.get(r) is None]
    # The generator is closed first after an interrupt: it waits for the requests in flight.
    with (
        closing(teacher.generate(missing, store.append, bool(stored))) as results,
        ProgressDisplay(console, "answers", len(state.requests)) as display,
        show_phase(console, f"teacher {teacher.name}", announce=False),
    ):
        for start in range(0, len(stored), CHUNK):
            state.add(grader.grade(stored[start : start + CHUNK]))
            display.update(len(state.graded), progress_text(state))
        for batch in results:
            answered = [(r, result) for r, result in batch if isinstance(result, TeacherResponse)]
            state.asked += len(batch)
            state.asked_tokens += sum(response.completion_tokens for _, response in answered)
            state.failures.update(reason for _, reason in batch if isinstance(reason, str))
            state.add(grader.grade(answered))
            display.update(len(state.graded), progress_text(state))
