"""What a run leaves behind and shows: metrics.jsonl, groups/, summary.json, the console."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.console import Group as Stack
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gft_lite.recipe_errors import RecipeError
from gft_lite.types import Group, Response

LOCK = ".lock"


class Clock:
    """Wall-clock seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start


class RunFolder:
    """The files of one run; reading never needs a model."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.scratch = self.path / "engine"
        self.bad_steps = self.path / "bad_steps"

    def create(self, recipe: str) -> None:
        """Make the folder and keep the resolved recipe in it."""
        write_whole(self.path / "recipe.yaml", recipe)

    def alone(self) -> AbstractContextManager[None]:
        """Keep other runs out. Raises: RecipeError while another process is at work there."""
        return alone_in(self.path)

    def begun(self) -> bool:
        """Whether there is more than what a start leaves that died before it had a recipe."""
        left = self.path.iterdir() if self.path.is_dir() else ()
        return any(p.name != LOCK and p.suffix != ".tmp" for p in left)

    def metrics(self) -> list[dict[str, Any]]:
        """One dict a step, in order."""
        return [json.loads(line) for line in _lines(self.path / "metrics.jsonl")]

    def frame(self) -> Any:
        """One line a step as a pandas DataFrame, nested names joined by "/": `reward/self`."""
        return need_pandas().json_normalize(self.metrics(), sep="/")

    def group_steps(self) -> list[int]:
        """The steps whose groups were kept, in order."""
        files = (self.path / "groups").glob("step-*.jsonl")
        return sorted(int(file.stem.removeprefix("step-")) for file in files)

    def groups(self, step: int) -> list[dict[str, Any]]:
        """The groups of a step, each with its responses, rewards and advantages."""
        return [json.loads(line) for line in _lines(self._groups_file(step))]

    def summary(self) -> dict[str, Any]:
        """The final figures."""
        return json.loads((self.path / "summary.json").read_text())

    def write_json(self, name: str, value: Any) -> None:
        """Write `name` in the run's folder, complete or not at all."""
        write_whole(self.path / name, json.dumps(value, indent=1))

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Add a step to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        flush(self.path / "metrics.jsonl")

    def write_groups(
        self, step: int, groups: Sequence[Group], advantages: Sequence[Sequence[float]]
    ) -> None:
        """Write every response of a step with source, reward and advantage."""
        self._write_groups(self._groups_file(step), groups, advantages)

    def save_bad_step(
        self, step: int, groups: Sequence[Group], advantages: Sequence[Sequence[float]]
    ) -> Path:
        """Keep the groups of a step whose loss or gradient was not finite."""
        file = self.bad_steps / f"step-{step:06d}.jsonl"
        self._write_groups(file, groups, advantages)
        return file

    def forget_after(self, step: int) -> None:
        """Drop what steps after `step` wrote, before they are run again."""
        kept = [m for m in self.metrics() if m["step"] <= step]
        text = "".join(json.dumps(m) + "\n" for m in kept)
        write_whole(self.path / "metrics.jsonl", text)
        for later in self.group_steps():
            if later > step:
                self._groups_file(later).unlink()

    def _groups_file(self, step: int) -> Path:
        return self.path / "groups" / f"step-{step:06d}.jsonl"

    def _write_groups(
        self, file: Path, groups: Sequence[Group], advantages: Sequence[Sequence[float]]
    ) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w") as out:
            for group, values in zip(groups, advantages, strict=True):
                responses = [_response(r, a) for r, a in zip(group, values, strict=True)]
                problem = {"id": group.problem.id, "text": group.problem.text,
                           "answer": group.problem.answer}  # fmt: skip
                out.write(json.dumps({"problem": problem, "responses": responses}) + "\n")
        flush(file)


class Follower(RunFolder):
    """A run's folder to a process that helps another one: it writes its engine's files alone."""

    def __init__(self, path: str | Path, rank: int) -> None:
        super().__init__(path)
        self.scratch = self.path / f"engine-{rank}"

    def alone(self) -> AbstractContextManager[None]:
        """Nothing: the process that it helps has the folder."""
        return nullcontext()

    def _write_nothing(self, *_: Any, **__: Any) -> None:
        pass

    create = write_json = append_metrics = forget_after = _write_groups = _write_nothing


def _response(response: Response, advantage: float) -> dict[str, Any]:
    """What the file keeps; log-probs are left out, which would be most of it."""
    kept = dataclasses.asdict(dataclasses.replace(response, logprobs=None))
    del kept["logprobs"]
    return {**kept, "advantage": advantage}


