"""Sweeps: every trial an ordinary run, what they share done once, failures told, not hidden."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table as RichTable

from gft_lite.experiments.launchers import LAUNCHERS, LOG, Launcher
from gft_lite.experiments.sweep_config import Sweep, Trial, as_text
from gft_lite.recipe.schema import Recipe
from gft_lite.runs.base_cache import BASE_EVALUATION, KL_SET, base_inputs, copy_base_files
from gft_lite.runs.folder import RunFolder, stage_folder
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.files import lock_folder, write_text_atomic
from gft_lite.utils.signals import defer_signals
from gft_lite.utils.statistics import t_interval
from gft_lite.utils.tables import Table, csv_text, flatten, import_pandas

__all__ = ["Sweep", "SweepFolder", "sweep"]

_TICK = 0.5  # seconds between two looks at the trials


class SweepFolder:
    """The files of a sweep; reading never needs a model."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def run(self, name: str) -> RunFolder:
        """The run of a trial."""
        return RunFolder(self.path / "trials" / name)

    def results(self) -> dict[str, Any]:
        """`trials`, one by one, and `settings`, the figures of each over its seeds."""
        return json.loads((self.path / "results.json").read_text(encoding="utf-8"))

    def frame(self) -> Any:
        """One line for each trial, as a pandas DataFrame."""
        return import_pandas().read_csv(self.path / "results.csv")


@dataclass
class _Job:
    """A trial while the sweep runs: waiting, running, done, failed or interrupted."""

    trial: Trial
    run: RunFolder
    state: str = "waiting"
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
        if self.finished:
            self.state = "done"

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return (self.run.path / "summary.json").exists()

    @property
    def has_base(self) -> bool:
        """Whether the base is evaluated."""
        return (self.base_run.path / BASE_EVALUATION).exists()

    def end(self, reason: str | None, stopping: bool) -> None:
        """Note how it ended."""
        self.state = "done" if self.finished else "interrupted" if stopping else "failed"
        self.reason = reason if self.state == "failed" else None


def sweep(
    plan: Sweep, out: str | Path | None = None, *, jobs: int | None = None,
    launcher: str = "local", console: Console | None = None,
) -> SweepFolder:  # fmt: skip
    """Run every trial that is not done yet, `jobs` at a time, and return the sweep's folder.

    What another trial has computed of the same base is copied. Failed trials are tried again by
    the next sweep in the same folder, and interrupted ones go on.

    Raises: RecipeError for a wrong sweep or folder; KeyboardInterrupt once all trials stopped.
    """
    console = console or Console(stderr=True)
    folder = SweepFolder(out if out is not None else Path("runs") / "sweeps" / plan.name)
    work = [_Job(trial, folder.run(trial.name)) for trial in plan.trials()]
    _check(work, jobs, launcher)
    with ExitStack() as stack:
        stack.enter_context(lock_folder(folder.path))
        write_text_atomic(folder.path / "sweep.yaml", plan.to_yaml())
        stack.callback(_write_results, folder, plan, work)
        if any(job.state == "waiting" for job in work):
            workers = LAUNCHERS[launcher](jobs)
            stack.callback(workers.close)
            _run(work, workers, console, lambda: _write_results(folder, plan, work))
    return folder


def _check(work: Sequence[_Job], jobs: int | None, launcher: str) -> None:
    problems = []
    if jobs is not None and jobs < 1:
        problems.append(f"--jobs: must be at least 1, got {jobs}.")
    if launcher not in LAUNCHERS:
        problems.append(f"--launcher: must be {' or '.join(LAUNCHERS)}, got {launcher!r}.")
    for job in work:
        saved = job.run.path / "recipe.yaml"
        if saved.exists() and Recipe.load(saved) != job.trial.recipe:
            rule = "--out: must be a new folder or one of the same recipe"
            problems.append(f"{rule}, got another in {saved}. Choose another folder.")
    if problems:
        raise RecipeError(problems)


def _run(
    work: Sequence[_Job], workers: Launcher, console: Console, save: Callable[[], None]
) -> None:
    """Start trials and note how they end, until all have or somebody asks to stop."""
    by_folder = {job.run.path: job for job in work}
    stopping = False
    try:
        with defer_signals(console) as interrupt, _Screen(console, work) as screen:
            while True:
                if interrupt.received and not stopping:
                    stopping = True
                    workers.stop()
                changed = []
                while not stopping and len(_running(work)) < workers.jobs and (job := _next(work)):
                    _begin(job, work)
                    workers.start(job.run.path)
                    changed.append(job)
                screen.tell(changed)
                if not _running(work):
                    break
                ended = workers.ended(_TICK)
                for path, reason in ended:
                    by_folder[path].end(reason, stopping)
                screen.tell([by_folder[path] for path, _ in ended])
                if changed or ended:
                    save()
    finally:  # Whoever asks twice does not wait for the trials.
        for job in _running(work):
            job.end(None, stopping=True)
    if any(job.state in ("waiting", "interrupted") for job in work):
        raise KeyboardInterrupt


def _running(work: Sequence[_Job]) -> list[_Job]:
    return [job for job in work if job.state == "running"]


def _next(work: Sequence[_Job]) -> _Job | None:
    """A trial to start: none whose base another one is evaluating just now.

    The first seed of every point comes before the second: the whole picture soon.
    """
    evaluated = {job.base for job in work if job.has_base}
    busy = {job.base for job in _running(work)} - evaluated
    ready = [job for job in work if job.state == "waiting" and job.base not in busy]
    return min(ready, key=lambda job: job.trial.recipe.seed, default=None)


