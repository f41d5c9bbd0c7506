"""Every shipped recipe resolves and runs two steps on the tiny base; GSM8K with the real vLLM."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from rich.console import Console

from gft_lite import lab
from gft_lite.recipe.schema import Recipe
from gft_lite.training.run import train

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "recipes"
# Sweeps are no recipes: `gft-lite sweep` reads them.
RECIPES = sorted(p.relative_to(SHIPPED).as_posix() for p in SHIPPED.glob("**/*.yaml")
                 if p.parent.name != "sweeps")  # fmt: skip
PAPER = [name for name in RECIPES if name.startswith("paper/")]
MODELS = ["qwen2.5-math-1.5b", "qwen2.5-math-7b", "llama-3.2-3b", "llama-3.1-8b",
          "deepseek-math-7b"]  # fmt: skip
ONE_A_PROBLEM = ["sft", "dft", "asft", "psft"]
GROUPS = ["grpo", "gft", "gft_no_mix"]
CELLS = [*ONE_A_PROBLEM, "sft_mix", *GROUPS]
# Of the 1.5B model only.
MIXED = ["sft_rl", "luffy", "srft", "chord", "hpt", "rl_plus", "relift", "prefix_rft", "uft",
         "sdft", "opd"]  # fmt: skip
CELLS_OF = dict.fromkeys(MODELS, CELLS) | {"qwen2.5-math-1.5b": CELLS + MIXED}
STAGES = [name for name in PAPER if name.startswith("paper/stages/")]
# Suites are no parts of recipes: `gft-lite eval` reads them.
FRAGMENTS = sorted(p for p in (ROOT / "configs").glob("*/*.yaml") if p.parent.name != "suites")
QUIET = Console(quiet=True)
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed"
)
TINY = [
    "policy={model: lab, context: 1024, dtype: float32}", "train.steps=2",
    "train.problems_per_step=2", "data.holdout=2", "monitor={every: 1, problems: 2}",
    "eval.samples=1", "eval.k=[1]", "checkpoint.every=1",
]  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_it_resolves(name):
    recipe = Recipe.load(f"recipes/{name}")
    assert recipe.name == name.removesuffix(".yaml").replace("/", "-")


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_fragment_can_be_extended(path, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"extends: [{path}]\n")
    Recipe.load(recipe)


@pytest.mark.parametrize("name", [n for n in RECIPES if n.startswith("lab")])
def test_the_lab_recipes_run(name, tmp_path):
    small = ["eval.sets.test.problems=2", "eval.sets.retention.problems=2", "data.problems=40"]
    # The lab recipes name their model themselves.
    run = train(Recipe.load(f"recipes/{name}", [*TINY[1:], *small]), tmp_path, console=QUIET)
    assert len(run.metrics()) == 2


@pytest.mark.parametrize("name", [n for n in RECIPES if n.startswith("real/")])
def test_the_recipes_of_real_models_run_on_a_file_with_the_hubs_columns(name, tmp_path):
    """As `policy.model=FOLDER data.source=FILE` does it, with the columns of openai/gsm8k."""
    rows = [
        {"question": row["problem"], "answer": f"It is {row['answer']}.\n#### {row['answer']}"}
        for row in lab.rows("train", limit=24)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"data.source={file}", "rollout.engine=transformers", "rollout.max_tokens=48"]
    recipe = Recipe.load(f"recipes/{name}", [*TINY, *words])
    assert recipe.data.prompt.style == "chat"
    run = train(recipe, tmp_path / "run", console=QUIET)
    assert [sorted(m["sources"]) for m in run.metrics()] == [["expert", "self"]] * 2


@pytest.fixture
def math_rows(tmp_path):
    """The lab's problems in the columns that a data set with teachers has."""
    rows = [
        {"question": r["problem"], "gold": r["answer"],
         "expert": f"The final answer is $\\boxed{{{r['answer']}}}$.", "teacher": r["teacher"]}
        for r in lab.rows("train", limit=24)
    ]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = "{problem: question, answer: gold, expert: expert, teacher: teacher}"
    return [f"data.source={file}", f"data.columns={columns}", "data.problems=20"]


def cell(model, method):
    return Recipe.load(f"recipes/paper/{model}/{method}.yaml")


