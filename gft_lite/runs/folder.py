"""The files of a run: recipe.yaml, metrics, groups/, tokens/, eval/, data.json, summary.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

from gft_lite.recipe.effects import Affects, differences, values_affecting
from gft_lite.recipe.method_parameters import complete_objective
from gft_lite.recipe.schema import Recipe
from gft_lite.runs.folder_forms import (
    Evaluation,
    check_steps,
    parse_complete_metrics,
    parse_evaluation,
    parse_fingerprints,
    parse_group,
    parse_step_evaluation,
    parse_step_metrics,
    parse_summary,
    parse_tokens,
    response_record,
)
from gft_lite.types import ScoredGroup
from gft_lite.utils.distributed import Distributed
from gft_lite.utils.errors import RecipeError, UserError, short_repr
from gft_lite.utils.files import (
    LOCK,
    atomic_write,
    check_output_path,
    lock_folder,
    read_json,
    write_text_atomic,
)
from gft_lite.utils.jsonl import JsonlFile
from gft_lite.utils.tables import import_pandas

DATA_IDENTITY = "data.json"
_RESTORE = "Restore the file from a copy, or train the run again."


class RunFolder:
    """The files of one run; reading them does not need a model."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.scratch = self.path / "engine"
        self.bad_steps = self.path / "bad_steps"
        self._metrics = JsonlFile(
            self.path / "metrics.jsonl",
            parse_step_metrics,
            "must be the metrics of one step",
            _RESTORE,
        )

    def create(self, recipe: str) -> None:
        """Make the folder and write the resolved recipe to it."""
        write_text_atomic(self.path / "recipe.yaml", recipe)

    def lock(self) -> AbstractContextManager[None]:
        """Lock the folder. Raises: RecipeError if another process has locked it."""
        return lock_folder(self.path)

    def is_started(self) -> bool:
        """True if the folder holds more than a start leaves that ended before recipe.yaml."""
        files = self.path.iterdir() if os.path.isdir(self.path) else ()
        return any(p.name != LOCK and p.suffix != ".tmp" for p in files)

    # --- metrics ---------------------------------------------------------------------------

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Append the metrics of a step."""
        self._metrics.append([metrics])

    def metrics(self) -> list[dict[str, Any]]:
        """The metrics of all steps in order, with `stage` in those of a run with stages.

        Raises: UserError for a line that is damaged or missing.
        """
        found = list(self._metrics)
        check_steps(self._metrics.path, found, _RESTORE)
        if (self.path / "summary.json").exists():
            steps = self.summary().get("steps", len(found))
            if len(found) != steps:
                rule = f"must have a line for each of the run's {steps} steps"
                raise UserError([f"{self._metrics.path}: {rule}, got {len(found)}. {_RESTORE}"])
        return found

    def frame(self) -> Any:
        """A pandas DataFrame with a row per step; nested names are joined by "/": `reward/self`."""
        return import_pandas().json_normalize(self.metrics(), sep="/")

    def truncate_after(self, step: int) -> None:
        """Remove what later steps than `step` have written, before they are run again.

        Raises: UserError unless metrics.jsonl holds the metrics of all steps up to `step`.
        """
        advice = (
            f"Restore the file from a copy, or remove the folders in {self.checkpoints} from the "
            "first missing step on: --resume then continues before it."
        )
        file = self._metrics.path
        lines = JsonlFile(file, parse_complete_metrics, "must be the metrics of one step", advice)
        kept = list(islice(lines, step))
        check_steps(file, kept, advice)
        if len(kept) < step:
            rule = f"must have the metrics of the {step} steps before the checkpoint"
            raise UserError([f"{file}: {rule}, got {len(kept)}. {advice}"])
        if len(self._metrics) > step:
            (self.path / "summary.json").unlink(missing_ok=True)  # The run is not finished now.
        self._metrics.keep_first(step)
        for name, file_of in (("groups", self._groups_file), ("tokens", self._tokens_file)):
            for later in self._steps_of(name):
                if later > step:
                    file_of(later).unlink()

    # --- groups ----------------------------------------------------------------------------

    def group_steps(self) -> list[int]:
        """The steps whose groups were written, in order."""
        return self._steps_of("groups")

    def _steps_of(self, name: str) -> list[int]:
        files = self.path.glob(f"{name}/step-*.json*")
        steps = (file.stem.removeprefix("step-") for file in files if file.suffix != ".tmp")
        return sorted(int(step) for step in steps if step.isdecimal())

    def groups(self, step: int, expected: int | None = None) -> list[dict[str, Any]]:
        """The groups of a step, each with its responses, rewards and advantages.

        `expected` is their number, which the step's metrics have under `groups`.
        Raises: UserError for a line that is damaged or missing.
        """
        file = self._groups_file(step)
        advice = "Restore the file from a copy, or remove it."
        found = list(JsonlFile(file, parse_group, "must be a group with its responses", advice))
        if expected is not None and file.exists() and len(found) != expected:
            rule = f"must have a line for each of the step's {expected} groups"
            raise UserError([f"{file}: {rule}, got {len(found)}. {advice}"])
        return found

    def write_groups(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        """Write every response of a step with source, reward and advantage."""
        self._write_groups(self._groups_file(step), groups)

    def write_tokens(self, step: int, record: Mapping[str, Any]) -> None:
        """Write the token ledger of a step (`log.tokens`)."""
        write_text_atomic(self._tokens_file(step), json.dumps(record, separators=(",", ":")))

    def token_steps(self) -> list[int]:
        """The steps with a token ledger, in order."""
        return self._steps_of("tokens")

    def tokens(self, step: int) -> dict[str, Any] | None:
        """The token ledger of a step, None if it was not written.

        Raises: UserError if the file is damaged.
        """
        file, rule = self._tokens_file(step), "must be the token ledger of a step"
        if not file.exists():
            return None
        return read_json(file, parse_tokens, rule, "Restore the file from a copy, or remove it.")

    def save_bad_step(self, step: int, groups: Sequence[ScoredGroup]) -> Path:
        """Write the groups of a step whose loss or gradient was not finite."""
        file = self.bad_steps / f"step-{step:06d}.jsonl"
        self._write_groups(file, groups)
        return file

    def _groups_file(self, step: int) -> Path:
        return self.path / "groups" / f"step-{step:06d}.jsonl"

    def _tokens_file(self, step: int) -> Path:
        return self.path / "tokens" / f"step-{step:06d}.json"

    def _write_groups(self, file: Path, groups: Sequence[ScoredGroup]) -> None:
        with atomic_write(file) as partial, partial.open("w", encoding="utf-8") as out:
            for scored in groups:
                problem = scored.group.problem.to_json()
                responses = [response_record(r, a) for r, a in scored]
                out.write(json.dumps({"problem": problem, "responses": responses}) + "\n")

    # --- single values ---------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """The final results. Raises: UserError if the file is damaged."""
        rule = "must be the summary of a finished run"
        return read_json(self.path / "summary.json", parse_summary, rule, _RESTORE)

    def evaluation(self, name: str) -> Evaluation:
        """The results of "base" or "trained" on each set; empty if there are none yet.

        Raises: UserError if the file is damaged.
        """
        file = self.path / "eval" / f"{name}.json"
        if not file.exists():
            return {}
        return read_json(file, parse_evaluation, "must have the results of each set", _RESTORE)

    def step_evaluations(self, last: int | None = None) -> dict[int, Evaluation]:
        """The results by step of the evaluations while training, up to step `last`; 0 is the base.

        Raises: UserError if a file is damaged.
        """
        steps = [step for step in self._steps_of("eval") if last is None or step <= last]
        return {step: self.step_evaluation(step)["sets"] for step in steps}

    def step_evaluation(self, step: int) -> dict[str, Any]:
        """The results of a step as `sets`, and as `adapter` a hash of what was evaluated.

        Raises: UserError if the file is damaged.
        """
        rule = "must have the results of each set at a step"
        return read_json(self.step_evaluation_file(step), parse_step_evaluation, rule, _RESTORE)

    def step_evaluation_file(self, step: int) -> Path:
        """The file of the evaluation after a step."""
        return self.path / "eval" / f"step-{step:06d}.json"

    def write_json(self, name: str | Path, value: Any) -> None:
        """Write a JSON file in the folder atomically."""
        write_text_atomic(self.path / name, json.dumps(value, indent=1))

    def check_data(self, fingerprints: Mapping[str, str]) -> None:
        """Compare the data with those of the run's first start, where they are recorded.

        `fingerprints` maps fields such as `data` and `eval.sets.test` to hashes of their problems.
        Raises: UserError that names every field whose data have changed.
        """
        file = self.path / DATA_IDENTITY
        if not file.exists():
            return self.write_json(DATA_IDENTITY, dict(fingerprints))
        advice = "Remove the file to accept the data as they are now."
        recorded = read_json(
            file, parse_fingerprints, "must have a fingerprint of each source", advice
        )
        changed = [f"{name}: must be the data that the run was started with ({file}), got others. "
                   "Restore them, or start a new run with another --out."
                   for name, _, _ in differences(recorded, fingerprints)]  # fmt: skip
        if changed:
            raise UserError(changed)
        return None


class WorkerRunFolder(RunFolder):
    """The run's folder in a process other than the main one, which writes only engine files."""

    def __init__(self, path: str | Path, rank: int) -> None:
        super().__init__(path)
        self.scratch = self.path / f"engine-{rank}"

    def lock(self) -> AbstractContextManager[None]:
        """No lock: the main process holds it."""
        return nullcontext()

    def _write_nothing(self, *_: Any, **__: Any) -> None:
        pass

    create = write_json = append_metrics = truncate_after = check_data = _write_nothing
    _write_groups = write_tokens = _write_nothing


