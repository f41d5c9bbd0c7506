"""The form of the files in a run's folder: checks of what is read, and a response as written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gft_lite.recipe.figures import figure_of, main_figure
from gft_lite.types import Response
from gft_lite.utils.errors import UserError

# The metrics of a step that a resumed run and the summary read, with their types.
_STEP_METRICS = {
    **dict.fromkeys(("step", "trajectories", "updates"), int),
    **dict.fromkeys(("tokens", "rollout_tokens", "trained_tokens"), int),
    **dict.fromkeys(("sources", "seconds"), dict),
    "skipped": str | None,
}
# What the report reads of a response of a group.
_RESPONSE = {"token_ids", "text", "source", "finish_reason", "reward", "advantage"}
# What a token ledger has of each token.
TOKEN_FIGURES = ("logprob", "engine", "base", "coefficient")
Evaluation = dict[str, dict[str, Any]]  # The figures of each set.


def parse_step_metrics(line: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a step. Raises: KeyError or TypeError for another value."""
    if not isinstance(line["step"], int):
        raise TypeError("step: must be an integer")
    return line


def parse_complete_metrics(line: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a step, with all that is added up. Raises: KeyError or TypeError."""
    if not all(isinstance(line[name], kind) for name, kind in _STEP_METRICS.items()):
        raise TypeError(f"{', '.join(_STEP_METRICS)}: must have their types")
    return line


def check_steps(file: Path, metrics: Sequence[Mapping[str, Any]], advice: str) -> None:
    """Check that steps count from 1, in every stage, without a gap. Raises: UserError."""
    expected, stage = 1, None
    for number, line in enumerate(metrics, start=1):
        expected = expected if line.get("stage") == stage else 1
        if line["step"] != expected:
            rule = f"must be the metrics of step {expected}"
            raise UserError(
                [f"{file}:{number}: {rule}, got those of step {line['step']}. {advice}"]
            )
        expected, stage = expected + 1, line.get("stage")


def parse_group(line: dict[str, Any]) -> dict[str, Any]:
    """A group with its responses. Raises: KeyError, TypeError or AttributeError."""
    if not isinstance(line["problem"]["id"], str) or not isinstance(line["responses"], list):
        raise TypeError("problem or responses")
    for response in line["responses"]:
        if missing := _RESPONSE - response.keys():
            raise KeyError(min(missing))
    return line


def parse_tokens(value: Any) -> dict[str, Any]:
    """Raises: KeyError, TypeError or AttributeError for anything but a token ledger."""
    responses = [r for group in value["groups"] for r in group["responses"] if r is not None]
    for response in responses:
        lengths = {len(response[name]) for name in TOKEN_FIGURES} | {len(response["text"])}
        if len(lengths) > 1:
            raise TypeError("figures of other lengths")
    if value["gradients"] is not None:
        _ = value["gradients"]["norms"].items(), value["gradients"]["cosines"].items()
    return value


def parse_summary(value: Any) -> dict[str, Any]:
    """The summary of a run. Raises: KeyError or TypeError for another value."""
    for name in ("trained", "seconds"):
        if not isinstance(value[name], dict):
            raise TypeError(name)
    return value


def parse_fingerprints(value: Any) -> dict[str, str]:
    """Fingerprints by field. Raises: TypeError for another value."""
    if not (isinstance(value, dict) and all(isinstance(v, str) for v in value.values())):
        raise TypeError("not an object of texts")
    return value


def parse_evaluation(value: Any) -> Evaluation:
    """The results of an evaluation by set. Raises: one of `INVALID` for another value."""
    for results in value.values():
        by_problem = results[figure_of(main_figure(results)).values[0]]
        counts = results["problems"], results["samples"]
        if not (all(isinstance(n, int) for n in counts) and isinstance(by_problem, dict)):
            raise TypeError("problems, samples, correct, rewards or nats")
    return value


def parse_step_evaluation(value: Any) -> dict[str, Any]:
    """The evaluation after a step. Raises: one of `INVALID` for another value."""
    if not isinstance(value["adapter"], str):
        raise TypeError("adapter")
    parse_evaluation(value["sets"])
    return value


def response_record(response: Response, advantage: float) -> dict[str, Any]:
    """A response as it is written: without log-probs, which would be most of the file."""
    kept = dataclasses.asdict(dataclasses.replace(response, logprobs=None))
    del kept["logprobs"]
    return {**kept, "advantage": advantage}
