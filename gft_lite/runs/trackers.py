"""Experiment trackers: TensorBoard, Weights & Biases and trackio, in the table `TRACKERS`.

Names are grouped: `train/loss`, `reward/self`, `eval/test/pass@1`. TensorBoard and W&B write to
RUN/tracker, trackio to its own folder, `TRACKIO_DIR`. RUN/tracker/id has the id by which a resumed
run continues the same run of the tracker.

Adding a tracker:
1. Write a class with the methods of `Tracker`, which imports its library in the constructor.
2. Name it in `TRACKERS`, and in `log.trackers` of the recipe's sections.
"""

from __future__ import annotations

import html
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from gft_lite.recipe.schema import Recipe
from gft_lite.types import ScoredGroup
from gft_lite.utils.errors import UserError
from gft_lite.utils.files import write_text_atomic
from gft_lite.utils.tables import Table, flatten

COLUMNS = ("step", "prompt", "source", "response", "reward", "advantage")
Rows = Sequence[tuple[int, str, str, str, float | None, float]]


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What a tracker is started with; `id` stays the same when the run is resumed."""

    project: str
    name: str
    id: str
    folder: Path
    recipe: Recipe


class Tracker(Protocol):
    """A library that shows the course of a run."""

    def log(self, values: Mapping[str, float], rows: Rows, step: int) -> None:
        """Record the numbers and the responses (rows of `COLUMNS`, possibly none) of a step."""

    def close(self) -> None:
        """Write what is buffered and end."""


class Trackers:
    """The trackers that a recipe names; with none of them nothing is written."""

    def __init__(self, names: Sequence[str], recipe: Recipe, folder: Path) -> None:
        self._groups = recipe.log.completions
        self._trackers: list[Tracker] = []
        if names:
            run = TrackedRun(
                project=recipe.name,
                name=_run_name(folder),
                id=_run_id(folder / "tracker" / "id"),
                folder=folder / "tracker",
                recipe=recipe,
            )
            for name in names:
                self._trackers.append(TRACKERS[name](run))

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Record every number of a step's metrics."""
        for tracker in self._trackers:
            tracker.log(tracked_values(metrics), (), step)

    def log_groups(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        """Record the responses of the first groups of a step as a table."""
        rows = [
            (step, scored.group.problem.text, r.source, r.text, r.reward, advantage)
            for scored in groups[: self._groups]
            for r, advantage in scored
        ]
        for tracker in self._trackers if rows else ():
            tracker.log({}, rows, step)

    def close(self) -> None:
        """Write what is buffered and end all trackers."""
        for tracker in self._trackers:
            tracker.close()


def check_trackers(names: Sequence[str]) -> None:
    """Raises: UserError for a tracker whose library is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        advice = 'pip install "gft-lite[trackers]", or remove the name.'
        rule = "must be installed, got no such module"
        raise UserError([f"log.trackers: {name} {rule}. {advice}" for name in missing])


def tracked_values(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a step by grouped names; those without a group are in `train/`."""
    numbers = {k: v for k, v in flatten(metrics).items() if isinstance(v, int | float)}
    numbers.pop("step", None)
    return {name if "/" in name else f"train/{name}": value for name, value in numbers.items()}


def _run_name(folder: Path) -> str:
    """The name of a run's folder; of a stage also that of the run."""
    parts = folder.resolve().parts
    return "/".join((parts[-3], parts[-1]) if parts[-2] == "stages" else parts[-1:])


def _run_id(file: Path) -> str:
    """The id in a file, which is written if there is none."""
    if not file.exists():
        write_text_atomic(file, secrets.token_hex(4))
    return file.read_text(encoding="utf-8").strip()


class _TensorBoard:
    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._writer: Any = None

    def log(self, values: Mapping[str, float], rows: Rows, step: int) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # After a resume, steps that are repeated replace those in the files.
            self._writer = SummaryWriter(str(self._run.folder), purge_step=step)
            self._writer.add_text("recipe", f"```yaml\n{self._run.recipe.to_yaml()}```", step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if rows:
            cells = tuple(tuple(_cell(value) for value in row) for row in rows)
            table = Table("", COLUMNS, cells, labels=4).markdown().partition("\n\n")[2]
            self._writer.add_text("completions", table, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _cell(value: float | str | None) -> str:
    """A value in a Markdown table of TensorBoard, which removes unknown HTML tags."""
    if isinstance(value, str):
        return html.escape(value).replace("\n", "<br>")
    return "-" if value is None else f"{value:.4g}"


class _WandB:
    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._wandb: Any = wandb
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", run.project),
                name=run.name,
                id=run.id,
                resume="allow",
                dir=run.folder,
                config=run.recipe.model_dump(mode="json"),
                settings=wandb.Settings(console="off"),  # Output stays on this machine.
            )
        except wandb.Error as error:
            reason = str(error).splitlines()[0].rstrip(".")
            advice = "Log in with `wandb login`, or set WANDB_MODE=offline."
            rule = "log.trackers: wandb must be able to start a run"
            raise UserError([f"{rule}, got {reason}. {advice}"]) from error
        # W&B ignores values of its own step that are logged again after a resume.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], rows: Rows, step: int) -> None:
        table = {"completions": self._wandb.Table(list(COLUMNS), [*map(list, rows)])}
        self._run.log({"step": step, **values, **(table if rows else {})})

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self._trackio: Any = trackio
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", run.project),
            name=f"{run.name}-{run.id}",  # A run of trackio is resumed by its name.
            resume="allow",
            config=flatten(run.recipe.model_dump(mode="json")),
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def log(self, values: Mapping[str, float], rows: Rows, step: int) -> None:
        table = {"completions": self._trackio.Table(list(COLUMNS), [*map(list, rows)])}
        self._run.log({**values, **(table if rows else {})}, step=step)

    def close(self) -> None:
        self._trackio.finish()


TRACKERS: dict[str, type[_TensorBoard] | type[_WandB] | type[_Trackio]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "trackio": _Trackio,
}
