"""Cases for tests of recipes, made from the schema: every field, and wrong values for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from gft_lite.recipe.annotations import union_members
from gft_lite.recipe.schema import Recipe


def leaves(section: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """Every field with its path; `eval.sets` has a set named hard."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from leaves(kind, (*above, name))
        elif name == "sets":
            yield from leaves(get_args(kind)[1], (*above, name, "hard"))
        yield (*above, name), field


def broken_values(field: Any) -> list[Any]:
    """Values that are wrong for a field."""
    kind = field.annotation
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [None, 5, "text", [1], {"zzqq": 1}, True]
    numeric = any(k is int or k is float for k in union_members(kind))
    values: list[Any] = [{"zzqq": 1}, {"a": {"b": 1}}]
    if numeric and kind is not dict:
        values += ["fast", ["x"], -1, float("inf"), float("nan")]
    if get_origin(kind) is Literal:
        values += ["zzqq", 5, None, [1], 1.5]
    if kind is bool:
        values += ["maybe", 5, None, []]
    if kind is str:
        values += [5, 1.5, None, True, ["a", 1]]
    if kind is int or kind is float:
        values += [None, True, 1.5 if kind is int else 10**400]
    return values


def broken_recipes() -> list[tuple[str, dict[str, Any]]]:
    """(field that was broken, recipe tree): wrong types, wrong ranges, unknown names."""
    cases = []
    exceptions = {"eval.sets", "reward.functions", "seed", "data.seed", "eval.sets.hard.seed",
                  "policy.lora.rank_pattern", "policy.lora.alpha_pattern"}  # fmt: skip
    for path, field in leaves(Recipe):
        dotted = ".".join(path)
        values = broken_values(field)
        if dotted in exceptions:  # By name, functions, and seeds of either sign.
            values = [5.5, True and "x", [[1]]]
        cases += [(dotted, nested(path, value)) for value in values]
        for typo in (path[-1][:-1] + "qz", path[-1] + "_", "zz" + path[-1], path[-1].upper()):
            wrong = (*path[:-1], typo)
            cases.append((".".join(wrong), nested(wrong, 1)))
    return cases


def nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    tree = value
    for name in reversed(path):
        tree = {name: tree}
    return tree


def plausible_values(field: Any) -> list[Any]:
    """Values of the types that a field allows, extremes among them."""
    values: list[Any] = []
    for kind in union_members(field.annotation):
        if kind is int:
            values += [0, 1, 2, 8, 10**6, 999_999_999, 2**31 - 1, 2**63 - 1]
        elif kind is float:
            values += [0.0, 5e-324, 1e-9, 0.01, 0.5, 0.999999, 1, 2.0, 1e15, 1e308]
        elif kind is str:
            values += ["a", "lab", "auto", "cpu", "cuda:1", "my.own:thing", "math", "vllm",
                       "vllm_server", "grpo", "0.001GiB", "x\u2028", "{problem}"]  # fmt: skip
        elif kind is bool:
            values += [True, False]
        elif get_origin(kind) is Literal:
            values += get_args(kind)
        elif get_origin(kind) is list:
            values += [[], ["a"], ["math", "format"], [1, 2], ["sft", "gft"], ["http://a:1"],
                       [{"method": "grpo", "overrides": {"train": {"steps": 3}}}],
                       [{"name": "math", "weight": 1e6}, {"name": "a.b:c", "weight": 0}],
            ]  # fmt: skip
        elif get_origin(kind) is dict:
            values += [{}, {"a": {}}, {"a": {"source": "x", "problems": 999_999_999}}]
        elif get_origin(kind) is tuple:
            values += [[0.5, 0.5]]
    return values or [None]