def write_whole(path: Path, text: str) -> None:
    """Write a file, complete or not at all."""
    with whole(path) as partial:
        partial.write_text(text)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write what is to be at `path`: it comes there, and onto the disk, when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp")
    yield partial
    flush(partial)
    partial.rename(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Have a file's bytes, or the names in a folder, on the disk before going on."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; the lock goes with the process, however it ends.

    Raises: RecipeError while another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise RecipeError(
                [f"--out: must not be in use by another run, got {str(folder)!r}, in which "
                 f"process {file.read()} is at work. Wait for it, stop it, or choose another."]
            ) from error  # fmt: skip
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def cached(path: Path, compute: Callable[[], Any]) -> Any:
    """The JSON at `path`, computed and written first where it is not there yet."""
    if not path.exists():
        write_whole(path, json.dumps(compute(), indent=1))
    return json.loads(path.read_text())


def need_pandas() -> Any:
    """The module. Raises: ModuleNotFoundError, naming the extra to install."""
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('frame: pip install "gft-lite[notebooks]" first.') from error
    return pandas


def _lines(file: Path) -> list[str]:
    """The complete lines of a file; a write that a kill cut short leaves half of one."""
    return file.read_text().split("\n")[:-1] if file.exists() else []


def group_metrics(groups: Sequence[Group]) -> dict[str, Any]:
    """What the scored groups of a step say: rewards by source and function, shares, lengths."""
    responses = [r for group in groups for r in group]
    own = [r for r in responses if r.source == "self"]
    by_source: dict[str, list[float]] = {}
    parts: dict[str, list[float]] = {}
    for group in groups:
        for response, reward in zip(group, group.rewards, strict=True):
            by_source.setdefault(response.source, []).append(reward)
            for name, value in response.reward_parts.items():
                parts.setdefault(name, []).append(value)
    return {
        "groups": len(groups),
        "trajectories": len(responses),
        "sources": dict(Counter(r.source for r in responses)),
        "reward": {source: _mean(values) for source, values in by_source.items()},
        "reward_parts": {name: _mean(values) for name, values in parts.items()},
        "verdicts": dict(sorted(Counter(r.verdict or "none" for r in responses).items())),
        "flat_groups": _mean([group.flat for group in groups]),
        "truncated": _mean([r.truncated for r in responses]),
        "length": _mean([len(r.token_ids) for r in own]),
        "tokens": sum(len(r.token_ids) for r in responses),
    }


def own_tokens(groups: Sequence[Group]) -> int:
    """The tokens of all self samples."""
    return sum(len(r.token_ids) for group in groups for r in group if r.source == "self")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


class Trackers:
    """TensorBoard, W&B and trackio by name, as accelerate drives them."""

    def __init__(self, names: Sequence[str], run: str, folder: Path, config: Any) -> None:
        self._trackers: list[Any] = []
        if not names:
            return
        from accelerate import Accelerator  # Only a run with trackers pays for it.

        accelerator = Accelerator(log_with=list(names), project_dir=str(folder))
        accelerator.init_trackers(run, config=flatten(config))
        self._trackers = accelerator.trackers

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Send a step's numbers."""
        values = {k: v for k, v in flatten(metrics).items() if isinstance(v, int | float)}
        for tracker in self._trackers:
            tracker.log(values, step=step)

    def close(self) -> None:
        """Flush and finish."""
        for tracker in self._trackers:
            tracker.finish()


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by "/"; lists become text."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}/"))
        else:
            flat[name] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat


class Screen:
    """Live progress on a terminal; a line now and then where there is none."""

    def __init__(self, console: Console, total: int | None, done: int) -> None:
        self.console = console
        self._total = total
        self._every = max(1, (total or 200) // 20)
        self._progress = Progress(
            TextColumn("step"), BarColumn(), MofNCompleteColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self._task = self._progress.add_task("steps", total=total, completed=done)
        self._live = Live(self._progress, console=console, transient=True)
        self._kl: Mapping[str, Any] = {}

    def __enter__(self) -> Screen:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Show a step's metrics, and the last KL until there is a newer one."""
        self._kl = metrics.get("kl", self._kl)
        if self.console.is_terminal:
            self._progress.update(self._task, completed=metrics["step"])
            self._live.update(Stack(_panel({**metrics, "kl": self._kl}), self._progress))
        elif metrics["step"] % self._every == 0 or metrics["step"] == self._total:
            line = "  ".join(f"{name}: {value}" for name, value in _shown(metrics).items())
            step = f"step {metrics['step']}" + (f"/{self._total}" if self._total else "")
            self.console.print(f"{step}  {line}", markup=False, soft_wrap=True)


def _shown(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The figures worth watching, as text."""
    rewards = " ".join(f"{name} {value:.2f}" for name, value in metrics["reward"].items())
    shown = {"reward": rewards, "flat groups": f"{metrics['flat_groups']:.0%}"}
    for name, key, form in (
        ("rectified tokens", "rectified", "{:.0%}"),
        ("loss", "loss", "{:.4f}"),
        ("gradient norm", "grad_norm", "{:.3f}"),
        ("entropy", "entropy", "{:.3f}"),
        ("truncated", "truncated", "{:.0%}"),
        ("skipped", "skipped", "{}"),
    ):
        if metrics.get(key) is not None:
            shown[name] = form.format(metrics[key])
    for where, values in metrics.get("kl", {}).items():
        if values:
            key = "forward" if where == "held_out" else "reverse"
            shown[f"KL {where.replace('_', ' ')}"] = f"{values[key]:.4f}"
    for phase, key in (("rollout", "rollout_tokens"), ("train", "trained_tokens")):
        if metrics[key] and metrics["seconds"].get(phase):
            shown[f"{phase} tokens/s"] = f"{metrics[key] / metrics['seconds'][phase]:,.0f}"
    return shown


def _panel(metrics: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in _shown(metrics).items():
        table.add_row(name, value)
    return table


def results_table(columns: Mapping[str, Mapping[str, float]], title: str = "") -> Table:
    """Figures by name down, models across."""
    table = Table(title=title or None)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for figure in dict.fromkeys(name for values in columns.values() for name in values):
        cells = [_cell(values.get(figure)) for values in columns.values()]
        table.add_row(figure, *cells)
    return table


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
