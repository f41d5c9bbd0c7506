"""Recipes: what they read as, and the text of every error, on real files."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from gft_lite.objective.methods import METHODS
from gft_lite.recipe.loader import find_recipe, read_tree
from gft_lite.recipe.schema import Recipe
from gft_lite.utils.errors import RecipeError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str | bytes) -> Path:
    """A file at a path relative to the test's folder, which is the working directory."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def problems(text: str | bytes, *overrides: str) -> list[str]:
    """The errors of a recipe x.yaml."""
    with pytest.raises(RecipeError) as caught:
        Recipe.load(write("x.yaml", text), overrides)
    assert str(caught.value).splitlines() == caught.value.problems[:20]
    return caught.value.problems


# --- what reads as what ----------------------------------------------------------------------


def test_defaults_are_the_methods_and_then_the_schemas():
    recipe = Recipe.from_tree({})
    assert (recipe.method, recipe.group.expert, recipe.group.teacher, recipe.group.self) == (
        "gft", 1, 3, 4,
    )  # fmt: skip
    assert (recipe.objective.tau, recipe.optim.lr, recipe.group.size) == (0.7, 2e-5, 8)
    grpo = Recipe.from_tree({"method": "grpo", "group": {"self": 6}})
    assert (grpo.group.expert, grpo.group.self) == (0, 6)
    assert (grpo.objective.eps, grpo.objective.reduction) == (1e-4, "sequence_mean")


@pytest.mark.parametrize(
    ("written", "lr"),
    [("1e-5", 1e-5), ("1E-5", 1e-5), (".5", 0.5), ("5.", 5.0), ("1_0.5", 10.5), ("+2e+0", 2.0)],
)
def test_numbers_are_numbers(written: str, lr: float):
    path = write("x.yaml", f"optim:\n  lr: {written}\n")
    assert Recipe.load(path).optim.lr == lr
    assert Recipe.load(path, [f"optim.lr={written}"]).optim.lr == lr


@pytest.mark.parametrize(
    ("written", "seed"), [("1_000", 1000), ("0x1f", 31), ("1e3", 1000), ("'7'", 7), ("017", 15)]
)
def test_whole_numbers_as_yaml_writes_them(written: str, seed: int):
    assert Recipe.load(write("x.yaml", f"seed: {written}\n")).seed == seed


@pytest.mark.parametrize("text", ["1e5x", "1.5B", "1.2.3", "12:30x", "0.3-beta", ".", "e5", "-x"])
def test_what_only_begins_like_a_number_is_text(text: str):
    assert Recipe.load(write("x.yaml", f"policy:\n  model: {text}\n")).policy.model == text


@pytest.mark.parametrize(("written", "value"), [("yes", True), ("off", False), ("True", True)])
def test_truth_values(written: str, value: bool):
    assert Recipe.load(write("x.yaml", f"data:\n  shuffle: {written}\n")).data.shuffle is value


def test_later_bases_win_and_the_file_wins_over_all_and_the_command_line_over_it():
    write("configs/low.yaml", "seed: 1\nname: low\noptim: {lr: 1e-1, warmup: 0.1}\n")
    write("configs/high.yaml", "extends: low.yaml\nname: high\noptim: {lr: 1e-2}\n")
    write("configs/other.yaml", "eval: {k: [1, 2, 4]}\ntrain: {steps: 5}\n")
    path = write(
        "recipes/x.yaml",
        "extends: [../configs/high.yaml, ../configs/other.yaml]\n"
        "eval: {k: [8]}\noptim: {weight_decay: 0.3}\n",
    )
    recipe = Recipe.load(path, ["optim.weight_decay=0.4", "train.steps=6", "train.steps=7"])
    assert (recipe.seed, recipe.name) == (1, "high")
    assert recipe.optim.model_dump(include={"lr", "warmup", "weight_decay"}) == {
        "lr": 1e-2, "warmup": 0.1, "weight_decay": 0.4,
    }  # fmt: skip
    assert (recipe.eval.k, recipe.train.steps) == ([8], 7)


def test_places_name_the_file_that_wrote_a_value():
    write("configs/low.yaml", "seed: 1\n\noptim:\n  lr: 1e-1\n  warmup: 0.1\n")
    path = write("recipes/x.yaml", "extends: ../configs/low.yaml\noptim:\n  warmup: 0.2\n")
    tree, places = read_tree(path, ["seed=2"])
    assert tree == {"seed": 2, "optim": {"lr": 0.1, "warmup": 0.2}}
    where = {".".join(map(str, at)): str(place) for at, place in places.items()}
    assert where["seed"] == "command line"
    assert where["optim.lr"] == "configs/low.yaml:4"
    assert where["optim.warmup"] == "recipes/x.yaml:3"


def test_overrides_reach_every_kind_of_value():
    overrides = ["group.self=6", "optim={lr: 1e-5, betas: [0.5, 0.6]}", "eval.sets.a.source=lab",
                 "policy.revision=", "reward.functions=[math, format]", "policy.model=a=b",
                 " train.steps = 3 ", "data.prompt.template='Q: {problem}'"]  # fmt: skip
    recipe = Recipe.load(write("x.yaml", "policy: {revision: r}\n"), overrides)
    assert (recipe.group.self, recipe.optim.lr, recipe.optim.betas) == (6, 1e-5, (0.5, 0.6))
    assert (recipe.eval.sets["a"].source, recipe.policy.revision) == ("lab", None)
    assert recipe.policy.model == "a=b"
    assert [f.name for f in recipe.reward.functions] == ["math", "format"]
    assert (recipe.train.steps, recipe.data.prompt.template) == (3, "Q: {problem}")


