"""Running a sweep: every trial is an ordinary run; equal bases are evaluated once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from gft_lite.experiments.launchers import LAUNCHERS, LOG, Launcher
from gft_lite.experiments.search import Search
from gft_lite.experiments.sweep_budget import PROBE, earlier_start, probe_trial, within_budget
from gft_lite.experiments.sweep_config import Sweep, Trial
from gft_lite.experiments.sweep_results import (
    SweepFolder,
    other_recipe,
    trial_result,
    write_results,
)
from gft_lite.recipe.schema import Recipe
from gft_lite.runs.base_cache import BASE_EVALUATION, KL_SET, base_inputs, copy_base_files
from gft_lite.runs.folder import RunFolder, stage_folder
from gft_lite.utils.errors import RecipeError, UserError
from gft_lite.utils.files import check_output_path, lock_folder, write_text_atomic
from gft_lite.utils.progress import ProgressDisplay, stderr_console
from gft_lite.utils.signals import defer_signals

State = Literal["waiting", "running", "done", "stopped", "failed", "interrupted"]
_POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Span:
    """The place of a sweep among several: how many trials came before it, and all of them."""

    before: int
    total: int


@dataclass
class _Job:
    """A trial and its state while the sweep runs; `reason` says why it failed or was stopped.

    `stopped_at` is the step by whose evaluation a search stopped it.
    """

    trial: Trial
    run: RunFolder
    stopped_at: int | None = None
    state: State = "waiting"
    reason: str | None = None
    base_recipe: Recipe = field(init=False)
    base_run: RunFolder = field(init=False)
    base: str = field(init=False)

    def __post_init__(self) -> None:
        recipe = self.trial.recipe
        self.base_recipe, self.base_run = recipe, self.run
        if recipe.stages:
            self.base_recipe, self.base_run = recipe.stage(0), stage_folder(recipe, self.run, 0)
        self.base = base_inputs(self.base_recipe)
        if self.finished or self.stopped_at is not None:
            self.end(None, stopping=False)

    @property
    def finished(self) -> bool:
        """True if the run is complete."""
        return (self.run.path / "summary.json").exists()

    @property
    def has_base(self) -> bool:
        """True if the evaluation of the base is complete."""
        return (self.base_run.path / BASE_EVALUATION).exists()

    def end(self, reason: str | None, stopping: bool) -> None:
        """Set the state after the trial's process has ended."""
        if self.finished:
            self.state, self.reason = "done", None
        elif self.stopped_at is not None:
            self.state = "stopped"
            self.reason = f"stopped by the search at step {self.stopped_at}"
        elif stopping:
            self.state, self.reason = "interrupted", None
        else:
            self.state, self.reason = "failed", reason


def sweep(
    plan: Sweep, out: str | Path | None = None, *, jobs: int | None = None,
    launcher: str = "local", share: bool = True, console: Console | None = None,
    span: Span | None = None, workers: Callable[[], Launcher] | None = None,
) -> SweepFolder:  # fmt: skip
    """Run every unfinished trial, `jobs` at a time, and return the sweep's folder.

    With `share`, consecutive trials of a local process use one loaded base and one engine.
    The base evaluation of one trial is copied to the others with the same base. Running the same
    sweep in the same folder again repeats failed trials and resumes interrupted ones. Progress is
    shown of all sweeps of `span`, which may have one launcher: `workers` returns it, and it stays
    open.

    Raises: UserError for a wrong sweep or folder; KeyboardInterrupt after all trials have stopped.
    """
    console = console or stderr_console()
    check_launcher(jobs, launcher)
    if out is not None:
        check_output_path(out)
    folder = SweepFolder(out if out is not None else Path("runs") / "sweeps" / plan.name)
    if plan.budget_hours is not None:
        plan = earlier_start(plan, folder) or _shortened(plan, folder, launcher, console)
    trials = [] if plan.search else plan.trials()
    work = [_Job(trial, folder.run(trial.name)) for trial in trials]
    _check_folders(work)
    search: Search | None = None

    def save() -> None:
        results = [trial_result(job.trial, job.run, job.state, job.reason) for job in work]
        write_results(folder, plan, results, search.summary() if search else None)

    with ExitStack() as stack:
        stack.enter_context(lock_folder(folder.path))
        if plan.search:
            search = Search(plan, folder)
            work += [_Job(t, folder.run(t.name), stopped_at=at) for t, at in search.known()]
            _propose(search, work)
        write_text_atomic(folder.path / "sweep.yaml", plan.to_yaml())
        stack.callback(save)
        if any(job.state == "waiting" for job in work):
            started = workers() if workers else LAUNCHERS[launcher](jobs, share)
            if workers is None:
                stack.callback(started.close)
            total = plan.search.trials if plan.search else len(work)
            display = _Display(console, work, span or Span(0, total))
            _run(work, started, display, save, search)
    return folder


