"""Parameters of a method's loss in `objective:`: checked, completed, bound."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from gft_lite.objective.losses import LossInputs, LossOutput
from gft_lite.objective.methods import METHODS
from gft_lite.recipe import objective_schema
from gft_lite.recipe.method_parameters import bind_method, complete_objective
from gft_lite.recipe.schema import Recipe
from gft_lite.utils.errors import RecipeError

MODULE = """
from typing import Literal
from gft_lite.objective.methods import METHODS, Method

def loss(inputs, *, sharpness: float = 2.0, tau: float = 0.3, steps: int,
         mode: Literal["soft", "hard"] = "soft", weights: list[float] | None = None, free=None):
    return inputs.logprobs

def unreadable(inputs, *, mask: "NoSuchType" = None): ...

def of_no_yaml(inputs, *, module: type(loss) = None): ...

MINE = Method(loss, ("expert", "teacher", "self"), "mine")
UNREADABLE, OF_NO_YAML = (Method(f, ("self",), "mine") for f in (unreadable, of_no_yaml))
OTHER = 5
"""


@pytest.fixture(autouse=True)
def _own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_methods.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_methods", None)


def load(text: str) -> Recipe:
    Path("x.yaml").write_text(text)
    return Recipe.load("x.yaml")


def errors_of(recipe: Recipe) -> list[str]:
    """The errors of a dotted method's `objective:`, the same from both functions."""
    texts = []
    for check in (complete_objective, bind_method):
        with pytest.raises(RecipeError) as caught:
            check(recipe)
        texts.append(caught.value.problems)
    assert texts[0] == texts[1]
    return texts[0]


# --- a dotted method -------------------------------------------------------------------------


def test_a_recipe_with_a_dotted_method_is_read_without_its_module():
    recipe = load("method: no_such_module:MINE\nobjective: {anything: [1, 2], tau: 0.5}\n")
    assert recipe.objective.model_dump()["anything"] == [1, 2]
    load("method: own_methods:MINE\nobjective: {sharpness: 1}\n")
    assert "own_methods" not in sys.modules
    assert errors_of(recipe)[0].startswith("method: module must be importable, got No module")


def test_defaults_are_the_losss_and_the_saved_recipe_has_them_all():
    recipe = load("method: own_methods:MINE\nobjective: {steps: 3, kl: 0.5}\n")
    bound = {"sharpness": 2.0, "tau": 0.3, "steps": 3, "mode": "soft", "weights": None,
             "free": None}  # fmt: skip
    assert bind_method(recipe) == bound
    complete = complete_objective(recipe)
    found = complete.objective.model_dump()
    assert found == Recipe().objective.model_dump() | bound | {"kl": 0.5}
    assert complete_objective(complete) == complete
    assert load(complete.to_yaml()) == complete
    assert bind_method(load(complete.to_yaml())) == bound


def test_what_the_recipe_sets_wins():
    text = "method: own_methods:MINE\nobjective: {steps: 4, tau: 0.7, mode: hard, weights: [1]}\n"
    bound = bind_method(load(text))
    assert (bound["steps"], bound["tau"], bound["mode"]) == (4, 0.7, "hard")
    assert bound["weights"] == [1.0] and type(bound["weights"][0]) is float


@pytest.mark.parametrize(
    ("written", "error"),
    [
        ("sharpnes: 1", "objective.sharpnes: unknown field, got 1. "
         "Did you mean objective.sharpness?"),
        ("clip_hihg: 1", "objective.clip_hihg: unknown field, got 1. "
         "Did you mean objective.clip_high?"),
        ("sharpness: strong", "objective.sharpness: must be a number, got 'strong'."),
        ("sharpness: true", "objective.sharpness: must be a number, got true."),
        ("sharpness: .inf", "objective.sharpness: must be a finite number, got inf."),
        ("steps: 1.5", "objective.steps: must be a whole number, got 1.5."),
        ("mode: sofd", "objective.mode: must be 'soft' or 'hard', got 'sofd'. Did you mean soft?"),
        ("weights: [a]", "objective.weights.0: must be a number, got 'a'."),
        ("tau: -1", "x.yaml:2: objective.tau: must be greater than or equal to 0, got -1."),
    ],
)  # fmt: skip
def test_an_unknown_or_mistyped_parameter(written: str, error: str):
    text = f"method: own_methods:MINE\nobjective: {{steps: 1, {written}}}\n"
    if error.startswith("x.yaml"):  # The recipe's own field: its rule needs no module.
        with pytest.raises(RecipeError) as caught:
            load(text)
        assert caught.value.problems == [error]
    else:
        assert errors_of(load(text.replace("steps: 1, steps", "steps"))) == [error]


