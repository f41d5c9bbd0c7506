"""The files of an evaluation: responses/, problems/, targets.json and the results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gft_lite.evaluation.examples import Examples
from gft_lite.evaluation.response_cache import ResponseCache
from gft_lite.evaluation.tables import tables, to_csv
from gft_lite.runs.folder_forms import parse_evaluation
from gft_lite.types import Group, Problem
from gft_lite.utils.errors import UserError
from gft_lite.utils.files import atomic_write, read_json, write_text_atomic
from gft_lite.utils.jsonl import JsonlFile

Keys = Sequence[Sequence[str]]
_AGAIN = "Restore the file, or evaluate again without --regrade."


class EvaluationFolder:
    """The files of one evaluation folder, which can hold several evaluations of many models."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def responses(self, model: str, benchmark: str) -> ResponseCache:
        """The responses of a model, given by its identity, to a benchmark."""
        return ResponseCache(self.path / "responses" / model / f"{benchmark}.jsonl")

    def targets(self) -> dict[str, dict[str, Any]]:
        """The last results of every target evaluated in the folder, by label.

        Raises: UserError if the file is damaged.
        """
        file = self.path / "targets.json"
        if not file.exists():
            return {}
        rule = "must have the results of each target"
        return read_json(file, _targets, rule, "Restore the file, or remove it.")

    def write_problems(
        self, model: str, benchmark: str, groups: Sequence[Group], keys: Keys
    ) -> None:
        """Write a line for each problem, with the grades of its responses and their keys."""
        with (
            atomic_write(self._problems_file(model, benchmark)) as partial,
            partial.open("w", encoding="utf-8") as out,
        ):
            for group, names in zip(groups, keys, strict=True):
                line = json.dumps({**_problem_line(group), "keys": list(names)}, default=str)
                out.write(line + "\n")

    def read_groups(
        self, model: str, benchmark: str, expected: int
    ) -> tuple[list[Group], list[list[str]]]:
        """The `expected` problems of a benchmark with their stored responses, and the keys.

        Raises: UserError if a file is damaged or does not have all of them.
        """
        file = self._problems_file(model, benchmark)
        rule = "must be a problem with the keys of its responses"
        lines = list(JsonlFile(file, _problem_and_keys, rule, _AGAIN))
        if len(lines) != expected:
            rule = f"must have a line for each of the {expected} problems"
            raise UserError([f"{file}: {rule}, got {len(lines)}. {_AGAIN}"])
        keys = [names for _, names in lines]
        cache = self.responses(model, benchmark)
        if missing := sum(key not in cache for names in keys for key in names):
            rule = "must have the responses of the evaluation"
            raise UserError([f"{cache.path}: {rule}, got {missing} of them missing. {_AGAIN}"])
        return cache.groups([problem for problem, _ in lines], keys), keys

    def write_results(self, results: Mapping[str, Any], examples: Examples) -> None:
        """Write the results as JSON, tables and examples, and add the targets to targets.json."""
        found = tables(results)
        texts = {
            "results.json": json.dumps(results, indent=1),
            "targets.json": json.dumps({**self.targets(), **results["targets"]}, indent=1),
            "results.csv": to_csv(results),
            "results.md": "\n".join(table.markdown() for table in found),
            "results.tex": "\n".join(table.latex() for table in found),
            "examples.md": examples.markdown(),
        }
        for name, text in texts.items():
            write_text_atomic(self.path / name, text)

    def _problems_file(self, model: str, benchmark: str) -> Path:
        return self.path / "problems" / model / f"{benchmark}.jsonl"


def _problem_line(group: Group) -> dict[str, Any]:
    problem = group.problem
    graded = [r.correct for r in group if r.correct is not None]
    return {
        **problem.to_json(),
        "columns": dict(problem.columns),
        "correct": sum(graded) if graded else None,
        "samples": len(group),
        "scores": [r.reward for r in group],
        "verdicts": [r.verdict for r in group],
    }


def _problem_and_keys(line: dict[str, Any]) -> tuple[Problem, list[str]]:
    problem = replace(Problem.from_json(line), columns=dict(line["columns"]))
    return problem, [str(key) for key in line["keys"]]


def _targets(value: Any) -> dict[str, dict[str, Any]]:
    kinds = {"identity": str, "adapter": str | None, "data": dict, "sampling": dict, "drift": dict}
    for entry in value.values():
        for key, kind in kinds.items():
            if not isinstance(entry[key], kind):
                raise TypeError(key)
        parse_evaluation(entry["benchmarks"])
    return value