def test_anchors_aliases_and_merge_keys():
    text = (
        "rollout: &r {temperature: 0.7, top_p: 0.9}\n"
        "eval: {<<: *r, top_p: 0.8, sets: {a: &s {source: lab}, b: *s}}\n"
    )
    recipe = Recipe.load(write("x.yaml", text))
    assert (recipe.eval.temperature, recipe.eval.top_p) == (0.7, 0.8)
    assert recipe.eval.sets["b"].source == "lab"


def test_shorthands():
    text = "reward: {functions: math}\nrollout: {stop: END}\ndata: {columns: {expert: solution}}\n"
    recipe = Recipe.load(write("x.yaml", text))
    assert recipe.reward.functions[0].name == "math"
    assert (recipe.rollout.stop, recipe.data.columns.expert) == (["END"], ["solution"])


def test_a_dotted_path_is_a_name_in_every_table():
    text = "method: mine.losses:soft\nrollout: {engine: mine.Engine}\nreward: {functions: my:f}\n"
    recipe = Recipe.load(write("x.yaml", text))
    assert (recipe.method, recipe.rollout.engine) == ("mine.losses:soft", "mine.Engine")


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValidationError):
        Recipe.from_tree({}).optim.lr = 1.0  # type: ignore[misc]


def test_every_shipped_recipe_loads_and_every_fragment_fits_the_schema():
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    fragments = sorted((ROOT / "configs").glob("*/*.yaml"))
    assert recipes
    for path in recipes:
        Recipe.load(path)
    for path in fragments:
        assert read_tree(path)[0], path


# --- finding files ---------------------------------------------------------------------------


def test_a_relative_path_is_the_users_file_first_and_then_the_shipped_one():
    shipped = find_recipe("recipes/lab.yaml")
    assert shipped == ROOT / "recipes" / "lab.yaml"
    mine = write("recipes/lab.yaml", "seed: 5\n")
    assert find_recipe("recipes/lab.yaml") == mine
    assert Recipe.load("recipes/lab.yaml").seed == 5


def test_a_users_recipe_extends_a_shipped_one_and_a_wheel_has_them_inside(monkeypatch, tmp_path):
    path = write("mine.yaml", "extends: recipes/lab.yaml\nseed: 77\n")
    shipped = Recipe.load(ROOT / "recipes" / "lab.yaml")
    assert Recipe.load(path) == shipped.model_copy(update={"seed": 77})

    package = tmp_path / "site" / "gft_lite"
    write("site/gft_lite/shipped/recipes/inside.yaml", "seed: 78\n")
    monkeypatch.setattr("gft_lite.recipe.loader.PACKAGE", package)
    assert Recipe.load("recipes/inside.yaml").seed == 78


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ("recipes/labb.yaml", "recipes/lab.yaml"),
        ("lab", "recipes/lab.yaml"),
        ("mime.yaml", "mine.yaml"),
        ("sub/mini.yaml", "sub/mine.yaml"),
    ],
)
def test_a_missing_file_gets_the_nearest_name(asked: str, hint: str):
    write("mine.yaml", "seed: 1\n")
    write("sub/mine.yaml", "seed: 1\n")
    with pytest.raises(RecipeError) as caught:
        Recipe.load(asked)
    assert str(caught.value) == (
        f"must be a recipe file, got {asked!r}, which does not exist. Did you mean {hint}?"
    )


@pytest.mark.parametrize("path", ["", ".", "nothing-like-it/qq", "a" * 5000, "a\0b", "\udcff"])
def test_odd_paths_are_missing_files(path: str):
    with pytest.raises(RecipeError, match=r"^must be a recipe file, got '"):
        Recipe.load(path)


# --- the text of errors: fields --------------------------------------------------------------