def check_launcher(jobs: int | None, launcher: str) -> None:
    """Raises: UserError for wrong values of --jobs and --launcher."""
    problems = []
    if jobs is not None and jobs < 1:
        problems.append(f"--jobs: must be at least 1, got {jobs}.")
    if launcher not in LAUNCHERS:
        problems.append(f"--launcher: must be {' or '.join(LAUNCHERS)}, got {launcher!r}.")
    if problems:
        raise UserError(problems)


def _shortened(plan: Sweep, folder: SweepFolder, launcher: str, console: Console) -> Sweep:
    """The sweep with the steps that its hours allow, by the measured pace of one short run.

    Raises: UserError if that run fails or the hours allow too few steps.
    """
    job = _Job(probe_trial(plan), RunFolder(folder.path / PROBE))
    _check_folders([job])
    with lock_folder(folder.path), closing(LAUNCHERS[launcher](1, False)) as workers:
        if not job.finished:
            _run([job], workers, _Display(console, [job], Span(0, 1)), lambda: None, None)
    if job.state != "done":
        rule = f"{PROBE}: must finish before the sweep starts, got {job.reason}"
        raise UserError([f"{rule}. {job.run.path / LOG} has the whole error."])
    shortened, text = within_budget(plan, job.run)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return shortened


def _check_folders(work: Sequence[_Job]) -> None:
    """Raises: RecipeError if the folder of a trial has another recipe."""
    problems = []
    for job in work:
        if saved := other_recipe(job.run, job.trial.recipe):
            rule = "--out: must be a new folder or one of the same recipe"
            problems.append(f"{rule}, got another in {saved}. Choose another folder.")
    if problems:
        raise RecipeError(problems)


def _run(
    work: list[_Job], workers: Launcher, display: _Display, save: Callable[[], None],
    search: Search | None,
) -> None:  # fmt: skip
    """Start trials and record their ends until none is left or a signal arrives."""
    stopping = False
    try:
        with defer_signals(display.console) as interrupt, display:
            while True:
                if interrupt.received and not stopping:
                    stopping = True
                    workers.stop()
                started = []
                while not stopping and len(_running(work)) < workers.jobs:
                    if search:
                        _propose(search, work)
                    if not (job := _next(work)):
                        break
                    _start(job, work)
                    workers.start(job.run.path)
                    started.append(job)
                display.update(started)
                if not _running(work):
                    break
                ended = _wait(work, workers, stopping)
                if search:
                    _learn(search, work, ended, workers)
                display.update(ended)
                if started or ended:
                    save()
    finally:  # A second signal does not wait for the trials.
        for job in _running(work):
            job.end(None, stopping=True)
    if any(job.state in ("waiting", "interrupted") for job in work):
        raise KeyboardInterrupt


def _wait(work: Sequence[_Job], workers: Launcher, stopping: bool) -> list[_Job]:
    """Wait a short time for trials to end; returns the ended ones with their states."""
    running = {job.run.path: job for job in _running(work)}
    ended = []
    for path, reason in workers.wait(_POLL_SECONDS):
        running[path].end(reason, stopping)
        ended.append(running[path])
    return ended


def _propose(search: Search, work: list[_Job]) -> None:
    """Add the next trial of a search, unless one is waiting; one that is done is a result."""
    while not any(job.state == "waiting" for job in work) and (trial := search.propose()):
        work.append(_Job(trial, search.folder.run(trial.name)))
        _check_folders(work[-1:])
        if work[-1].state == "done":
            search.finish(trial, work[-1].run)


def _learn(search: Search, work: Sequence[_Job], ended: Sequence[_Job], workers: Launcher) -> None:
    """Take up results, and interrupt the trials that the search stops."""
    for job in ended:
        if job.state in ("done", "failed"):
            search.finish(job.trial, job.run)
    for job in _running(work):
        if job.stopped_at is None and (step := search.observe(job.trial, job.run)):
            job.stopped_at = step
            workers.interrupt(job.run.path)


