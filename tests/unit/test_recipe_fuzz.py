"""Recipes by property: any input is a recipe or an error that names a field."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recipe_cases import broken_recipes, leaves, nested, plausible_values

from gft_lite.objective.methods import METHODS
from gft_lite.planning.planner import plan_for, resolve
from gft_lite.recipe.loader import merge
from gft_lite.recipe.method_parameters import bind_method
from gft_lite.recipe.schema import Recipe
from gft_lite.runs.base_cache import base_inputs
from gft_lite.utils.errors import RecipeError, UserError
from gft_lite.utils.memory import GIB


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str | bytes) -> Path:
    """A file in the working directory, which is the test's own."""
    path = Path(name)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def budget(examples: int) -> Any:
    """The same examples in every run."""
    return settings(
        max_examples=examples, deadline=None, derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )  # fmt: skip


# --- round trip ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_resolved_recipe_reads_back_as_itself(method: str):
    recipe = Recipe.from_tree({"method": method, "teacher": {"model": "an/other"}})
    assert Recipe.load(write("y.yaml", recipe.to_yaml())) == recipe


_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["1e5", "12e4567", "yes", "null", "0o17", "1:30", "2024-01-01", "=", "<<", "~", " a ", "a: b",
     "#", "- x", "{problem}", "\u2028", "\x85", "\ufeff", "\x00", "\t", "a\nb\n", "*a", "&a", "!"]
)  # fmt: skip
_count = st.integers(1, 2**40)
_positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
_numbers = st.integers(-(2**63), 2**63) | st.floats(allow_nan=False)
_values = st.none() | st.booleans() | _numbers | _text
_trees = st.fixed_dictionaries(
    {},
    optional={
        "name": st.from_regex(r"\A\w[\w.-]{0,10}\Z"),
        "seed": st.integers(0, 2**31 - 1),
        "policy": st.fixed_dictionaries(
            {}, optional={"model": _text, "revision": st.none() | _text,
                          "lora": st.fixed_dictionaries({"dropout": st.floats(0, 0.99)})},
        ),
        "objective": st.fixed_dictionaries({"tau": st.floats(0, 1e300), "eps": _positive}),
        "reward": st.fixed_dictionaries({"functions": st.lists(
            st.fixed_dictionaries({
                "name": st.sampled_from(["math", "exact", "my.own:function"]),
                "weight": st.floats(0.001, 1e6) | st.floats(-1e6, -0.001),
                "parameters": st.dictionaries(_text, _values | st.lists(_values, max_size=3)),
            }), min_size=1, max_size=3)}),
        "rollout": st.fixed_dictionaries({"stop": st.lists(_text.filter(bool), max_size=3)}),
        "optim": st.fixed_dictionaries({"lr": _positive}),
        "train": st.fixed_dictionaries({"steps": _count, "micro_batch_tokens": _count}),
        "eval": st.fixed_dictionaries({"sets": st.dictionaries(
            _text, st.fixed_dictionaries({"source": _text}), max_size=3)}),
    },
)  # fmt: skip


@given(method=st.sampled_from(sorted(METHODS)), tree=_trees)
@budget(60)
def test_any_recipe_reads_back_as_itself(method: str, tree: dict[str, Any]):
    recipe = Recipe.from_tree({"teacher": {"model": "an/other"}, **tree, "method": method})
    assert Recipe.load(write("y.yaml", recipe.to_yaml())) == recipe


# --- merging ---------------------------------------------------------------------------------


def _sections(depth: int) -> st.SearchStrategy[dict[str, Any]]:
    """Trees in which a name is a section everywhere, or nowhere, as a schema has it."""
    values = st.none() | st.integers(0, 9) | st.lists(st.integers(0, 9), max_size=2)
    fields: dict[str, Any] = {"x": values, "y": values}
    if depth:
        fields |= {"s": _sections(depth - 1), "t": _sections(depth - 1)}
    return st.fixed_dictionaries({}, optional=fields)


