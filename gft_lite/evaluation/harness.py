"""Tasks of lm-evaluation-harness on our targets, beside the figures of our own suites.

The harness gets the policy as we load it: the quantized base with the adapter in place, so that its
figures are those of the same weights. Results are kept in OUT/harness.json by model and settings.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from gft_lite.evaluation.targets import Target, base_identity, group_by_base, identity
from gft_lite.policy.base import Policy, evaluating
from gft_lite.policy.registry import load_policy
from gft_lite.utils.errors import UserError, nearest, short_repr
from gft_lite.utils.files import read_json, write_text_atomic
from gft_lite.utils.imports import installed_version
from gft_lite.utils.library_output import is_verbose
from gft_lite.utils.progress import show_phase
from gft_lite.utils.tables import Table

FILE = "harness.json"
_BATCH = 8  # Rows of a forward pass.
_BOOTSTRAP = 1_000  # Resamples for the standard error of a metric that is no mean.

# By target, task and metric: the value and its standard error (None if it has none).
Results = dict[str, dict[str, dict[str, tuple[float, float | None]]]]


@dataclass(frozen=True, slots=True)
class HarnessSettings:
    """Tasks and how they are run; `include` is a folder with the user's own task files.

    `limit` is the number of documents of each task, `chat` applies the model's chat template.
    """

    tasks: tuple[str, ...]
    include: str | None = None
    limit: int | None = None
    chat: bool = False


def load_tasks(settings: HarnessSettings) -> Any:
    """The harness's task manager, with all tasks read once.

    Raises: UserError if the harness is not installed, or for a task that is unknown or whose data
    can't be loaded.
    """
    logging.getLogger("lm_eval").setLevel(logging.INFO if is_verbose() else logging.ERROR)
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        rule = "--harness: lm-eval must be installed, got no such module"
        raise UserError([f'{rule}. pip install "gft-lite[lm-eval]".']) from error
    if settings.include is not None and not Path(settings.include).is_dir():
        rule = "--harness-include: must be a folder with task files"
        raise UserError([f"{rule}, got {short_repr(settings.include)}."])
    manager = TaskManager(include_path=settings.include)
    problems = []
    for task in settings.tasks:
        if task not in manager.all_tasks:
            close = nearest(task, manager.all_tasks)
            hint = f" Did you mean {close}?" if close else ""
            rule = "must be a task of lm-evaluation-harness or of --harness-include"
            problems.append(f"--harness: {rule}, got {short_repr(task)}.{hint}")
    if problems:
        raise UserError(problems)
    try:
        manager.load(list(settings.tasks))
    # The hub can't be reached, a task needs another package, its file is wrong.
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        rule = "must be tasks whose data can be loaded"
        raise UserError([f"--harness: {rule}, got {reason}."]) from error
    return manager


def run_harness(
    settings: HarnessSettings, manager: Any, targets: Sequence[Target], folder: Path,
    console: Console,
) -> Results:  # fmt: skip
    """The figures of every target; those already in `folder` are not computed again.

    `manager` is that of `load_tasks`. Raises: UserError for a model that can't be loaded.
    """
    known = _read(folder / FILE)
    results: Results = {}
    for group in group_by_base(targets):
        first = next((t for t in group if t.adapter is not None), group[0])
        with show_phase(console, f"loading {first.policy.model}"):
            policy = load_policy(first.policy)
        base = base_identity(policy)
        for target in group:
            key = f"{identity(base, target.adapter)} {_described(settings)}"
            if key not in known:
                if target.adapter is not None:
                    policy.load_adapter(target.adapter)
                with show_phase(console, f"{target.label} on {', '.join(settings.tasks)}"):
                    known[key] = _evaluate(settings, manager, policy, adapted=bool(target.adapter))
                write_text_atomic(folder / FILE, json.dumps(known, indent=1))
            results[target.label] = known[key]
    return {target.label: results[target.label] for target in targets}


def _evaluate(
    settings: HarnessSettings, manager: Any, policy: Policy, *, adapted: bool
) -> dict[str, dict[str, tuple[float, float | None]]]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with evaluating(policy), nullcontext() if adapted else policy.base():
        model = HFLM(pretrained=policy.model, tokenizer=policy.tokenizer, batch_size=_BATCH,
                     max_length=policy.context)  # fmt: skip
        found = simple_evaluate(
            model, tasks=list(settings.tasks), task_manager=manager, limit=settings.limit,
            apply_chat_template=settings.chat, log_samples=False, bootstrap_iters=_BOOTSTRAP,
        )  # fmt: skip
    assert found is not None
    return {task: _figures(values) for task, values in found["results"].items()}


def _figures(values: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """The metrics of a task, which the harness names `METRIC,FILTER` and `METRIC_stderr,FILTER`."""
    figures = {}
    for name, value in values.items():
        metric, comma, filtered = name.partition(",")
        if comma and not metric.endswith("_stderr"):
            error = values.get(f"{metric}_stderr,{filtered}")
            shown = metric if filtered == "none" else f"{metric} ({filtered})"
            figures[shown] = value, error if isinstance(error, float) else None
    return figures


def harness_table(results: Results) -> Table:
    """A row per task and metric, a column per target."""
    rows = dict.fromkeys((t, m) for tasks in results.values() for t in tasks for m in tasks[t])
    cells = [
        (task, metric, *(_cell(tasks.get(task, {}).get(metric)) for tasks in results.values()))
        for task, metric in rows
    ]
    title = "lm-evaluation-harness (± standard error)"
    return Table(title, ("task", "metric", *results), tuple(cells), labels=2)


def _cell(figure: tuple[float, float | None] | None) -> str:
    if figure is None:
        return "-"
    value, error = figure
    return f"{value:.3f}" if error is None else f"{value:.3f} ±{error:.3f}"


def add_to_results(folder: Path, results: Results) -> None:
    """Write the figures to results.json and results.md of an evaluation, beside what is there."""
    file = folder / "results.json"
    there = (
        read_json(file, dict, "must be the results of an evaluation", "Remove it.")
        if file.exists()
        else {}
    )
    write_text_atomic(file, json.dumps({**there, "harness": results}, indent=1))
    table = harness_table(results).markdown()
    text = (folder / "results.md").read_text("utf-8") if (folder / "results.md").exists() else ""
    kept = text.partition(table.splitlines()[0])[0].rstrip()
    write_text_atomic(folder / "results.md", f"{kept}\n\n{table}".lstrip())


def _described(settings: HarnessSettings) -> str:
    """What the figures depend on beside the model, as text."""
    version = installed_version("lm-eval") or installed_version("lm_eval")
    return json.dumps({**asdict(settings), "lm-eval": version})


def _read(file: Path) -> dict[str, Any]:
    rule = "must be results of lm-evaluation-harness"
    return read_json(file, dict, rule, "Remove the file.") if file.exists() else {}