def presampled_recipe(folder: str | Path, field: str) -> Path:
    """The recipe by which a folder of groups was sampled. Raises: RecipeError if it has none."""
    file = Path(folder) / "recipe.yaml"
    if not os.path.isfile(file):
        raise RecipeError(
            [f"{field}: must be a folder that gft-lite groups filled, got {str(folder)!r}. "
             f"Fill it: gft-lite groups RECIPE --out {folder}"]
        )  # fmt: skip
    return file


# --- finding a run's folder ------------------------------------------------------------------


def find_folder(
    recipe: Recipe, out: str | Path | None, *, resume: bool, distributed: Distributed
) -> RunFolder:
    """The run's folder, `runs/NAME` with a number if needed by default; it is not created yet.

    Raises: UserError if `out` cannot be written to or holds another run.
    """
    path = distributed.broadcast_from_main(lambda: _find_path(recipe, out, resume))
    return RunFolder(path) if distributed.is_main else WorkerRunFolder(path, distributed.rank)


def _find_path(recipe: Recipe, out: str | Path | None, resume: bool) -> Path:
    path = choose_folder(recipe.name, out, resume=resume)
    if os.path.isfile(path / "recipe.yaml"):
        _check_own_recipe(recipe, path / "recipe.yaml")
    if path.is_dir():
        with lock_folder(path):  # Fails before a model is loaded.
            pass
    return path