class TestThePapersRecipes:
    def test_every_model_meets_every_method(self):
        folders = {name.split("/")[1] for name in PAPER}
        assert folders == {*MODELS, "ablations", "ratio", "stages", "tau"}
        for model in MODELS:
            cells = sorted(p.stem for p in (SHIPPED / "paper" / model).iterdir())
            assert cells == sorted(CELLS_OF[model])
            for method in cells:
                recipe = cell(model, method)
                assert recipe.method == method
                assert recipe.policy.model.lower().rpartition("/")[2].startswith(model)

    @pytest.mark.parametrize("name", PAPER)
    def test_prompt_and_response_fit_the_model(self, name):
        recipe = Recipe.load(f"recipes/{name}")
        room = recipe.policy.context - recipe.data.max_prompt_tokens
        assert room >= max(recipe.rollout.max_tokens, recipe.eval.max_tokens)
        if not recipe.policy.model.startswith("meta-llama/"):
            assert recipe.policy.context == 4096

    @pytest.mark.parametrize("model", MODELS)
    def test_ten_thousand_groups_of_eight_against_a_hundred_thousand_singles(self, model):
        spent = {}
        for method in CELLS_OF[model]:
            recipe = cell(model, method)
            visits = recipe.data.problems - recipe.data.holdout
            spent[method] = (visits, recipe.group.size)
            assert visits * recipe.group.size == recipe.budget.trajectories
            # The last step may be cut short by the budget, no other.
            assert 0 <= recipe.steps * recipe.train.problems_per_step - visits < 256
        assert spent == {
            **dict.fromkeys(ONE_A_PROBLEM, (100_000, 1)),
            "sft_mix": (25_000, 4),
            **dict.fromkeys([*GROUPS, *(set(CELLS_OF[model]) - set(CELLS))], (10_000, 8)),
        }

    @pytest.mark.parametrize("model", MODELS)
    def test_only_the_method_differs(self, model):
        """Policy, prompts, lengths, reward, reduction, schedule and evaluation are the same."""
        shared = []
        for method in CELLS_OF[model]:
            tree = cell(model, method).model_dump()
            shared.append({
                **{key: tree[key] for key in ("seed", "policy", "reward", "rollout", "eval")},
                "data": {k: v for k, v in tree["data"].items() if k != "problems"},
                "optim": {k: v for k, v in tree["optim"].items() if k != "lr"},
                "reduction": tree["objective"]["reduction"],
            })  # fmt: skip
        assert all(each == shared[0] for each in shared)

    def test_all_ratios_are_of_groups_of_eight(self):
        names = [name for name in PAPER if name.startswith("paper/ratio/")]
        assert len(names) == 5
        for name in names:
            recipe = Recipe.load(f"recipes/{name}")
            group = recipe.group
            assert name == f"paper/ratio/demo{group.expert + group.teacher}_self{group.self}.yaml"
            assert (group.size, recipe.method) == (8, "gft")
            # With `self`, a problem with few teachers would change its group's ratio.
            assert group.shortfall == "repeat" or group.self == 8

    def test_tau_is_all_that_differs_in_the_sweep(self):
        names = [name for name in PAPER if name.startswith("paper/tau/")]
        main = cell("qwen2.5-math-1.5b", "gft").model_dump()
        taus = []
        for name in names:
            tree = Recipe.load(f"recipes/{name}").model_dump()
            taus.append(tree["objective"]["tau"])
            assert tree["name"] == f"paper-tau-tau_{taus[-1]:g}"
            tree["objective"]["tau"], tree["name"] = main["objective"]["tau"], main["name"]
            assert tree == main
        assert sorted(taus) == [0, 0.1, 0.3, 0.5, 0.7, 0.9, 1]

    @pytest.mark.parametrize("name", STAGES)
    def test_each_stage_is_the_cell_of_its_method(self, name):
        recipe = Recipe.load(f"recipes/{name}")
        methods = [stage.method for stage in recipe.stages]
        assert name == f"paper/stages/{'_'.join(methods)}.yaml"
        for number, method in enumerate(methods):
            alone = cell("qwen2.5-math-1.5b", method).model_dump()
            assert recipe.stage(number).model_dump() == {**alone, "name": recipe.name}

    @pytest.mark.parametrize(
        "name",
        [*(f"qwen2.5-math-1.5b/{method}" for method in ("psft", "sft_mix", "grpo", "gft")),
         "ratio/demo8_self0"],
    )  # fmt: skip
    def test_it_runs_two_steps_on_a_tiny_model(self, name, small_paper, tmp_path):
        """One of each composition; every method trains in test_train.py."""
        file = f"recipes/paper/{name}.yaml"
        updates = min(Recipe.load(file).train.updates_per_rollout, 2)
        overrides = [*small_paper, f"train.updates_per_rollout={updates}"]
        recipe = Recipe.load(file, overrides)
        run = train(recipe, tmp_path / "run", console=QUIET)
        group = recipe.group
        wanted = {"expert": group.expert, "teacher": group.teacher, "self": group.self}
        assert len(run.metrics()) == 2
        for metrics in run.metrics():
            assert metrics["trajectories"] == 2 * group.size
            assert metrics["sources"] == {s: 2 * n for s, n in wanted.items() if n}
            # The tiny base solves none of these, so that GRPO's groups are flat.
            assert metrics["updates"] == (0 if recipe.method == "grpo" else updates)
        assert "math500" in json.loads((run.path / "eval" / "trained.json").read_text())

    def test_stages_run_on_a_tiny_model(self, small_paper, tmp_path):
        file = "recipes/paper/stages/sft_gft_grpo.yaml"
        # The stages' own budgets would win over those of the command line.
        methods = [stage.method for stage in Recipe.load(file).stages]
        recipe = Recipe.load(file, [*small_paper, f"stages={methods}"])
        run = train(recipe, tmp_path / "run", console=QUIET)
        assert run.summary()["method"] == "sft > gft > grpo"
        assert run.summary()["trajectories"] == 2 * 2 * (1 + 8 + 8)