def test_a_parameter_without_a_default_is_required():
    assert errors_of(load("method: own_methods:MINE\n")) == [
        "objective.steps: is required, got nothing."
    ]


@pytest.mark.parametrize("name", ["UNREADABLE", "OF_NO_YAML"])
def test_types_that_yaml_has_not(name: str):
    [error] = errors_of(load(f"method: own_methods:{name}\n"))
    assert error.startswith("method: the parameters of the loss must have types that YAML has")


def test_a_name_that_is_no_method():
    [error] = errors_of(load("method: own_methods:OTHER\n"))
    assert error.endswith("got a int, got 'own_methods:OTHER'.")


def test_stages_are_checked_before_the_first_begins():
    stages = "stages: [sft, {method: own_methods:MINE, overrides: {objective: {stepz: 1}}}]\n"
    with pytest.raises(RecipeError) as caught:
        complete_objective(load(stages))
    assert caught.value.problems == [
        "objective.steps: is required, got nothing.",
        "objective.stepz: unknown field, got 1. Did you mean objective.steps?",
    ]
    right = load(stages.replace("stepz", "steps"))
    assert complete_objective(right) == right
    assert bind_method(right.stage(1))["steps"] == 1


# --- a built-in method -----------------------------------------------------------------------


def sharpened_loss(
    inputs: LossInputs, *, tau: float = 0.7, sharpness: float = 2.0,
    mode: Literal["soft", "hard"] = "soft",
) -> LossOutput:  # fmt: skip
    return LossOutput(inputs.logprobs)


@pytest.fixture
def sharpened(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A built-in method with parameters that ObjectiveSettings does not have."""
    objective_schema.builtin_schema.cache_clear()
    monkeypatch.setitem(METHODS, "sharpened", replace(METHODS["gft"], loss=sharpened_loss))
    yield
    objective_schema.builtin_schema.cache_clear()


@pytest.mark.usefixtures("sharpened")
def test_a_built_in_method_is_complete_when_it_is_read():
    recipe = load("method: sharpened\nobjective: {mode: hard}\n")
    assert bind_method(recipe) == {"tau": 0.7, "sharpness": 2.0, "mode": "hard"}
    assert "sharpness: 2.0" in recipe.to_yaml()
    assert load(recipe.to_yaml()) == recipe == complete_objective(recipe)
    assert bind_method(load("method: sharpened\n"))["sharpness"] == 2.0
    # Another method's recipe does not have it.
    assert "sharpness" not in load("method: gft\n").to_yaml()


@pytest.mark.usefixtures("sharpened")
def test_errors_of_a_built_in_method_have_file_and_line():
    text = (
        "method: sharpened\nobjective:\n  sharpnes: 1\n  sharpness: much\n  mode: sofd\n"
        "  tau: -1\nseed: x\n"
    )
    with pytest.raises(RecipeError) as caught:
        load(text)
    assert caught.value.problems == [
        "x.yaml:3: objective.sharpnes: unknown field, got 1. Did you mean objective.sharpness?",
        "x.yaml:4: objective.sharpness: must be a number, got 'much'.",
        "x.yaml:5: objective.mode: must be 'soft' or 'hard', got 'sofd'. Did you mean soft?",
        "x.yaml:6: objective.tau: must be greater than or equal to 0, got -1.",
        "x.yaml:7: seed: must be a whole number, got 'x'.",
    ]
    with pytest.raises(RecipeError, match=r"x\.yaml:2: objective\.sharpness: unknown field"):
        load("method: gft\nobjective: {sharpness: 1}\n")


@pytest.mark.usefixtures("sharpened")
def test_a_stages_own_parameters_are_its_methods():
    text = "method: gft\nstages: [gft, {method: sharpened, overrides: {objective: {mode: hard}}}]\n"
    recipe = load(text)
    assert bind_method(recipe.stage(1)) == {"tau": 0.7, "sharpness": 2.0, "mode": "hard"}
    assert bind_method(recipe.stage(0)) == {"tau": 0.7}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gets_the_keyword_arguments_of_its_loss(method: str):
    recipe = Recipe.from_tree({"method": method, "teacher": {"model": "an/other"}})
    assert bind_method(recipe) == {
        name: getattr(recipe.objective, name) for name in METHODS[method].parameters
    }