def _leaf_values(tree: dict[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    for name, value in tree.items():
        inner = isinstance(value, dict)
        yield from _leaf_values(value, (*at, name)) if inner else [((*at, name), value)]


@given(_sections(2), _sections(2), _sections(2))
def test_of_merged_layers_the_last_that_writes_a_value_wins(low, middle, high):
    before = repr((low, middle, high))
    merged = merge(merge(low, middle), high)
    assert dict(_leaf_values(merged)) == {
        at: value for layer in (low, middle, high) for at, value in _leaf_values(layer)
    }
    assert merged == merge(low, merge(middle, high))
    assert merge(low, low) == merge(low, {}) == merge({}, low) == low
    assert repr((low, middle, high)) == before


# --- broken recipes, made from the schema ----------------------------------------------------


def test_every_broken_recipe_is_a_recipe_error_that_names_the_field():
    cases = broken_recipes()
    assert len(cases) >= 500
    for field, tree in cases:
        with pytest.raises(RecipeError) as caught:
            Recipe.from_tree(tree)
        assert any(p.startswith(f"{field}") for p in caught.value.problems), (field, tree)
        assert "pydantic" not in str(caught.value)
        assert "Input should" not in str(caught.value)


def test_broken_recipes_in_files_name_file_line_and_field():
    cases = random.Random(0).sample(broken_recipes(), 150)
    for field, tree in cases:
        text = "\n\n" + yaml.safe_dump(tree, sort_keys=False)
        with pytest.raises(RecipeError) as caught:
            Recipe.load(write("x.yaml", text))
        found = caught.value.problems
        assert any(p.startswith("x.yaml:") and f": {field}" in p for p in found), (field, found)
        assert all(p.split(":")[1].isdigit() and int(p.split(":")[1]) >= 3 for p in found)


@given(st.text(max_size=60) | st.binary(max_size=60))
@budget(300)
def test_any_file_is_a_recipe_or_a_recipe_error(content: str | bytes):
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    try:
        Recipe.load(write("x.yaml", data))
    except RecipeError as error:
        assert error.problems


@given(st.lists(st.sampled_from(
    ["!!bool", "!!int", "!!float", "!!timestamp", "!!set", "!!omap", "!!pairs", "!!binary", "!!str",
     "!!map", "!!seq", "!!null", "!!merge", "&a", "*a", "<<:", "=", "a:", "seed:", "?", "-", "[",
     "]", "{", "}", ",", "1", "x", "'", '"', "|", ">", "\n", "\n  ", " ", "---", "...", "%YAML 9",
     "\t",     "2024-13-45", "1:99", "0x", "0b", "1e999", "9" * 5000]), max_size=9))  # fmt: skip
@budget(600)
def test_odd_yaml_is_a_recipe_or_a_recipe_error(parts: list[str]):
    try:
        Recipe.load(write("x.yaml", " ".join(parts)), [" ".join(parts), f"a={' '.join(parts)}"])
    except RecipeError as error:
        assert error.problems


# --- any tree and any override ----------------------------------------------------------------


_junk = st.sampled_from(
    [None, True, 0, -1, 10**400, 2**63, -(2**63), 1e308, -1e308, float("inf"), float("nan"), "",
     "0", "1e5", "\0", "\udcff", "a" * 5000, [], [[]], {}, {"a": 1}, {1: 2}, b"x", (1, 2)]
)  # fmt: skip
_entries = st.sampled_from(list(leaves(Recipe))).flatmap(
    lambda leaf: st.tuples(
        st.just(leaf[0]) | st.just((*leaf[0][:-1], "zzqq")),
        st.sampled_from(plausible_values(leaf[1])) | _junk,
    )
)


@given(st.lists(st.one_of(_entries), min_size=1, max_size=5))
@budget(300)
def test_any_tree_is_a_recipe_that_works_or_an_error_that_names_its_fields(
    entries: list[tuple[Sequence[str], Any]],
):
    tree: dict[str, Any] = reduce(merge, (nested(tuple(at), value) for at, value in entries), {})
    try:
        recipe = Recipe.from_tree(tree)
    except RecipeError as error:
        for problem in error.problems:
            assert problem.partition(":")[0].partition(".")[0] in {*Recipe.model_fields, "zzqq"}
            assert len(problem) < 1000 and "\n" not in problem
            assert "pydantic" not in problem and "Input should" not in problem
        return
    assert Recipe.load(write("x.yaml", recipe.to_yaml())) == recipe
    assert recipe.steps is None or recipe.steps > 0
    base_inputs(recipe)
    for action in (
        lambda: [recipe.stage(number) for number in range(len(recipe.stages))],
        lambda: bind_method(recipe),
        lambda: plan_for(recipe, "8GiB"),
        lambda: resolve(recipe, 8 * GIB, "cpu"),
    ):
        try:
            action()
        except UserError as error:
            assert error.problems


_override_texts = st.sampled_from(
    ["", "1", "-1", "0", "1e308", "1e-320", ".nan", "9" * 30, "true", "null", "[", "[]", "{}",
     "{a: 1}", "[a, b]", "&a [*a]", "'", "!!int x", "a: b", "2024-13-45", "\0", "x" * 300, "gft"]
)  # fmt: skip


@given(st.lists(
    st.tuples(st.sampled_from([".".join(at) for at, _ in leaves(Recipe)]), _override_texts),
    min_size=1, max_size=4,
))  # fmt: skip
@budget(300)
def test_any_override_is_a_value_or_an_error_that_names_its_field(
    overrides: list[tuple[str, str]],
):
    texts = [f"{field}={text}" for field, text in overrides]
    try:
        recipe = Recipe.load(write("x.yaml", "seed: 1\n"), texts)
    except RecipeError as error:
        fields = [field for field, _ in overrides]
        for problem in error.problems:
            assert any(field.split(".")[0] in problem for field in fields), problem
            assert "\n" not in problem
    else:
        assert Recipe.load(write("x.yaml", recipe.to_yaml())) == recipe
