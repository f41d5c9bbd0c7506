"""The documents name files, packages, tests, commands, fields and metrics that exist, and all."""

from __future__ import annotations

import ast
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonschema import Draft202012Validator

import gft_lite
from gft_lite.cli.entry_point import COMMANDS, make_parser
from gft_lite.objective.importance import Importance
from gft_lite.objective.methods import METHODS
from gft_lite.recipe import find_recipe
from gft_lite.recipe.effects import leaves
from gft_lite.recipe.loader import Loader
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import LoraSettings, ObjectiveSettings
from gft_lite.rewards.registry import REWARDS
from gft_lite.runs.metrics import group_metrics
from gft_lite.training.updates import Mean, Update, aggregate_updates
from gft_lite.types import Group, Problem, Response
from gft_lite.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs" / "site"))

import generate  # noqa: E402
from meanings import field_meanings, method_meanings, reward_meanings  # noqa: E402
from page_parts import cell  # noqa: E402
from recipe_reference import sections  # noqa: E402

PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [
        *(ROOT / f"{n}.md" for n in ("README", "SECURITY", "CONTRIBUTING", "CHANGELOG")),
        *sorted((ROOT / "docs").rglob("*.md")),
        ROOT / "recipes" / "README.md",
        *sorted((ROOT / "examples").rglob("*.md")),
    ]
}
README, ARCHITECTURE = PAGES["README.md"], PAGES["docs/project/architecture.md"]


# --- names -----------------------------------------------------------------------------------


def test_the_tree_has_every_package():
    tree = ARCHITECTURE[ARCHITECTURE.index("gft_lite/\n") :].partition("```")[0]
    listed = re.findall(r"^  (\w+)/", tree, re.MULTILINE)
    assert sorted(listed) == sorted(p.parent.name for p in ROOT.glob("gft_lite/*/__init__.py"))


def test_the_four_files_to_read_first_exist():
    section = ARCHITECTURE[ARCHITECTURE.index("Read these four files") :].partition("```")[0]
    files = re.findall(r"`(\w+/\w+\.py)`", section)
    assert len(files) == 4
    assert all((ROOT / "gft_lite" / file).is_file() for file in files)


@pytest.mark.parametrize("name", PAGES)
def test_paths_exist(name):
    roots = ("recipes", "configs", "examples", "benchmarks", "tests", "docs")
    text = PAGES[name]
    for path in re.findall(rf"`((?:{'|'.join(roots)})/[\w./{{}},-]+)`", text):
        before, *choices = re.split(r"[{}]", path)
        options = [f"{before}{c}{choices[1]}" for c in choices[0].split(",")] if choices else [path]
        for option in options:
            assert (ROOT / option).exists() or list(ROOT.glob(f"{option}*")), option


@pytest.mark.parametrize("name", ["SECURITY.md", "docs/guides/works_with.md"])
def test_named_tests_exist(name):
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGES[name])
    assert len(named) >= 7
    missing = [n for file, n in named if f"def {n}(" not in (ROOT / file).read_text("utf-8")]
    assert missing == []


def test_the_readme_is_short_and_its_links_exist():
    assert len(README.splitlines()) <= 150
    links = re.findall(r'\]\(([^)#]+)(?:#[\w-]+)?\)|(?:src|srcset)="([^"]+)"', README)
    local = [a or b for a, b in links if not (a or b).startswith("https://")]
    assert len(local) > 30
    assert [link for link in local if not (ROOT / link).exists()] == []
    for setup in ("make demo", "make test"):
        assert re.search(rf"^{setup} ", README, re.MULTILINE)


# --- commands --------------------------------------------------------------------------------