def _begin(job: _Job, work: Sequence[_Job]) -> None:
    """Make the run's folder, with what another trial has computed of the same base."""
    if not (job.run.path / "recipe.yaml").exists():
        job.run.create(job.trial.recipe.to_yaml())
    donor = next((other for other in work if other.has_base and other.base == job.base), None)
    if donor and not job.has_base:
        copy_base_files(job.base_run, job.base_recipe, donor.base_run, [KL_SET, BASE_EVALUATION])
    job.state = "running"


# --- results ---------------------------------------------------------------------------------


def _write_results(folder: SweepFolder, plan: Sweep, work: Sequence[_Job]) -> None:
    """results.json and results.csv, complete or not at all."""
    trials = [_result(job) for job in work]
    results = {
        "name": plan.name,
        "grid": plan.model_dump(mode="json")["grid"],
        "interval": "95%, Student's t over seeds",
        "settings": _by_settings(trials),
        "trials": trials,
    }
    write_text_atomic(folder.path / "results.json", json.dumps(results, indent=1))
    write_text_atomic(folder.path / "results.csv", csv_text([_line(trial) for trial in trials]))


def _line(trial: Mapping[str, Any]) -> dict[str, Any]:
    """A trial as a line of the CSV."""
    own = {key: trial[key] for key in ("name", "state", "reason", "seed", "rectified")}
    settings = {field: as_text(value) for field, value in trial["settings"].items()}
    return {**own, **settings, **{k: v for k, v in flatten(trial["summary"] or {}).items()
                                  if k not in own}}  # fmt: skip


def _result(job: _Job) -> dict[str, Any]:
    shares = [m["rectified"] for m in job.run.metrics() if m.get("rectified") is not None]
    return {
        "name": job.trial.name,
        "settings": job.trial.settings,
        "seed": job.trial.recipe.seed,
        "state": job.state,
        "reason": job.reason,
        "folder": f"trials/{job.trial.name}",
        "rectified": fmean(shares) if shares else None,
        "summary": job.run.summary() if job.state == "done" else None,
    }


def _by_settings(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean and interval of each figure over the seeds that are done, by settings."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        groups.setdefault(json.dumps(trial["settings"]), []).append(trial)
    found = []
    for same in groups.values():
        done = [trial for trial in same if trial["state"] == "done"]
        values = [{**t["summary"]["trained"], "rectified": t["rectified"]} for t in done]
        names = dict.fromkeys(name for each in values for name in each)
        found.append({
            "settings": same[0]["settings"],
            "done": len(done),
            "failed": sum(trial["state"] == "failed" for trial in same),
            "figures": {
                name: _spread([v for each in values if (v := each.get(name)) is not None])
                for name in names
            },
        })  # fmt: skip
    return found


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    low, high = t_interval(values) if len(values) > 1 else (None, None)
    return {"mean": fmean(values) if values else None, "low": low, "high": high}


def table(results: Mapping[str, Any]) -> Table:
    """Settings down, figures across: means over seeds, and how far their intervals reach."""
    rows = results["settings"]
    fields = list(dict.fromkeys(name for row in rows for name in row["settings"]))
    figures = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    cells = [
        (*(as_text(row["settings"][f]) for f in fields), str(row["done"]), str(row["failed"]),
         *(_cell(row["figures"].get(name)) for name in figures))
        for row in rows
    ]  # fmt: skip
    title = f"{results['name']}: means over seeds (interval: {results['interval']})"
    return Table(title, (*fields, "done", "failed", *figures), tuple(cells), labels=len(fields))


def _cell(figure: Mapping[str, float | None] | None) -> str:
    if figure is None or figure["mean"] is None:
        return "-"
    spread = "" if figure["high"] is None else f" ±{figure['high'] - figure['mean']:.3f}"
    return f"{figure['mean']:.3f}{spread}"


class _Screen:
    """A live table on a terminal; a line for each start and end where there is none."""

    def __init__(self, console: Console, work: Sequence[_Job]) -> None:
        self._console = console
        self._work = work
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> _Screen:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def tell(self, changed: Sequence[_Job]) -> None:
        """Say which trials have started or ended, and how far the others are."""
        ended = sum(job.state in ("done", "failed") for job in self._work)
        for job in changed:
            why = f": {job.reason} ({job.run.path / LOG})" if job.reason else ""
            if why or not self._console.is_terminal:
                line = f"[{ended}/{len(self._work)}] {job.trial.name} {job.state}{why}"
                self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        if self._console.is_terminal:
            self._live.update(_progress(self._work), refresh=True)


_ORDER = ("running", "failed", "interrupted", "done", "waiting")


def _progress(work: Sequence[_Job]) -> RichTable:
    """Trials with their state, last step, its rewards, and the trained policy's pass@1."""
    states = Counter(job.state for job in work)
    shown = RichTable(title=", ".join(f"{states[s]} {s}" for s in _ORDER if states[s]))
    for name in ("trial", "state", "step", "reward", "pass@1"):
        shown.add_column(name)
    for job in sorted(work, key=lambda job: _ORDER.index(job.state)):
        last = (job.run.metrics() or [{}])[-1]
        rewards = " ".join(f"{source} {r:.2f}" for source, r in last.get("reward", {}).items())
        trained = job.run.summary()["trained"] if job.state == "done" else {}
        step = f"{last.get('step', 0)}/{job.trial.recipe.steps or '?'}"
        score = f"{trained['pass@1']:.3f}" if "pass@1" in trained else ""
        shown.add_row(job.trial.name, job.state, step, rewards, score)
    return shown