FIELDS = {
    "objective:\n  tao: 0.7\n": (
        "x.yaml:2: objective.tao: unknown field, got 0.7. Did you mean objective.tau?"
    ),
    "objectiv:\n  tau: 0.7\n": (
        "x.yaml:1: objectiv: unknown field, got a section. Did you mean objective?"
    ),
    "tau: 0.7\n": "x.yaml:1: tau: unknown field, got 0.7. Did you mean objective.tau?",
    "seed: 1\nmodel: lab\n": (
        "x.yaml:2: model: unknown field, got 'lab'. Did you mean policy.model or teacher.model?"
    ),
    "policy:\n  rank: 8\n": (
        "x.yaml:2: policy.rank: unknown field, got 8. Did you mean policy.lora.rank?"
    ),
    "optim: {steps: 3}\n": (
        "x.yaml:1: optim.steps: unknown field, got 3. Did you mean train.steps?"
    ),
    "log:\n  problems: 3\n": (
        "x.yaml:2: log.problems: unknown field, got 3. "
        "Did you mean data.problems or budget.problems or monitor.problems?"
    ),
    "extend: a.yaml\n": "x.yaml:1: extend: unknown field, got 'a.yaml'. Did you mean extends?",
    "objective.tau: 0.7\n": (
        "x.yaml:1: objective.tau: unknown field, got 0.7. Write tau under objective."
    ),
    "LR: 1\n": "x.yaml:1: LR: unknown field, got 1. Did you mean optim.lr?",
    "zzz: 1\n": "x.yaml:1: zzz: unknown field, got 1.",
    "eval:\n  sets:\n    hard:\n      sorce: lab\n": (
        "x.yaml:4: eval.sets.hard.sorce: unknown field, got 'lab'. "
        "Did you mean eval.sets.hard.source?"
    ),
    "reward:\n  functions:\n    - name: math\n    - name: math\n      wieght: 2\n": (
        "x.yaml:5: reward.functions.1.wieght: unknown field, got 2. "
        "Did you mean reward.functions.1.weight?"
    ),
    "reward:\n  functions:\n    - name: mth\n": (
        "x.yaml:3: reward.functions.0.name: must be one of choice, exact, format, judge, math, "
        "or a dotted path, got 'mth'. Did you mean math?"
    ),
    "reward: {functions: mth}\n": (
        "x.yaml:1: reward.functions.0.name: must be one of choice, exact, format, judge, math, "
        "or a dotted path, got 'mth'. Did you mean math?"
    ),
    "reward:\n  functions:\n    - weight: 1\n": (
        "x.yaml:3: reward.functions.0.name: is required, got nothing."
    ),
    "reward:\n  functions: []\n": (
        "x.yaml:2: reward.functions: must have at least 1 item, got []."
    ),
    "objective: {std: smaple}\n": (
        "x.yaml:1: objective.std: must be 'sample', 'population' or 'none', got 'smaple'. "
        "Did you mean sample?"
    ),
    "policy: {quantization: no}\n": (
        "x.yaml:1: policy.quantization: must be 'nf4', 'int8' or 'none', got false."
    ),
    "log: {trackers: [wandb, tensorbored]}\n": (
        "x.yaml:1: log.trackers.1: must be 'tensorboard', 'wandb' or 'trackio', "
        "got 'tensorbored'. Did you mean tensorboard?"
    ),
    "policy:\n  lora:\n    target_modules: all-linaer\n": (
        "x.yaml:3: policy.lora.target_modules: must be 'all-linear' or a list, "
        "got 'all-linaer'. Did you mean all-linear?"
    ),
    "policy: {lora: {target_modules: []}}\n": (
        "x.yaml:1: policy.lora.target_modules: must be 'all-linear' or have at least 1 item, "
        "got []."
    ),
    "policy:\n  lora:\n    target_modules:\n      - q_proj\n      - 1\n": (
        "x.yaml:5: policy.lora.target_modules.1: must be text, got 1. Put it in quotes."
    ),
    "policy: {device: gpu}\n": (
        "x.yaml:1: policy.device: must be auto, cpu, cuda or cuda:N, got 'gpu'."
    ),
    "policy: {context: 4}\n": (
        "x.yaml:1: policy.context: must be greater than or equal to 8, got 4."
    ),
    "policy: {revision: 12e4567}\n": (
        "x.yaml:1: policy.revision: must be text, got inf. Put it in quotes."
    ),
    "data: {prompt: {template: {problem}}}\n": (
        "x.yaml:1: data.prompt.template: must be text, got a section. Put it in quotes."
    ),
    "data: {columns: {expert: 5}}\n": "x.yaml:1: data.columns.expert: must be a list, got 5.",
    "name: ../up\n": (
        "x.yaml:1: name: must be letters, digits, `_`, `-` and `.`, to name a folder, got '../up'."
    ),
    "name: ..\n": (
        "x.yaml:1: name: must be letters, digits, `_`, `-` and `.`, to name a folder, got '..'."
    ),
    "seed: 2.5\n": "x.yaml:1: seed: must be a whole number, got 2.5.",
    "seed: 0o17\n": "x.yaml:1: seed: must be a whole number, got '0o17'.",
    "seed: true\n": "x.yaml:1: seed: must be a number, got true.",
    "seed:\n": "x.yaml:1: seed: must be a whole number, got null.",
    "optim: {lr: fast}\n": "x.yaml:1: optim.lr: must be 'auto' or a number, got 'fast'. Did you "
    "mean auto?",
    "optim: {lr: .inf}\n": "x.yaml:1: optim.lr: must be 'auto' or a finite number, got inf.",
    "optim: {lr: 0}\n": "x.yaml:1: optim.lr: must be 'auto' or greater than 0, got 0.",
    "optim: {betas: [0.9]}\n": "x.yaml:1: optim.betas.1: is required, got nothing.",
    "optim: {betas: [0.9, 1]}\n": "x.yaml:1: optim.betas.1: must be less than 1, got 1.",
    "optim: {betas: [0.9, 0.9, 0.9]}\n": (
        "x.yaml:1: optim.betas: must have at most 2 items, got [0.9, 0.9, 0.9]."
    ),
    "data: {shuffle: maybe}\n": "x.yaml:1: data.shuffle: must be true or false, got 'maybe'.",
    "method: gpro\n": (
        f"x.yaml:1: method: must be one of {', '.join(sorted(METHODS))}, or a dotted path, "
        "got 'gpro'. Did you mean grpo?"
    ),
    "rollout: {engine: vlm}\n": (
        "x.yaml:1: rollout.engine: must be one of auto, transformers, unsloth, vllm, "
        "vllm_server, or a dotted path, "
        "got 'vlm'. Did you mean vllm?"
    ),
    "seed: 1\noptim:\n": (
        "x.yaml:2: optim: must be a section of fields, got null. "
        "Write its fields under it, or leave it out."
    ),
    "optim: fast\n": "x.yaml:1: optim: must be a section of fields, got 'fast'.",
    "eval: {sets: [a]}\n": "x.yaml:1: eval.sets: must be a section of fields, got ['a'].",
    f"name: [{'long, ' * 30}]\n": (
        f"x.yaml:1: name: must be text, got [{'%s, ' * 6}%s, ....".replace("%s", "'long'")
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", FIELDS)
def test_the_text_of_an_error_in_a_field(text: str):
    assert problems(text) == [FIELDS[text]]


CROSS = {
    "group:\n  expert: 0\n  teacher: 0\n  self: 0\n": (
        "x.yaml:4: group.self: must be at least 1 when expert and teacher are 0, got 0."
    ),
    "eval:\n  k: [1, 16]\n": (
        "x.yaml:2: eval.k: must be at most eval.samples, which is 8, got [1, 16]."
    ),
    "eval:\n  samples: 4\n": (
        "x.yaml:1: eval.k: must be at most eval.samples, which is 4, got [1, 8]."
    ),
    "policy:\n  reference: adapter\n": (
        "x.yaml:2: policy.reference: needs policy.adapter, the adapter to start from, "
        "got 'adapter'."
    ),
    "data:\n  prompt:\n    template: Hello\n": (
        "x.yaml:3: data.prompt.template: must contain {problem}, got 'Hello'."
    ),
    "eval:\n  sets:\n    a:\n      prompt:\n        system: Hi\n": (
        "x.yaml:5: eval.sets.a.prompt.system: needs prompt.style: chat, got 'Hi'."
    ),
    "data:\n  prompt:\n    chat_template_kwargs: {a: 1}\n": (
        "x.yaml:3: data.prompt.chat_template_kwargs: needs prompt.style: chat, got a section."
    ),
    "data:\n  prompt:\n    style: chat\n    chat_template_kwargs:\n      tokenize: false\n": (
        "x.yaml:5: data.prompt.chat_template_kwargs.tokenize: must be a variable of the chat "
        "template, not an argument of its rendering, got false."
    ),
    "data:\n  columns:\n    messages: m\n    problem: q\n": (
        "x.yaml:3: data.columns.messages: must be null with columns.problem or columns.choices, "
        "got 'm'."
    ),
    "method: gft\ndata:\n  columns:\n    answer: null\n": (
        "x.yaml:4: data.columns.answer: must name a column, as reward math compares with it, "
        "got null."
    ),
    "data:\n  difficulty:\n    from: g\n    low: 0.9\n    high: 0.5\n": (
        "x.yaml:4: data.difficulty.low: must be at most high, 0.5, got 0.9."
    ),
    "data:\n  curriculum: easy_first\n": (
        "x.yaml:2: data.curriculum: needs data.difficulty, by which problems are ordered, "
        "got 'easy_first'."
    ),
    "train:\n  updates_per_rollout: 20\n": (
        "x.yaml:2: train.updates_per_rollout: must be at most train.problems_per_step, "
        "which is 16, got 20."
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", CROSS)
def test_the_text_of_an_error_between_fields(text: str):
    assert problems(text) == [CROSS[text]]


STAGED = "in a stage, which continues the adapter of the stage before it, got"


@pytest.mark.parametrize(
    ("overrides", "errors"),
    [
        ("{policy: {model: other}}", [f"policy.model: must be that of the recipe, 'lab', {STAGED} "
                                      "'other'."]),
        ("{policy: {lora: {rank: 4, target_modules: [q_proj]}}}",
         [f"policy.lora.rank: must be that of the recipe, 16, {STAGED} 4.",
          f"policy.lora.target_modules: must be that of the recipe, 'all-linear', {STAGED} "
          "['q_proj']."]),
        ("{policy: {adapter: a, reference: adapter}}",
         [f"policy.adapter: must be that of the recipe, null, {STAGED} 'a'.",
          f"policy.reference: must be that of the recipe, 'base', {STAGED} 'adapter'."]),
        ("{method: sft}",
         ["method: must be written in the stage, not in its overrides, got 'sft'."]),
        ("{stages: [gft]}",
         ["stages: must be written in the stage, not in its overrides, got ['gft']."]),
    ],
)  # fmt: skip
def test_what_a_stage_may_not_change(overrides: str, errors: list[str]):
    text = f"stages:\n- sft\n- method: gft\n  overrides: {overrides}\n"
    found = problems(text)
    assert sorted(found) == sorted(f"x.yaml:4: {error} (stage 2)" for error in errors)
    recipe = Recipe.from_tree(read_tree(Path("x.yaml"))[0])
    recipe.stage(0)
    with pytest.raises(RecipeError) as caught:
        recipe.stage(1)
    assert sorted(caught.value.problems) == sorted(errors)


def test_a_stage_may_repeat_what_the_recipe_says():
    text = "policy: {lora: {rank: 4}}\nstages: [{method: gft, overrides: {policy: {lora: {rank: 4}"
    assert Recipe.load(write("x.yaml", text + "}}}]\n")).stage(0).policy.lora.rank == 4


@pytest.mark.parametrize(
    ("text", "teacher"),
    [
        ("stages: [sdft]", "average"),
        ("teacher: {model: other}\nstages: [sdft]", "other"),
        ("method: sdft\nstages: [gft]", "base"),
        ("method: sdft\nteacher: {model: other}\nstages: [opd]", "other"),
        ("stages: [{method: sdft, overrides: {teacher: {model: other}}}]", "other"),
    ],
)
def test_a_stage_has_the_teacher_of_its_method_unless_the_recipe_sets_one(text, teacher):
    recipe = Recipe.load(write("x.yaml", text + "\n"))
    assert recipe.stage(0).teacher.model == teacher
    assert Recipe.from_tree(yaml.safe_load(recipe.to_yaml())).stage(0).teacher.model == teacher


GREEDY = "or all self samples of a group are the same, got"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("method: grpo\nrollout: {temperature: 0}\n",
         f"x.yaml:2: rollout.temperature: must be above 0 with group.self 8, {GREEDY} 0."),
        ("rollout: {temperature: 0}\n",
         f"x.yaml:1: rollout.temperature: must be above 0 with group.self 4, {GREEDY} 0."),
        ("method: my.own:METHOD\nrollout: {temperature: 0.0}\n",
         f"x.yaml:2: rollout.temperature: must be above 0 with group.self 4, {GREEDY} 0.0."),
        ("group: {self: 2, shortfall: drop}\nrollout: {top_k: 1}\n",
         f"x.yaml:2: rollout.top_k: must not be 1 with group.self 2, {GREEDY} 1."),
        ("rollout: {top_p: 0.001}\n",
         f"x.yaml:1: rollout.top_p: must be at least 0.01 with group.self 4, {GREEDY} 0.001."),
        # Missing demonstrations would be replaced by several self samples.
        ("group: {self: 1}\nrollout: {temperature: 0}\n",
         f"x.yaml:2: rollout.temperature: must be above 0 with group.shortfall self, {GREEDY} 0."),
        ("stages: [sft, {method: gft, overrides: {rollout: {temperature: 0}}}]\n",
         f"x.yaml:1: rollout.temperature: must be above 0 with group.self 4, {GREEDY} 0. "
         "(stage 2)"),
        ("reward: {functions: [{name: math, weight: 0}, {name: format, weight: 0}]}\n",
         "x.yaml:1: reward.functions: must have a weight other than 0 with gft, "
         "got [{'name': 'math', 'weight': 0}, {'name': 'format', 'weigh...."),
    ],
)  # fmt: skip
def test_groups_that_teach_nothing(text: str, error: str):
    assert problems(text) == [error]


@pytest.mark.parametrize(
    "text",
    [
        "group: {self: 1, shortfall: drop}\nrollout: {temperature: 0}\n",
        "group: {self: 1, shortfall: repeat}\nrollout: {top_k: 1}\n",
        "method: sft\nrollout: {temperature: 0}\n",
        "method: grpo\ngroup: {self: 1}\nrollout: {temperature: 0}\n",
        "rollout: {temperature: 0.01}\n",
        "method: sft\nreward: {functions: [{name: math, weight: 0}]}\n",
        "reward: {functions: [{name: math, weight: 0}, {name: format, weight: -1}]}\n",
        "eval: {temperature: 0, samples: 1, k: [1]}\n",
    ],
)
def test_greedy_samples_and_weights_of_0_where_they_do_no_harm(text: str):
    Recipe.load(write("x.yaml", text))


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("rollout.temperature", "1e-9", "must be 0, which is greedy, or at least 0.01"),
        ("rollout.temperature", "1e308", "must be less than or equal to 100"),
        ("eval.temperature", "5e-324", "must be 0, which is greedy, or at least 0.01"),
        ("reward.functions", "[{name: math, weight: 1e308}]", "must be less than or equal to 1"),
        ("reward.functions", "[{name: math, weight: -1e7}]", "must be greater than or equal to -"),
        ("reward.workers", "999999999", "must be less than or equal to 1024"),
        ("reward.timeout", "1e308", "must be less than or equal to 86400"),
        ("policy.threads", "999999999", "must be less than or equal to 1024"),
        ("policy.lora.rank", "999999999", "must be less than or equal to 65536"),
        ("group.self", "999999999", "must be less than or equal to 10000"),
        ("rollout.batch_size", "999999999", "must be 'auto' or less than or equal to 1000000"),
        ("rollout.resample", "999999999", "must be less than or equal to 1000"),
        ("train.problems_per_step", "999999999", "must be less than or equal to 1000000"),
        ("eval.samples", "999999999", "must be less than or equal to 100000"),
        ("train.steps", "99999999999999999999", "must be a valid int"),
        ("train.memory", "0GiB", "must be auto or a size such as 8GiB"),
    ],
)
def test_values_that_would_exhaust_the_machine(field: str, value: str, rule: str):
    [error] = problems("seed: 1\n", f"{field}={value}")
    assert error.startswith(f"command line: {field}")
    assert rule in error