def _running(work: Sequence[_Job]) -> list[_Job]:
    return [job for job in work if job.state == "running"]


def _next(work: Sequence[_Job]) -> _Job | None:
    """The next trial to start, or None; not one whose base is being evaluated by another trial.

    The first seed of every point comes before the second, so that all points have results early;
    among those of a seed, the trials of a model come one after another, so that they can share it.
    """
    evaluated = {job.base for job in work if job.has_base}
    busy = {job.base for job in _running(work)} - evaluated
    ready = [job for job in work if job.state == "waiting" and job.base not in busy]
    models = list(dict.fromkeys(job.trial.recipe.policy.model for job in work))
    return min(
        ready, default=None,
        key=lambda job: (job.trial.recipe.seed, models.index(job.trial.recipe.policy.model)),
    )  # fmt: skip


def _start(job: _Job, work: Sequence[_Job]) -> None:
    """Create the run's folder, with the base evaluation of another trial if there is one."""
    if not (job.run.path / "recipe.yaml").exists():
        job.run.create(job.trial.recipe.to_yaml())
    donor = next((other for other in work if other.has_base and other.base == job.base), None)
    if donor and not job.has_base:
        files = [KL_SET, BASE_EVALUATION]
        copy_base_files(job.base_run, job.base_recipe, donor.base_run, files)
    job.state = "running"


class _Display:
    """A live table on a terminal; elsewhere a line for each start and end of a trial."""

    def __init__(self, console: Console, work: Sequence[_Job], span: Span) -> None:
        self.console, self._work, self._span = console, work, span
        self._progress = ProgressDisplay(console, "trial", span.total, self._ended())

    def __enter__(self) -> _Display:
        self._progress.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.__exit__()

    def update(self, changed: Sequence[_Job]) -> None:
        """Print the trials that have changed, and show the state of all."""
        ended = self._ended()
        for job in changed:
            log = f" ({job.run.path / LOG})" if job.state in ("running", "failed") else ""
            why = f": {job.reason}" if job.reason else ""
            how = job.reason if job.state == "stopped" else f"{job.state}{why}"
            if why or not self._progress.is_live:
                text = f"[{ended}/{self._span.total}] {job.trial.name} {how}{log}"
                self._progress.print(text + self._progress.time_left(ended))
        if self._progress.is_live:
            room = max(1, self.console.height - 6)  # The table's frame and the bar.
            self._progress.update(ended, panel=_state_table(self._work, self.console.width, room))

    def _ended(self) -> int:
        return self._span.before + sum(job.state in _ENDED for job in self._work)


_ENDED: tuple[State, ...] = ("failed", "stopped", "done")
_ORDER: tuple[State, ...] = ("running", "interrupted", *_ENDED, "waiting")


def _state_table(work: Sequence[_Job], width: int, rows: int) -> RichTable:
    """Trials with their state, last step, its rewards, and the trained policy's first figure.

    The running ones come first, and at most `rows` are shown.
    """
    states = Counter(job.state for job in work)
    title = ", ".join(f"{states[s]} {s}" for s in _ORDER if states[s])
    table = RichTable(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title)
    shown = sorted(work, key=lambda job: _ORDER.index(job.state))[:rows]
    cells = [(job.trial.name, job.state, *_progress_cells(job, width >= 90)) for job in shown]
    names = ("trial", "state", "step", "reward", "result")
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    # A long name of a trial is cut; everything else is whole.
    widths[0] = min(widths[0], max(9, width - sum(widths[1:]) - 2 * len(names) - 2))
    for name, column in zip(names, widths, strict=True):
        table.add_column(name, no_wrap=True, overflow="ellipsis", width=column)
    for row in cells:
        table.add_row(*map(Text, row))
    return table


def _progress_cells(job: _Job, all_sources: bool) -> tuple[str, str, str]:
    """Step, rewards and first result of a trial; empty if its files are damaged."""
    try:
        last = (job.run.metrics() or [{}])[-1]
        trained = job.run.summary()["trained"] if job.state == "done" else {}
    except UserError:
        return "", "", ""
    by_source = sorted(last.get("reward", {}).items(), key=lambda item: item[0] != "self")
    rewards = " ".join(f"{source} {r:.2f}" for source, r in by_source[: None if all_sources else 1])
    score = " ".join(f"{name} {value:.3f}" for name, value in list(trained.items())[:1])
    return f"{last.get('step', 0)}/{job.trial.recipe.steps or '?'}", rewards, score
