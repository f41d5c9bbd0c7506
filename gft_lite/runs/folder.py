"""What a run leaves behind and shows: metrics.jsonl, groups/, summary.json, the console."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from gft_lite.recipe.schema import Recipe
from gft_lite.types import Group, Response
from gft_lite.utils.distributed import Distributed
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.files import LOCK, complete_lines, fsync, lock_folder, write_text_atomic
from gft_lite.utils.tables import import_pandas


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
        write_text_atomic(self.path / "recipe.yaml", recipe)

    def lock(self) -> AbstractContextManager[None]:
        """Keep other runs out. Raises: RecipeError while another process is at work there."""
        return lock_folder(self.path)

    def begun(self) -> bool:
        """Whether there is more than what a start leaves that died before it had a recipe."""
        left = self.path.iterdir() if self.path.is_dir() else ()
        return any(p.name != LOCK and p.suffix != ".tmp" for p in left)

    def metrics(self) -> list[dict[str, Any]]:
        """One dict a step, in order."""
        return [json.loads(line) for line in complete_lines(self.path / "metrics.jsonl")]

    def frame(self) -> Any:
        """One line a step as a pandas DataFrame, nested names joined by "/": `reward/self`."""
        return import_pandas().json_normalize(self.metrics(), sep="/")

    def group_steps(self) -> list[int]:
        """The steps whose groups were kept, in order."""
        files = (self.path / "groups").glob("step-*.jsonl")
        return sorted(int(file.stem.removeprefix("step-")) for file in files)

    def groups(self, step: int) -> list[dict[str, Any]]:
        """The groups of a step, each with its responses, rewards and advantages."""
        return [json.loads(line) for line in complete_lines(self._groups_file(step))]

    def summary(self) -> dict[str, Any]:
        """The final figures."""
        return json.loads((self.path / "summary.json").read_text(encoding="utf-8"))

    def write_json(self, name: str, value: Any) -> None:
        """Write `name` in the run's folder, complete or not at all."""
        write_text_atomic(self.path / name, json.dumps(value, indent=1))

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Add a step to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        fsync(self.path / "metrics.jsonl")

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

    def truncate_after(self, step: int) -> None:
        """Drop what steps after `step` wrote, before they are run again."""
        kept = [m for m in self.metrics() if m["step"] <= step]
        text = "".join(json.dumps(m) + "\n" for m in kept)
        write_text_atomic(self.path / "metrics.jsonl", text)
        for later in self.group_steps():
            if later > step:
                self._groups_file(later).unlink()

    def _groups_file(self, step: int) -> Path:
        return self.path / "groups" / f"step-{step:06d}.jsonl"

    def _write_groups(
        self, file: Path, groups: Sequence[Group], advantages: Sequence[Sequence[float]]
    ) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", encoding="utf-8") as out:
            for group, values in zip(groups, advantages, strict=True):
                responses = [_response(r, a) for r, a in zip(group, values, strict=True)]
                problem = {"id": group.problem.id, "text": group.problem.text,
                           "answer": group.problem.answer}  # fmt: skip
                out.write(json.dumps({"problem": problem, "responses": responses}) + "\n")
        fsync(file)


class WorkerRunFolder(RunFolder):
    """A run's folder to a process that helps another one: it writes its engine's files alone."""

    def __init__(self, path: str | Path, rank: int) -> None:
        super().__init__(path)
        self.scratch = self.path / f"engine-{rank}"

    def lock(self) -> AbstractContextManager[None]:
        """Nothing: the process that it helps has the folder."""
        return nullcontext()

    def _write_nothing(self, *_: Any, **__: Any) -> None:
        pass

    create = write_json = append_metrics = truncate_after = _write_groups = _write_nothing


def _response(response: Response, advantage: float) -> dict[str, Any]:
    """What the file keeps; log-probs are left out, which would be most of it."""
    kept = dataclasses.asdict(dataclasses.replace(response, logprobs=None))
    del kept["logprobs"]
    return {**kept, "advantage": advantage}


def find_folder(
    recipe: Recipe, out: str | Path | None, *, resume: bool, distributed: Distributed
) -> RunFolder:
    """The run's folder, not made yet; `runs/NAME`, numbered, by default.

    Raises: RecipeError if `out` holds another run, or none that this recipe can resume.
    """
    path = distributed.broadcast_from_main(lambda: _find_path(recipe, out, resume))
    return RunFolder(path) if distributed.is_main else WorkerRunFolder(path, distributed.rank)


def _find_path(recipe: Recipe, out: str | Path | None, resume: bool) -> Path:
    path = Path(out) if out is not None else _default_folder(Path("runs") / recipe.name, resume)
    saved = path / "recipe.yaml"
    if not resume:
        if path.exists() and (not path.is_dir() or RunFolder(path).begun()):
            raise RecipeError(
                [f"--out: must be a new or empty folder, got {str(path)!r}. "
                 "Choose another, or continue the run in it with --resume."]
            )  # fmt: skip
    elif not saved.is_file():
        raise RecipeError([f"--resume: must find a run to continue, got {str(path)!r}."])
    elif Recipe.load(saved) != recipe:
        raise RecipeError(
            [f"--resume: must be given the run's own recipe, but {saved} differs. "
             f"Continue with: gft-lite train {saved} --out {path} --resume"]
        )  # fmt: skip
    _check_usable(path)
    return path


def _check_usable(path: Path) -> None:
    """Told before a model is loaded, which may be beside that of the run at work there."""
    there = next(p for p in (path, *path.parents) if p.exists())
    if not os.access(there, os.W_OK):
        raise RecipeError(
            [f"--out: must be a folder that can be written to, got {str(path)!r}. "
             f"Make {str(there)!r} writable, or choose another."]
        )  # fmt: skip
    if path.is_dir():
        with lock_folder(path):
            pass


def _default_folder(path: Path, resume: bool) -> Path:
    """`path`, or the first free `path-2`, `path-3`; when resuming, the newest of them."""
    number, candidate, newest = 1, path, path
    while candidate.exists():
        newest = candidate
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return newest if resume else candidate


def stage_folder(recipe: Recipe, run: RunFolder, number: int) -> RunFolder:
    """Where a stage (from 0) of a staged run has its own run."""
    method = recipe.stages[number].method.replace(":", ".")
    return RunFolder(run.path / "stages" / f"{number + 1}-{method}")