def test_a_whole_number_from_python_is_as_large_as_one_from_yaml():
    assert Recipe.from_tree({"train": {"steps": 2**64 - 1}}).train.steps == 2**64 - 1
    with pytest.raises(RecipeError, match=r"^train\.steps: must be a smaller number, got 1844674"):
        Recipe.from_tree({"train": {"steps": 2**64}})


def test_a_wrong_prompt_is_one_error_although_eval_sets_inherit_it():
    text = "data: {prompt: {template: x}}\neval: {sets: {a: {}, b: {}}}\n"
    assert problems(text) == ["x.yaml:1: data.prompt.template: must contain {problem}, got 'x'."]


def test_every_source_that_a_method_does_not_use_is_an_error():
    why = "with method grpo, which trains on self rows"
    assert problems("method: grpo\ngroup:\n  teacher: 2\n  expert: 1\n") == [
        f"x.yaml:3: group.teacher: must be 0 {why}, got 2.",
        f"x.yaml:4: group.expert: must be 0 {why}, got 1.",
    ]
    why = "with method sft_mix, which trains on expert and teacher rows"
    assert problems("group: {self: 4, shortfall: self}\n", "method=sft_mix") == [
        f"x.yaml:1: group.self: must be 0 {why}, got 4.",
        f"x.yaml:1: group.shortfall: must be repeat or drop {why}, got 'self'.",
    ]