def choose_folder(name: str, out: str | Path | None, *, resume: bool) -> Path:
    """The path of the folder of the run `name`, which is new, or has a run if `resume`.

    Raises: UserError if `out` cannot be written to, holds a run, or none to resume.
    """
    default = Path("runs") / name
    if not resume:
        check_output_path(default if out is None else out)
    path = Path(out) if out is not None else _default_folder(default, resume)
    saved = path / "recipe.yaml"
    has_recipe, started = os.path.isfile(saved), RunFolder(path).is_started()
    if not resume and started:
        raise RecipeError(
            [f"--out: must be a new or empty folder, got {str(path)!r}. "
             "Choose another, or continue the run in it with --resume."]
        )  # fmt: skip
    # A start that was killed before it wrote its recipe leaves a folder to begin in.
    if resume and not has_recipe and (started or not os.path.isdir(path)):
        raise RecipeError(
            [f"--resume: must find a run to continue, got {short_repr(str(path))}. "
             "Check --out, or start the run without --resume."]
        )  # fmt: skip
    if resume:
        check_output_path(path)
    return path


def _check_own_recipe(recipe: Recipe, saved: Path) -> None:
    """Check that the recipe differs from the run's own only in fields without effect on results.

    Raises: RecipeError with every other field that differs.
    """
    theirs = Recipe.load(saved)
    if theirs.method == recipe.method:  # Its module has been checked for trust.
        theirs = complete_objective(theirs)
    old, new = (values_affecting(r, Affects.RUN) for r in (theirs, recipe))
    differing = [f"{name} ({short_repr(a)}, now {short_repr(b)})"
                 for name, a, b in differences(old, new)]  # fmt: skip
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise RecipeError(
            [f"--resume: must be given the run's own recipe, but {saved} differs in "
             f"{', '.join(differing[:3])}{more}. "
             f"Continue with: gft-lite train {saved} --out {saved.parent} --resume"]
        )  # fmt: skip


def _default_folder(path: Path, resume: bool) -> Path:
    """`path`, or the first free `path-2`, `path-3`; when resuming, the newest of them."""
    number, candidate, newest = 1, path, path
    while os.path.lexists(candidate):
        newest = candidate
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return newest if resume else candidate


def stage_folder(recipe: Recipe, run: RunFolder, number: int) -> RunFolder:
    """The folder of a stage, counted from 0, of a run with stages."""
    method = recipe.stages[number].method.replace(":", ".")
    return RunFolder(run.path / "stages" / f"{number + 1}-{method}")