@pytest.fixture
def small_paper(math_rows):
    """Overrides that leave a paper recipe its method and its composition, two steps long."""
    source = math_rows[0].partition("=")[2]
    columns = "{problem: question, answer: gold}"
    return [
        *TINY, *math_rows, "budget={trajectories: null, problems: 4}", "rollout.max_tokens=64",
        "rollout.engine=transformers", "eval.max_tokens=8", "monitor.every=2",
        f"eval.sets.math500={{source: {source}, columns: {columns}, problems: 2}}",
    ]  # fmt: skip


def test_the_papers_experiment_runs_with_a_tiny_model(small_paper, tmp_path):
    recipe = Recipe.load("recipes/qwen_math_1p5b.yaml", small_paper)
    run = train(recipe, tmp_path / "run", console=QUIET)
    recipe = Recipe.load(run.path / "recipe.yaml")
    assert (recipe.objective.tau, recipe.group.size) == (0.7, 8)
    assert recipe.policy.quantization == "nf4"
    for metrics in run.metrics():
        assert metrics["trajectories"] == 16
        assert metrics["reward"]["expert"] == 1.0


@needs_vllm
def test_gsm8k_with_vllm_and_math_verify(shared_data, tmp_path):
    source = shared_data / "bench" / "gsm8k_train.jsonl"
    columns = "{problem: problem, answer: answer, answer_from: plain, expert: solution}"
    overrides = [f"data.source={source}", f"data.columns={columns}", "data.problems=30",
                 "rollout.dtype=float32"]  # fmt: skip
    run = train(Recipe.load("recipes/gsm8k_tiny.yaml", overrides), tmp_path / "run", console=QUIET)
    assert Recipe.load(run.path / "recipe.yaml").rollout.engine == "vllm"
    assert len(run.metrics()) == 3
    for metrics in run.metrics():
        assert metrics["sync_gap"] < 1e-4
        assert metrics["rollout_tokens"] > 0
    experts = [r for s in (1, 2, 3) for g in run.groups(s) for r in g["responses"]
               if r["source"] == "expert" and r["finish_reason"] == "stop"]  # fmt: skip
    assert all(r["reward"] == 1.0 for r in experts)


@needs_vllm
def test_the_lab_with_vllm_hot_loading_after_every_step(tmp_path):
    small = ["train.steps=5", "optim.lr=4e-3", "optim.warmup=0", "data.problems=60",
             "eval.sets.test.problems=2", "eval.sets.retention.problems=2",
             "rollout.engine=vllm", "rollout.dtype=float32"]  # fmt: skip
    run = train(Recipe.load("recipes/lab.yaml", [*TINY[2:], *small]), tmp_path, console=QUIET)
    metrics = run.metrics()
    assert max(m["sync_gap"] for m in metrics) < 1e-4
    assert metrics[-1]["kl"]["rollouts"]["reverse"] > 1e-3
    assert not run.scratch.exists()