def test_all_errors_at_once_in_the_order_of_the_files():
    write("base.yaml", "objective:\n  tao: 1\n")
    text = "extends: base.yaml\noptim:\n  lr: 0\n  lrr: 1\nseed: x\n"
    assert problems(text, "train.steps=0") == [
        "base.yaml:2: objective.tao: unknown field, got 1. Did you mean objective.tau?",
        "command line: train.steps: must be greater than 0, got 0.",
        "x.yaml:3: optim.lr: must be 'auto' or greater than 0, got 0.",
        "x.yaml:4: optim.lrr: unknown field, got 1. Did you mean optim.lr?",
        "x.yaml:5: seed: must be a whole number, got 'x'.",
    ]


def test_an_error_in_a_list_that_was_replaced_points_to_the_new_list():
    write("base.yaml", "reward:\n  functions:\n    - name: math\n    - name: math\n")
    text = "extends: base.yaml\n\n\nreward:\n  functions:\n    - weight: 2\n"
    assert problems(text) == ["x.yaml:6: reward.functions.0.name: is required, got nothing."]


def test_many_errors_fill_one_screen():
    with pytest.raises(RecipeError) as caught:
        Recipe.from_tree({f"zzz{i}": i for i in range(100)})
    assert len(caught.value.problems) == 100
    lines = str(caught.value).splitlines()
    assert (len(lines), lines[-1]) == (21, "... and 80 more errors.")
    again = copy.copy(caught.value)  # by the protocol that carries errors between processes
    assert (type(again), again.problems, str(again)) == (
        RecipeError,
        caught.value.problems,
        str(caught.value),
    )