def _commands(text: str) -> list[list[str]]:
    """The `gft-lite ...` commands of the fenced blocks, without comments."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", "").splitlines()
    found = [shlex.split(line, comments=True) for line in lines if line.startswith("gft-lite ")]
    return [[word for word in words[1:] if not re.match(r"\[.*\]$", word)] for words in found]


DOCUMENTED = [(name, words) for name, text in PAGES.items() for words in _commands(text)]


@pytest.mark.parametrize(("name", "words"), DOCUMENTED, ids=[f"{n}: {w}" for n, w in DOCUMENTED])
def test_documented_commands_are_valid(name, words, tmp_path, monkeypatch):
    # Folders of runs, which some arguments have to be.
    words = [word.replace("/*", "/x") for word in words]
    for word in words:
        if re.match(r"runs/[\w./-]+$", word):
            (tmp_path / word).mkdir(parents=True, exist_ok=True)
    recipes = [word for word in words if re.match(r"(recipes|examples)/.*yaml$", word)]
    assert all((ROOT / recipe).is_file() for recipe in recipes)
    shipped = [word for word in recipes if word.startswith("recipes/")]
    assert all(find_recipe(recipe) for recipe in shipped)
    monkeypatch.chdir(tmp_path)
    options, rest = make_parser().parse_known_args(words)
    assert [word for word in rest if word.startswith("-") or "=" not in word] == []
    overrides = [w for w in (*getattr(options, "overrides", []), *rest) if "=" in w]
    if words[0] == "train" and shipped:
        Recipe.load(shipped[0], overrides)


def test_a_wrong_command_would_be_noticed():
    with pytest.raises((UserError, SystemExit)):
        make_parser().parse_args(["train", "--no-such-flag"])
    assert _commands("```\ngft-lite train a.yaml \\\n  --out b  # c\n```\n") == [
        ["train", "a.yaml", "--out", "b"]
    ]


@pytest.mark.parametrize("name", PAGES)
def test_what_the_prose_says_to_type_exists(name):
    """Flags of commands, make targets, benchmarks, extras, and methods of the Python API."""
    text = PAGES[name]
    parsers = generate.commands()
    for line in re.findall(r"`gft-lite ([a-z][^`]*)`", text):
        words = line.split()
        command = " ".join(words[:2]) if words[0] == "lab" else words[0]
        if command == "count":
            continue  # The command that CONTRIBUTING.md adds.
        assert command in parsers, line
        flags = [word.partition("=")[0] for word in words if word.startswith("--")]
        known = {option for a in parsers[command]._actions for option in a.option_strings}
        assert set(flags) - known == set(), line
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert {t for line in re.findall(r"`make ([a-z -]+)`", text) for t in line.split()} <= targets
    for module in re.findall(r"python3? -m (benchmarks[\w.]*)", text):
        path = ROOT / module.rstrip(".").replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), module
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    named = re.findall(r"'?\.\[([a-z,-]+)\]'?", text)
    assert {e for line in named for e in line.split(",")} <= set(extras["optional-dependencies"])
    for owner, method in re.findall(r"`(\w+)\.(\w+)\([^`]*`", text):
        api = {"run": "Run", "recipe": "Recipe"}.get(owner, owner)
        if api in gft_lite.__all__:
            assert hasattr(getattr(gft_lite, api), method), f"{owner}.{method}"


def test_every_command_is_documented():
    page, prose = generate.commands_page(), "\n".join(PAGES.values())
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2].replace("evaluate", "eval")
        assert f"gft-lite {name}" in page, name
        assert f"gft-lite {name}" in prose, name


# --- fields and methods ----------------------------------------------------------------------


def test_every_recipe_field_is_in_the_reference():
    page = generate.recipe_page()
    fields = [name for name, _ in leaves(Recipe().model_dump())]
    assert len(fields) > 100
    cells = {line[2:].partition("<br>")[0].partition("{")[0] for line in page.splitlines()}
    assert [name for name in fields if f"`{name}`" not in cells] == []


def test_every_field_and_parameter_has_a_meaning_in_the_reference():
    page = generate.recipe_page() + generate.rewards_page()
    known = [(at, field_meanings(schema), {*schema.model_fields}) for at, schema in sections()]
    for name, method in METHODS.items():
        own = {*method.parameters} - ObjectiveSettings.model_fields.keys()
        known.append((f"method {name}", method_meanings(method), own))
    for name in REWARDS:
        known.append((f"reward {name}", reward_meanings(name), {*generate.reward_defaults(name)}))
    missing = [
        f"{at}.{n}".strip(".") for at, found, names in known for n in names if not found.get(n)
    ]
    orphaned = [f"{at}.{n}".strip(".") for at, found, names in known for n in found.keys() - names]
    assert (missing, orphaned) == ([], [])
    meanings = {text for _, found, _ in known for text in found.values()}
    # A cell begins with a capital letter.
    assert [text for text in meanings if cell(text)[1:] not in page and text not in page] == []
    assert len(meanings) > 200


def test_shipped_recipes_are_valid_by_the_schema_for_editors():
    schema = json.loads(generate.recipe_schema())
    validator = Draft202012Validator(schema)
    files = [f for f in (ROOT / "recipes").rglob("*.yaml") if f.parent.name != "sweeps"]
    trees = {str(file): yaml.load(file.read_text("utf-8"), Loader) for file in files}
    assert len(trees) > 50
    wrong = {name: [e.message for e in validator.iter_errors(tree)] for name, tree in trees.items()}
    assert {name: errors for name, errors in wrong.items() if errors} == {}
    [error] = validator.iter_errors({"policy": {"lora": {"rnak": 8}}})
    assert "'rnak'" in error.message
    assert not validator.is_valid({"group": {"self": -1}})
    lora = schema["$defs"]["LoraSettings"]["properties"]
    assert lora["use_dora"]["description"] == field_meanings(LoraSettings)["use_dora"]
    assert schema["properties"]["method"]["anyOf"][0]["enum"] == list(METHODS)


def _known_fields() -> set[str]:
    """The dotted names of all fields and sections, and of the parameters of methods."""
    found = {f"{at}.{name}".strip(".") for at, s in sections() for name in s.model_fields}
    return found | {
        f"objective.{name}" for method in METHODS.values() for name in method.parameters
    }


def _names(tree: Any, above: str = "") -> Iterator[str]:
    """The dotted names in a recipe, those of sections and fields alike."""
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield f"{above}{key}"
        yield from _names(value, f"{above}{key}.")


def test_fields_that_the_documents_name_exist():
    known = _known_fields()
    sections = {name.partition(".")[0] for name in known if "." in name}
    # Files, sizes that follow from fields, and names of the user's own.
    own = r"(eval\.sets|objective\.power|group\.size|.*_kwargs)\b.*|\w+\.(txt|md|json|csv)"
    for page, text in PAGES.items():
        named = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?=[`:=])", text)
        wrong = [n for n in named if n.partition(".")[0] in sections and n not in known]
        blocks = re.findall(r"^```yaml[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        for block in blocks:
            names = _names(yaml.safe_load(block))
            wrong += [n for n in names if n not in {*known, "extends"}]
        assert [n for n in wrong if not re.fullmatch(own, n)] == [], page


def test_every_method_and_reward_is_in_the_reference():
    methods, rewards = generate.methods_page(), generate.rewards_page()
    assert [name for name in METHODS if f"| `{name}` |" not in methods] == []
    assert [name for name in REWARDS if f"| [`{name}`](#{name}) |" not in rewards] == []


# --- metrics ---------------------------------------------------------------------------------


def _literal_keys(file: str, function: str) -> set[str]:
    """The keys of all dicts that a function of the package writes out."""
    tree = ast.parse((ROOT / "gft_lite" / file).read_text(encoding="utf-8"))
    [body] = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function]
    dicts = [n for n in ast.walk(body) if isinstance(n, ast.Dict)]
    keys = {k.value for d in dicts for k in d.keys if isinstance(k, ast.Constant)}
    return keys - {"warn", "stop", "rollback"}  # Values of guard.action, with their texts.


def test_metrics_of_a_step_have_a_meaning():
    responses = tuple(
        Response((1, 2), "1", source, reward=1.0, reward_parts={"exact": 1.0}, verdict="ok")
        for source in ("expert", "self")
    )
    groups = group_metrics([Group(Problem("a", "1?", "1"), responses)])
    done = Update(1e-3, 8, tokens=4, metrics={"rectified": Mean(1.0, 4), "entropy": Mean(1.0, 4)},
                  gaps=torch.tensor([0.1, 0.0]))  # fmt: skip
    updates = aggregate_updates([done], Importance())
    keys = [name.replace(".", "/") for name, _ in leaves({**groups, **updates})]
    assert {"reward/self", "engine_gap/p95", "objective/rectified"} <= set(keys)
    assert [key for key in keys if not generate.has_meaning("metrics.jsonl", key)] == []
    assert not generate.has_meaning("metrics.jsonl", "a_new_metric")


@pytest.mark.parametrize(
    ("table", "file", "function"),
    [
        ("metrics.jsonl", "training/loop.py", "train_step"),
        ("metrics.jsonl", "training/course.py", "check_guard"),
        ("metrics.jsonl", "training/course.py", "evaluate_step"),
        ("summary.json", "training/course.py", "course_summary"),
        ("summary.json", "training/single_run.py", "_summary"),
        ("summary.json", "training/stages.py", "_conclude"),
        ("eval/", "evaluation/metrics.py", "measure"),
        ("eval/", "evaluation/metrics.py", "_accuracy_of_counts"),
        ("results.json of gft-lite eval", "evaluation/evaluator.py", "_drift"),
        ("results.json of gft-lite eval", "evaluation/metrics.py", "_gain"),
        ("tokens/, of each token (log.tokens)", "training/ledger.py", "_figures"),
        ("tokens/, of each token (log.tokens)", "training/ledger.py", "_gradients"),
    ],
)
def test_keys_that_the_code_writes_have_a_meaning(table, file, function):
    known = {part for key in generate.metric_tables()[table] for part in key.split("/")}
    keys = _literal_keys(file, function)
    assert keys - known - {"kl", "total", "stage"} == set()


def test_what_losses_report_has_a_meaning():
    names = set()
    for file in ("losses.py", "mixed_losses.py"):
        source = (ROOT / "gft_lite" / "objective" / file).read_text(encoding="utf-8")
        names |= set(re.findall(r'\{(?:\*\*rl\.metrics, )?"(\w+)": ', source))
        names |= set(re.findall(r'"(\w+)": \(clipped', source))
    assert {"rectified", "clip_fraction", "mu", "teacher_kl"} <= names
    assert names - set(generate.metric_tables()["objective/*"]) == set()
