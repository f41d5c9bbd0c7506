"""The file plan.json of a referee's folder: more seeds, bases and methods only add runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gft_lite.experiments.referee_plan import RefereePlan
from gft_lite.recipe.effects import Affects, differences, values_affecting
from gft_lite.utils.errors import UserError, short_repr
from gft_lite.utils.files import read_json, write_text_atomic

PLAN = "plan.json"
_GROWING = ("methods", "bases")


def check_same_plan(plan: RefereePlan, out: Path) -> None:
    """Write the plan to its folder, or compare it with that of an earlier start.

    Raises: UserError for a plan that would change runs that the folder may have.
    """
    file, now = out / PLAN, _values(plan)
    if file.exists():
        rule, advice = "must be the plan of a referee", "Choose another --out."
        found = read_json(file, lambda before: [*_changes(before, now)], rule, advice)
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            rule = "--out: must be a new folder or one of the same comparison, got another in"
            changed = f"{', '.join(found[:3])}{more}"
            raise UserError([f"{rule} {out}: {changed}. Choose another folder."])
    write_text_atomic(file, json.dumps(now, indent=1))


def _values(plan: RefereePlan) -> dict[str, Any]:
    """Everything that decides on the runs and the verdict, as JSON has it."""
    options = plan.options
    values = {
        "recipe": values_affecting(plan.recipe, Affects.RUN),
        "methods": list(plan.methods),
        "own_fields": {c.name: c.layer for c in plan.single},
        "bases": list(plan.bases),
        "seeds": options.seeds,
        "equal": options.equal,
        "budget": plan.budget,
        "tune": options.tune,
        "tune_set": plan.tune_set.model_dump(mode="json"),
        "margin": options.margin,
        "against": plan.against,
    }
    return json.loads(json.dumps(values, default=str))


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What differs, each as text, but for what only adds runs."""
    for name in ("equal", "budget", "tune", "margin", "against"):
        if before[name] != now[name]:
            yield f"--{name} {before[name]}, now {now[name]}"
    if before["seeds"] > now["seeds"]:
        yield f"--seeds {before['seeds']}, now {now['seeds']}"
    for name in _GROWING:
        if missing := [each for each in before[name] if each not in now[name]]:
            yield f"--{name} with {', '.join(missing)}, now without"
    if before["bases"][0] != now["bases"][0]:
        yield f"--bases {before['bases'][0]} first, now {now['bases'][0]}"
    for name, a, b in differences(before["recipe"], now["recipe"]):
        yield f"{name} {short_repr(a)}, now {short_repr(b)}"
    for name, layer in before["own_fields"].items():
        if now["own_fields"].get(name, layer) != layer:
            yield f"other settings of {name}"
    if before["tune_set"] != now["tune_set"]:
        yield "another tuning set"