def test_a_tree_from_python_has_no_places():
    with pytest.raises(RecipeError) as caught:
        Recipe.from_tree({"objective": {"tao": 1}, 3: 4})  # type: ignore[dict-item]
    assert caught.value.problems == [
        "objective.tao: unknown field, got 1. Did you mean objective.tau?",
        "recipe: must have text as keys, got 3.",
    ]
    with pytest.raises(RecipeError, match=r"^seed: must be a smaller number, got a very long nu"):
        Recipe.from_tree({"seed": 2**20_000})
    with pytest.raises(RecipeError, match=r"^recipe: must be a section of fields, got \[\]\.$"):
        Recipe.from_tree([])  # type: ignore[arg-type]


# --- the text of errors: overrides -----------------------------------------------------------


def test_every_wrong_override_is_reported():
    overrides = ["optim.lr", "=5", "optim..lr=1", "optim.lrr=1", "extends=a.yaml", "seed=[1",
                 "objectiv.tau=1", "seed.x=1", "optim={lr: 1, lr: 2}", "group={1: 2}"]  # fmt: skip
    assert problems("optim: {warmup: 7}\n", *overrides) == [
        "command line: must be key=value, got 'optim.lr'.",
        "command line: must be key=value, got '=5'.",
        "command line: must be key=value, got 'optim..lr=1'.",
        "command line: extends: must be written in a file, got 'extends=a.yaml'.",
        "command line: seed: must be valid YAML, got '[1' (expected ',' or ']', but got "
        "'<stream end>').",
        "command line: optim.lr: must be written once, got a second one.",
        "command line: group: must have text as keys, got '1'. Put it in quotes.",
        "command line: seed: must be a whole number, got a section.",
        "command line: optim.lrr: unknown field, got 1. Did you mean optim.lr?",
        "command line: objectiv: unknown field, got a section. Did you mean objective?",
        "x.yaml:1: optim.warmup: must be less than 1, got 7.",
    ]


def test_an_error_inside_an_overridden_section_is_the_command_lines():
    assert problems("objective:\n  tau: 0.5\n", "objective={tau: -1}") == [
        "command line: objective.tau: must be greater than or equal to 0, got -1."
    ]


# --- the text of errors: files ---------------------------------------------------------------

