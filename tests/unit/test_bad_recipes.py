"""Wrong input at the command line: one screen, the field's name, exit code 2, no traceback."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipe_cases import broken_recipes, leaves

from gft_lite.cli import main
from gft_lite.evaluation.suites import Suite
from gft_lite.experiments.sweep_config import Sweep
from gft_lite.recipe.schema import Recipe

LINES, COLUMNS = 24, 200


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def error_of(capsys: pytest.CaptureFixture[str]):
    """A function that runs a command with wrong input and returns its error text."""

    def run(*arguments: str) -> str:
        code = main(arguments)
        out, errors = capsys.readouterr()
        assert (code, out) == (2, ""), (arguments, errors)
        lines = errors.splitlines()
        assert 1 <= len(lines) <= LINES, errors
        assert max(map(len, lines)) <= COLUMNS, errors
        assert not any(word in errors for word in ("Traceback", "pydantic", "Input should"))
        return errors

    return run


def recipe_error(error_of, text: str | bytes, *overrides: str) -> str:
    Path("x.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return error_of("train", "x.yaml", *overrides, "--dry-run")


def test_six_hundred_broken_recipe_files(error_of):
    for field, tree in random.Random(0).sample(broken_recipes(), 600):
        assert field in recipe_error(error_of, yaml.safe_dump(tree)), tree


def _override(field: str, tree: Any) -> str | None:
    """The broken value on the command line, if its text is no other value there."""
    value = tree
    for name in field.split("."):
        value = value[name]
    text = f"{field}={yaml.safe_dump(value, default_flow_style=True, width=10**6)}"
    return text.removesuffix("\n").removesuffix("\n...")


def test_the_same_values_as_overrides(error_of):
    Path("x.yaml").write_text("seed: 1\n")
    for field, tree in random.Random(1).sample(broken_recipes(), 100):
        assert field in error_of("train", "x.yaml", _override(field, tree), "--dry-run"), tree


def test_everything_wrong_at_once_still_fits_a_screen(error_of):
    tree = {f"field{i}": i for i in range(400)}
    assert "... and 380 more errors." in recipe_error(error_of, yaml.safe_dump(tree))


@pytest.mark.parametrize("schema", [Suite, Sweep])
def test_other_files_are_checked_as_well(schema, error_of):
    """Every field of a suite and of a sweep as a section of an unknown field, and misspelt."""
    least: dict[str, Any] = {"definitions": {"a": {"source": "a.jsonl"}}}
    command = ["eval", "lab", "--suite", "x.yaml"]
    if schema is Sweep:
        least, command = {"recipe": "recipes/lab.yaml"}, ["sweep", "x.yaml", "--dry-run"]
    checked = 0
    for path, _ in leaves(schema):
        if path[0] in ("definitions", "overrides", "grid"):
            continue
        for wrong in (path, (*path[:-1], path[-1] + "qz")):
            tree: Any = {"zzqq": {"zzqq": 1}}
            for name in reversed(wrong):
                tree = {name: tree}
            Path("x.yaml").write_text(yaml.safe_dump(least | tree))
            assert wrong[-1] in error_of(*command), wrong
            checked += 1
    assert checked >= (10 if schema is Sweep else 60)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "an empty file"),
        ("- a\n", "got a list"),
        ("just words\n", "got a str"),
        ("seed: [1\n", "must be valid YAML"),
        ("seed: 1\n\tname: x\n", "Indent with spaces, not tabs"),
        (b"\xff\xfeseed", "UTF-8"),
        ("seed: \0\n", "must be text"),
        ("seed: 1\nseed: 2\n", "seed: must be written once"),
        ("seed: 1\n---\nseed: 2\n", "must be valid YAML"),
        ("seed: !!python/object/apply:os.system ['exit 3']\n", "must be valid YAML"),
        ("seed: !!python/name:os.system\n", "must be valid YAML"),
        ("reward: {functions: [{weight: 2}]}\n", "reward.functions.0.name: is required"),
        ("stages: [{overrides: {}}]\n", "stages.0.method: is required"),
        ("optim: {betas: [0.9]}\n", "optim.betas.1: is required"),
        ("method: grpo\ngroup: {expert: 1}\n", "group.expert: must be 0"),
        ("extends: x.yaml\n", "must not be circular, got x.yaml -> x.yaml"),
        ("extends: b.yaml\n", "must not be circular, got x.yaml -> b.yaml -> c.yaml -> x.yaml"),
        ("extends: nope.yaml\n", "extends: must be a recipe file"),
        ("extends: .\n", "extends: must be a recipe file"),
        ("extends: unreadable.yaml\n", "UTF-8"),
        ("extends: 5\n", "must be a list of files"),
        ("a: &a [*a]\n", "nested"),
        ("k: " + "x" * 150_000 + "\n", "must be smaller than 100 kB"),
    ],
)
def test_files_that_hold_no_recipe(text, part, error_of):
    Path("b.yaml").write_text("extends: c.yaml\n")
    Path("c.yaml").write_text("extends: x.yaml\n")
    Path("unreadable.yaml").write_bytes(b"\xff\xfe\x00")
    assert part in recipe_error(error_of, text)


@pytest.mark.parametrize(
    "path", ["nope.yaml", ".", "", "recipes/labb.yaml", "a\nb", "x" * 99, "recipes"]
)
def test_missing_recipes(path, error_of):
    assert "must be a recipe file" in error_of("train", path, "--dry-run")


@pytest.mark.parametrize("text", ["=1", "a..b=1", ".=1", "extends=a.yaml", "seed=[", "seed=\0=",
                                  "optim=", "optim.lr.x=1", "a=b=c"])  # fmt: skip
def test_malformed_overrides(text, error_of):
    assert "command line" in recipe_error(error_of, "seed: 1\n", text)


def test_the_recipe_before_it_was_broken_is_valid(capsys):
    """The errors above come from what was broken in the recipe."""
    Path("x.yaml").write_text("seed: 1\n")
    assert main(["train", "x.yaml", "--dry-run"]) == 0
    Path("y.yaml").write_text(capsys.readouterr().out)
    assert Recipe.load("y.yaml") == Recipe.load("x.yaml")