FILES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "x.yaml: must hold fields such as `method: gft`, got an empty file."),
    "comment": ("# a\n", "x.yaml: must hold fields such as `method: gft`, got an empty file."),
    "list": ("- a\n", "x.yaml: must hold fields such as `method: gft`, got a list."),
    "text": ("gft\n", "x.yaml: must hold fields such as `method: gft`, got a str."),
    "binary": (b"\x80\x81", "x.yaml: must be a text file in UTF-8, got invalid start byte."),
    "control": ("a: 1\nb: \x00\n", "x.yaml:2: must be text, got the character '\\x00'."),
    "tab": (
        "optim:\n\tlr: 1\n",
        "x.yaml:2: must be valid YAML, got '\\tlr: 1' (found character '\\t' that cannot start "
        "any token). Indent with spaces, not tabs.",
    ),
    "syntax": (
        "seed: 1\noptim: [1\n",
        "x.yaml:3: must be valid YAML, got '' (expected ',' or ']', but got '<stream end>').",
    ),
    "colon": (
        "seed: 1\nname: a: b\n",
        "x.yaml:2: must be valid YAML, got 'name: a: b' (mapping values are not allowed here).",
    ),
    "alias": (
        "seed: *a\n",
        "x.yaml:1: must be valid YAML, got 'seed: *a' (found undefined alias 'a').",
    ),
    "tag": (
        "seed: 1\nname: !!python/object:os.system x\n",
        "x.yaml:2: must be valid YAML, got 'name: !!python/object:os.system x' (could not "
        "determine a constructor for the tag 'tag:yaml.org,2002:python/object:os.system').",
    ),
    "twice": (
        "optim:\n  lr: 1\n  warmup: 0\n  lr: 2\n",
        "x.yaml:4: optim.lr: must be written once, got a second one.",
    ),
    "section twice": (
        "optim:\n  lr: 1\noptim:\n  warmup: 0\n",
        "x.yaml:3: optim: must be written once, got a second one.",
    ),
    "number key": (
        "seed: 1\n5: 2\n", "x.yaml:2: recipe: must have text as keys, got '5'. Put it in quotes."
    ),
    "true key": (
        "eval:\n  sets:\n    on: {source: lab}\n",
        "x.yaml:3: eval.sets: must have text as keys, got 'on'. Put it in quotes.",
    ),
    "null key": (
        "~: 1\n", "x.yaml:1: recipe: must have text as keys, got '~'. Put it in quotes."
    ),
    "list key": (
        "? [a]\n: 1\n",
        "x.yaml:1: recipe: must have text as keys, got a list or section. Put it in quotes.",
    ),
    "date": (
        "seed: 1\nname: 2024-13-45\n",
        "x.yaml:2: name: must be a valid timestamp, got '2024-13-45'. For text, put it in quotes.",
    ),
    "long number": (
        "seed: 0x" + "f" * 5000,
        f"x.yaml:1: seed: must be a valid int, got '0x{'f' * 54}.... For text, put it in quotes.",
    ),
    "bool": (
        "seed: !!bool maybe\n",
        "x.yaml:1: seed: must be a valid bool, got 'maybe'. For text, put it in quotes.",
    ),
    "deep": ("a: " + "[" * 30 + "]" * 30, "must not be nested more than 20 deep, got more."),
    "very deep": (
        "a: " + "[" * 40_000,
        "x.yaml: must be valid YAML, got values nested more than 20 deep.",
    ),
    "loop": ("a: &a [*a]\n", "x.yaml:1: a: must not be nested more than 20 deep, got more."),
    "large": ("a: " + "x" * 200_000, "x.yaml: must be smaller than 100 kB, got 200 kB."),
    "laughs": (
        "a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 15)),
        "must hold at most 10000 values, got more (aliases count).",
    ),
    "merged laughs": (
        "a0: &a0 {k: 1}\n"
        + "".join(
            f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 15)
        ),
        "must hold at most 10000 values, got more (aliases count).",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_the_text_of_an_error_in_a_file(name: str):
    content, expected = FILES[name]
    found = problems(content)
    assert len(found) == 1
    assert found[0].startswith("x.yaml:")
    assert found[0].endswith(expected)


def test_every_error_of_a_large_file_is_reported():
    path = write("x.yaml", "".join(f"k{i:05}: {{a: [1]}}\n" for i in range(3000)))
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    assert len(caught.value.problems) == 3000


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read():
    path = write("x.yaml", "seed: 1\n")
    path.chmod(0)
    with pytest.raises(RecipeError, match=r"^x.yaml: must be a readable file, got Permission"):
        Recipe.load(path)


# --- the text of errors: extends -------------------------------------------------------------


def test_every_missing_base_and_every_wrong_field_is_reported():
    write("configs/models/qwen.yaml", "seed: 1\n")
    write("configs/empty.yaml", "")
    text = (
        "extends:\n  - ../configs/models/qwem.yaml\n  - ../configs/empty.yaml\n  - nope\n"
        "objective:\n  tao: 1\npolicy: {reference: adapter}\n"
    )
    with pytest.raises(RecipeError) as caught:
        Recipe.load(write("recipes/x.yaml", text))
    # No error about policy.adapter, which the missing base may set.
    assert caught.value.problems == [
        "recipes/x.yaml:2: extends: must be a recipe file, got '../configs/models/qwem.yaml', "
        "which does not exist. Did you mean ../configs/models/qwen.yaml?",
        "configs/empty.yaml: must hold fields such as `method: gft`, got an empty file.",
        "recipes/x.yaml:4: extends: must be a recipe file, got 'nope', which does not exist.",
        "recipes/x.yaml:6: objective.tao: unknown field, got 1. Did you mean objective.tau?",
    ]


def test_extends_must_be_files():
    assert problems("seed: 1\nextends: {a: 1}\n") == [
        "x.yaml:2: extends: must be a list of files, got a section."
    ]
    assert problems("extends: [1]\n") == ["x.yaml:1: extends: must be a list of files, got [1]."]


def test_extends_must_not_be_circular():
    write("b.yaml", "seed: 1\n\nextends: [x.yaml]\n")
    assert problems("extends: b.yaml\n") == [
        "b.yaml:3: extends: must not be circular, got x.yaml -> b.yaml -> x.yaml."
    ]
    assert problems("extends: x.yaml\n") == [
        "x.yaml:1: extends: must not be circular, got x.yaml -> x.yaml."
    ]


def test_a_base_extended_many_times_over_is_read_once():
    write("b0.yaml", "seed: 1\nobjective: {tao: 1}\n")
    for i in range(1, 40):
        write(f"b{i}.yaml", f"extends: [b{i - 1}.yaml, b{i - 1}.yaml]\nseed: {i}\n")
    assert problems("extends: b39.yaml\n") == [
        "b0.yaml:2: objective.tao: unknown field, got 1. Did you mean objective.tau?"
    ]


# --- lightness -------------------------------------------------------------------------------


def test_a_recipe_and_its_errors_import_no_large_library():
    write("x.yaml", "method: gft\nreward: {functions: math}\nobjective: {tao: 1}\n")
    code = (
        "import sys\nfrom gft_lite.recipe.schema import Recipe, RecipeError\n"
        "try: Recipe.load('x.yaml')\nexcept RecipeError as error: print(error)\n"
        "Recipe.load('recipes/lab.yaml')\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'peft', 'vllm', 'math_verify'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stderr == ""
    assert ran.stdout.splitlines() == [
        "x.yaml:3: objective.tao: unknown field, got 1. Did you mean objective.tau?", "[]",
    ]  # fmt: skip


def test_methods_without_rewards_need_no_answers():
    columns = {"columns": {"answer": None}}
    recipe = Recipe.from_tree({"method": "sft", "data": columns})
    assert recipe.reward.answer_rule(recipe.data.columns) == (
        "must name a column, as reward math compares with it"
    )
    columns["columns"]["problem"] = "question"
    tree = {"method": "sft", "data": columns, "eval": {"sets": {"a": columns}}}
    with pytest.raises(RecipeError, match=r"eval\.sets\.a\.columns\.answer: must name a column"):
        Recipe.from_tree(tree)
    columns["columns"]["expert"] = ["solution"]  # Its likelihood can be measured.
    assert Recipe.from_tree(tree).eval_names == ["a"]


def test_the_variables_of_a_template_are_kept_as_they_are(tmp_path: Path):
    override = "data.prompt={style: chat, chat_template_kwargs: {x: false, n: 3, of: [a, null]}}"
    more = "data.prompt.chat_template_kwargs.mode=deep"
    (tmp_path / "x.yaml").write_text("eval: {sets: {a: {}, b: {prompt: {}}}}\n")
    recipe = Recipe.load(tmp_path / "x.yaml", [override, more])
    variables = {"x": False, "n": 3, "of": ["a", None], "mode": "deep"}
    assert recipe.data.prompt.chat_template_kwargs == variables
    assert recipe.eval.sets["a"].prompt.chat_template_kwargs == variables
    assert recipe.eval.sets["b"].prompt.chat_template_kwargs == {}
    (tmp_path / "y.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "y.yaml") == recipe


def test_sets_are_merged_and_null_removes_them(tmp_path: Path):
    def sets(*overrides: str) -> list[str]:
        return list(Recipe.load(file, overrides).eval.sets)

    file = tmp_path / "x.yaml"
    file.write_text("extends: recipes/lab.yaml\ndata: {prompt: {template: 'Q {problem}'}}\n")
    assert sets("eval.sets={}") == sets("eval.sets.test={}") == ["test", "retention"]
    assert sets("eval.sets.test=null") == ["retention"]
    assert sets("eval.sets=null") == []
    assert sets("eval.sets=null", "eval.sets.mine={source: lab}") == ["mine"]
    file.write_text("extends: recipes/lab.yaml\neval: {sets: {test: null, b: {source: lab}}}\n")
    assert sets() == ["retention", "b"]


def test_evaluation_has_the_training_prompt_by_default():
    tree = {
        "data": {"prompt": {"template": "Q: {problem}"}},
        "eval": {"sets": {"a": {}, "b": {"prompt": {"template": "{problem}?"}}}},
    }
    recipe = Recipe.from_tree(tree)
    assert recipe.eval.sets["a"].prompt.template == "Q: {problem}"
    assert recipe.eval.sets["b"].prompt.template == "{problem}?"


# --- what auto means -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "cuda_available", "expected"),
    [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu"),
     ("cuda:1", False, "cuda:1")],
)  # fmt: skip
def test_the_device_that_auto_is(device: str, cuda_available: bool, expected: str):
    policy = Recipe.from_tree({"policy": {"device": device}}).policy
    assert policy.resolved_device(cuda_available=cuda_available) == expected


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [("auto", "cpu", "float32"), ("auto", "cuda", "bfloat16"), ("auto", "cuda:1", "bfloat16"),
     ("float16", "cpu", "float16"), ("float32", "cuda", "float32")],
)  # fmt: skip
def test_the_dtype_that_auto_is(dtype: str, device: str, expected: str):
    policy = Recipe.from_tree({"policy": {"dtype": dtype}}).policy
    assert policy.resolved_dtype(device) == expected


@pytest.mark.parametrize(
    ("dtype", "policy", "device", "cpu_has_bf16", "expected"),
    [
        ("auto", "float32", "cpu", True, "bfloat16"),
        ("auto", "float32", "cpu", False, "float32"),
        ("auto", "bfloat16", "cpu", False, "bfloat16"),
        ("auto", "float32", "cuda", True, "float32"),
        ("auto", "float16", "cuda", False, "float16"),
        ("float32", "bfloat16", "cpu", True, "float32"),
        ("bfloat16", "float32", "cpu", False, "bfloat16"),
    ],
)
def test_the_dtype_of_vllm(dtype, policy, device, cpu_has_bf16, expected):
    rollout = Recipe.from_tree({"rollout": {"dtype": dtype}}).rollout
    assert rollout.resolved_dtype(policy, device, cpu_has_bf16=cpu_has_bf16) == expected


@pytest.mark.parametrize(
    "engine",
    ["engine: transformers", "engine: unsloth", "engine: vllm_server, servers: ['http://h:1']"],
)
def test_the_dtype_of_an_engine_without_a_copy_of_the_base_is_an_error(engine: str):
    [problem] = problems(f"rollout: {{{engine}, dtype: bfloat16}}\n")
    assert "rollout.dtype: must be auto where the run starts no vLLM" in problem
    assert problem.endswith("got 'bfloat16'.")


@pytest.mark.parametrize(
    ("name", "device", "paged"),
    [("auto", "cpu", False), ("auto", "cuda:0", True), ("adamw", "cuda", False),
     ("paged_adamw_8bit", "cuda", True), ("paged_adamw_8bit", "cpu", True)],
)  # fmt: skip
def test_when_the_optimiser_is_paged(name: str, device: str, paged: bool):
    assert Recipe.from_tree({"optim": {"name": name}}).optim.is_paged(device) is paged
