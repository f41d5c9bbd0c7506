"""`gft-lite train` on the lab, as a user runs it: files, resume, every method, bad gradients."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from gft_lite.cli import main
from gft_lite.objective.methods import METHODS
from gft_lite.policy.batching import Row
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.schema import Recipe
from gft_lite.runs.folder import RunFolder
from gft_lite.training.learner import Learner
from gft_lite.training.loop import TrainError
from gft_lite.training.run import train
from gft_lite.types import Group, Problem, Response, ScoredGroup
from gft_lite.utils.errors import RecipeError, UserError

SMALL = [
    "train.steps=2", "train.problems_per_step=3", "data.problems=40", "data.holdout=4",
    "monitor.every=1", "monitor.problems=2", "eval.samples=2", "eval.k=[1,2]",
    "eval.sets.test.problems=4", "eval.sets.retention.problems=4", "checkpoint.every=2",
    "policy.quantization=none",
]  # fmt: skip
QUIET = Console(quiet=True)


def small(*overrides, recipe="recipes/lab.yaml"):
    return Recipe.load(recipe, [*SMALL, *overrides])


def comparable(run):
    """A run's metrics without what no two runs share."""
    alone = ("seconds", "peak_memory")
    return [{k: v for k, v in m.items() if k not in alone} for m in run.metrics()]


def adapter(run):
    return load_file(run.adapter / "adapter_model.safetensors")


def cli(*arguments, **options):
    command = [sys.executable, "-m", "gft_lite", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200, **options)


def test_a_run_leaves_what_the_readme_promises(tmp_path, fork_server):
    out = tmp_path / "run"
    done = fork_server.run("train", "recipes/lab.yaml", *SMALL, "--out", out)
    assert done.returncode == 0, done.stderr
    for word in ("base", "trained", "pass@1", "retention", "kl", f"run: {out}"):
        assert word in done.stdout
    run = RunFolder(out)
    assert Recipe.load(out / "recipe.yaml") == small()
    assert [m["step"] for m in run.metrics()] == [1, 2]
    for metrics in run.metrics():
        assert set(metrics["reward"]) == {"expert", "teacher", "self"}
        assert metrics["trajectories"] == 24
        assert 0 < metrics["rectified"] < 1
        assert metrics["sync_gap"] < 1e-5
        assert metrics["kl"]["held_out"]["forward"] >= 0
        assert metrics["kl"]["rollouts"]["reverse_k3"] >= 0
    for group in run.groups(2):
        assert [r["source"] for r in group["responses"]] == (
            ["expert"] + ["teacher"] * 3 + ["self"] * 4
        )
        assert abs(sum(r["advantage"] for r in group["responses"])) < 1e-5
    summary = run.summary()
    assert set(summary["base"]) == {"pass@1", "pass@2", "retention", "kl"}
    assert summary["trained"]["kl"] > 0
    assert summary["steps"] == 2
    assert summary["trajectories"] == 48
    assert set(summary["seconds"]) == {"total", "rollout", "reward", "train", "sync", "eval"}
    assert (run.adapter / "adapter_config.json").exists()
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-000002"]
    assert not list(out.rglob("*.tmp"))


def test_a_run_killed_before_its_first_checkpoint_resumes_from_the_start(tmp_path):
    recipe = small("checkpoint.every=50")
    whole = train(recipe, tmp_path / "whole", console=QUIET)
    run = RunFolder(tmp_path / "killed")
    run.create(recipe.to_yaml())
    run.append_metrics({"step": 1, "left": "behind"})
    train(recipe, run.path, resume=True, console=QUIET)
    assert comparable(run) == comparable(whole)


# The figures that a method's loss reports, where it reports any.
RATIO = {"ratio", "clip_fraction"}
REPORTED = {
    "asft": {"reference_kl"}, "psft": RATIO, "grpo": RATIO, "dr_grpo": RATIO, "dapo": RATIO,
    "gft": {"rectified"}, "gft_no_gal": {"rectified"}, "gft_no_mix": {"rectified"},
    "sft_rl": RATIO, "luffy": {"shaping"}, "srft": {"sft_factor"}, "chord": RATIO | {"mu"},
    "rl_plus": {"exploration"}, "prefix_rft": RATIO, "uft": RATIO, "sdft": {"teacher_kl"},
    "opd": {"teacher_kl"},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method, tmp_path):
    # The lab's own group would contradict the methods without teachers or self samples.
    base = tmp_path / "base.yaml"
    lab = Recipe.load("recipes/lab.yaml", SMALL).model_dump(mode="json")
    for section in ("group", "objective", "optim", "teacher"):
        del lab[section]
    base.write_text(json.dumps({**lab, "method": method, "name": method}))
    overrides = [
        "train.steps=3", "train.updates_per_rollout=3", "optim.lr=1e-2", "monitor.every=0",
        "eval.samples=1", "eval.k=[1]", "eval.sets.test.problems=1",
        "eval.sets.retention.problems=1",
    ]  # fmt: skip
    if method == "opd":
        policy = load_policy(small().policy)
        with torch.no_grad():
            for parameter in policy.parameters().values():
                parameter.add_(0.05)
        overrides.append(f"teacher.model={policy.save_adapter(tmp_path / 'teacher')}")
    run = RunFolder(tmp_path / "run")
    assert main(["train", str(base), *overrides, "--out", str(run.path)]) == 0
    assert len(run.metrics()) == 3
    assert sum(m["updates"] for m in run.metrics()) + sum(
        (m["skipped"] or "").count("flat") for m in run.metrics()
    ) == 9  # fmt: skip
    moved = [v for k, v in adapter(run).items() if "lora_B" in k]
    assert any(v.abs().max() > 0 for v in moved) == (run.summary()["updates"] > 0)
    recipe = Recipe.load(run.path / "recipe.yaml")
    counts = {s: 3 * getattr(recipe.group, s) for s in METHODS[method].sources}
    # Without a flat row to leave out, or with a term that pulls on it, every token is trained.
    whole = METHODS[method].select is None and (
        recipe.objective.entropy or recipe.objective.kl or not METHODS[method].scales_with_advantage
    )
    for metrics in run.metrics():
        assert metrics["sources"] == {s: n for s, n in counts.items() if n}
        if metrics["updates"]:
            assert set(metrics["objective"]) == REPORTED.get(method, set())
            assert all(v is not None for v in metrics["objective"].values())
        tokens = metrics["trained_tokens"]
        assert tokens == metrics["tokens"] if whole else 0 <= tokens <= metrics["tokens"]
        assert method != "hpt" or tokens < metrics["tokens"]


@pytest.mark.parametrize(
    ("reduction", "weights"),
    [("token_mean", [1 / 5, 1 / 5]), ("sequence_mean", [1 / 4, 1 / 6]),
     ("constant", [1 / 20, 1 / 20])],
)  # fmt: skip
def test_truncated_rows_can_be_left_out_of_loss_and_denominator(reduction, weights):
    recipe = small("objective.mask_truncated=true", f"objective.reduction={reduction}",
                   "rollout.max_tokens=10")  # fmt: skip
    own = [
        Response((1, 2), "", "self"),
        Response((1,) * 10, "", "self", finish_reason="length"),
        Response((3, 2, 1), "", "self"),
    ]
    group = Group(Problem("p", "text", "42", prompt_ids=(1, 2)), tuple(own))
    learner = Learner(load_policy(recipe.policy), recipe)
    rows = learner.rows([ScoredGroup(group, (1.0, -2.0, 1.0))])
    assert [row.response_ids for row in rows] == [(1, 2), (3, 2, 1)]
    assert [row.weight for row in rows] == pytest.approx(weights)
    assert [row.advantage for row in rows] == [1.0, 1.0]


def test_flat_steps_are_skipped_and_counted(tmp_path):
    # Every text matches, so that every reward is 1.
    run = train(
        small('reward={"functions": [{"name": "format", "parameters": {"pattern": "(?s).*"}}]}'),
        tmp_path / "run", console=QUIET,
    )  # fmt: skip
    assert [m["skipped"] for m in run.metrics()] == ["flat", "flat"]
    assert [m["flat_groups"] for m in run.metrics()] == [1.0, 1.0]
    assert run.summary()["skipped_steps"] == 2
    assert run.summary()["trained"]["kl"] == 0
    assert run.summary()["base"]["mean_reward"] == run.summary()["trained"]["mean_reward"] == 1
    assert all(v.abs().max() == 0 for k, v in adapter(run).items() if "lora_B" in k)


def test_a_reward_rule_that_no_demonstration_satisfies_is_refused(tmp_path):
    # Nothing ends with this marker.
    recipe = small('reward={"functions": [{"name": "exact", "parameters": {"marker": "@@@"}}]}')
    with pytest.raises(RecipeError, match=r"data.columns.answer: must be the answer .* got '\d+'"):
        train(recipe, tmp_path / "run", console=QUIET)


def test_a_gradient_that_is_no_number_is_skipped_kept_and_in_a_row_ends_the_run(tmp_path):
    # A KL penalty of this weight overflows fp32 as soon as the policy has moved.
    overrides = ["objective.kl=1e38", "optim.lr=1", "optim.warmup=0", "train.steps=9",
                 "optim.max_bad_steps=2", "optim.schedule=constant"]  # fmt: skip
    run = RunFolder(tmp_path / "run")
    with pytest.raises(TrainError, match="2 steps in a row had a loss or gradient"):
        train(small(*overrides), run.path, console=QUIET)
    kept = sorted(p.name for p in run.bad_steps.iterdir())
    assert len(kept) == 2
    group = json.loads((run.bad_steps / kept[0]).read_text().splitlines()[0])
    assert len(group["responses"]) == 8


def test_the_reference_can_be_the_starting_adapter(tmp_path):
    nf4 = "policy.quantization=nf4"
    first = train(small("optim.lr=1e-2", nf4), tmp_path / "first", console=QUIET)
    again = [nf4, f"policy.adapter={first.adapter}", "optim.lr=1e-9", "train.steps=1"]
    run = train(small(*again, "policy.reference=adapter"), tmp_path / "second", console=QUIET)
    assert abs(run.summary()["trained"]["kl"]) < 1e-4  # Rounding may be negative.
    same = train(small(*again), tmp_path / "third", console=QUIET)
    assert same.summary()["trained"]["kl"] > 1e-3


@pytest.mark.parametrize("schedule", [[], ["eval.every=1", "eval.problems=1"]])
def test_trackers_get_the_numbers_and_all_evaluations(schedule, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = ["log.trackers=[tensorboard]", "train.steps=2", *schedule]
    run = train(small(*more), tmp_path / "run", console=QUIET)
    events = EventAccumulator(str(run.path / "tracker")).Reload()

    def logged(name):
        return {e.step: e.value for e in events.Scalars(name)}

    rewards = {m["step"]: m["reward"]["self"] for m in run.metrics()}
    assert logged("reward/self") == pytest.approx(rewards)
    evaluated = run.step_evaluations() or {0: run.evaluation("base"), 2: run.evaluation("trained")}
    assert list(evaluated) == ([0, 1, 2] if schedule else [0, 2])
    for name in ("pass@1", "problems"):
        expected = {step: sets["test"][name] for step, sets in evaluated.items()}
        assert logged(f"eval/test/{name}") == pytest.approx(expected)
    assert not [name for name in events.Tags()["scalars"] if "correct" in name]


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["rollout.max_tokens=4000"], "rollout.max_tokens: must leave room for a prompt"),
        (["data.source=nowhere.jsonl"], "data.source: "),
        (["group.expert=5", "group.shortfall=drop"], "group: must find its demonstrations"),
        (["data.prompt.style=chat", "policy.model=/nowhere"], "policy.model: must be the folder"),
    ],
)
def test_what_only_shows_with_data_and_model_is_still_the_users_error(overrides, text, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(RecipeError, match=text):
        train(small(*overrides), out, console=QUIET)
    assert not out.exists()


def test_an_engine_that_is_not_installed_names_the_extra(tmp_path):
    # A Python that sees the dependencies but not vLLM, as after `make env`.
    code = (
        "import importlib.util as u, sys; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'vllm' else real(name, *a)\n"
        "from gft_lite.cli import main\n"
        f"sys.exit(main(['train', 'recipes/gsm8k_tiny.yaml', '--out', {str(tmp_path / 'r')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert 'rollout.engine: vllm is not installed. pip install "gft-lite[vllm]"' in done.stderr
    assert not (tmp_path / "r").exists()


def test_folders_that_hold_another_run_or_none(tmp_path):
    taken = tmp_path / "taken"
    RunFolder(taken).create(small("seed=3").to_yaml())
    with pytest.raises(RecipeError, match="--out: must be a new or empty folder"):
        train(small(), taken, console=QUIET)
    with pytest.raises(RecipeError, match="--resume: must be given the run's own recipe"):
        train(small(), taken, resume=True, console=QUIET)
    with pytest.raises(RecipeError, match="--resume: must find a run to continue"):
        train(small(), tmp_path / "none", resume=True, console=QUIET)


class TestCommandLine:
    def test_a_wrong_recipe_is_exit_code_2_with_every_error(self):
        done = cli("train", "recipes/lab.yaml", "objective.tao=0.7", "optim.lr=fast")
        assert done.returncode == 2
        assert "objective.tao: unknown field, got 0.7. Did you mean objective.tau?" in done.stderr
        assert "optim.lr" in done.stderr
        assert "Traceback" not in done.stderr

    def test_dry_run_prints_the_resolved_recipe(self, tmp_path):
        done = cli("train", "recipes/lab.yaml", "optim.lr=1e-5", "group.self=6", "--dry-run")
        assert done.returncode == 0
        file = tmp_path / "resolved.yaml"
        file.write_text(done.stdout)
        expected = Recipe.load("recipes/lab.yaml", ["optim.lr=1e-5", "group.self=6"])
        assert Recipe.load(file) == expected
        assert expected.optim.lr == 1e-5

    def test_our_failure_is_exit_code_1_without_a_traceback(self, tmp_path, fork_server):
        run = RunFolder(tmp_path / "run")
        run.create(small().to_yaml())
        (run.checkpoints / "step-000001").mkdir(parents=True)  # Without any file.
        done = fork_server.run("train", "recipes/lab.yaml", *SMALL, "--out", run.path, "--resume")
        assert done.returncode == 1
        assert "CheckpointError: checkpoint: must be as it was written" in done.stderr
        assert "Traceback" not in done.stderr

    def test_an_interrupted_step_is_finished_and_kept(self, tmp_path, fork_server):
        run = RunFolder(tmp_path / "run")
        arguments = ["train", "recipes/lab.yaml", *SMALL, "train.steps=4",
                     "checkpoint.every=4", "--out", run.path]  # fmt: skip
        # Its micro-batch is the only one of a step.
        moment = ("gft_lite.policy.lora:LoraPolicy.backward", 2, signal.SIGTERM)
        done = fork_server.run(*arguments, signal_after=moment)
        assert done.returncode == 130
        assert "--resume" in done.stderr
        assert [m["step"] for m in run.metrics()] == [1, 2]
        [saved] = (run.path / "checkpoints").iterdir()
        assert saved.name == "step-000002"
        assert not list(run.path.rglob("*.tmp"))

    def test_methods_prints_the_table(self):
        done = cli("methods", env={**os.environ, "COLUMNS": "80"})
        assert done.returncode == 0
        printed = [line.rstrip() for line in done.stdout.splitlines() if line]
        assert max(map(len, printed)) <= 80
        lines = {line.split()[0]: line for line in printed}
        for name, method in METHODS.items():
            assert method.formula in lines[name]
            assert f" {method.defaults['optim']['lr']:.0e} " in lines[name]
            if method.citation.startswith("arXiv"):
                assert lines[name].endswith(method.citation.split()[1].rstrip(","))
        assert "1 3 4" in lines["gft"] and "- - 8" in lines["grpo"]
        assert "sequence 2e-05" in lines["grpo"]

    def test_help_and_recipe_errors_import_nothing_heavy(self):
        code = (
            "import sys; from gft_lite.cli import main\n"
            "try: main(['train', 'recipes/lab.yaml', 'objective.tao=1'])\n"
            "except SystemExit: pass\n"
            "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'vllm', 'peft'}\n"
            "sys.exit(sorted(heavy & set(sys.modules)) or 0)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_no_dependency():
    code = (
        "import sys; before = set(sys.modules); import gft_lite\n"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before}\n"
        "sys.exit(sorted(m for m in new if m not in sys.stdlib_module_names"
        " and m != 'gft_lite') or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(__import__("gft_lite").__file__).exists()


class TestDottedPaths:
    """The user's own method, reward and engine, no file of ours touched."""

    @pytest.fixture
    def own(self, tmp_path, monkeypatch):
        (tmp_path / "mine.py").write_text(
            "from gft_lite.objective.losses import LossOutput\n"
            "from gft_lite.objective.methods import Method\n"
            "from gft_lite.rollout.transformers_engine import TransformersEngine\n"
            "def loss(inputs, *, factor: float = 2.0, power: int = 1):\n"
            "    scaled = factor * inputs.logprobs ** power\n"
            "    return LossOutput(-scaled, {'scaled': scaled.detach(),\n"
            "                                'own': (inputs.source == 2).float(),\n"
            "                                'right': inputs.success_share})\n"
            "method = Method(loss, ('expert', 'self'), 'mine', needs=('source', 'success_share'))\n"
            "def threes(completions, **columns):\n"
            "    assert len(columns['skill']) == len(completions)\n"
            "    return [c.count('3') / 100 for c in completions]\n"
            "class Engine(TransformersEngine):\n"
            "    name = 'mine'\n"
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        yield tmp_path
        sys.modules.pop("mine", None)

    def test_they_run(self, own):
        run = train(
            small("method=mine:method", "group={expert: 1, teacher: 0, self: 3}",
                  "reward.functions=[mine.threes]", "objective.factor=3",
                  "rollout.engine=mine:Engine"),
            own / "run", console=QUIET,
        )  # fmt: skip
        assert run.summary()["method"] == "mine:method"
        [*metrics] = run.metrics()
        # The loss is -factor * log p.
        for step in metrics:
            assert step["objective"]["scaled"] == pytest.approx(-step["loss"], rel=1e-5)
            assert 0 < step["objective"]["own"] < 1
            assert step["objective"]["right"] == 0  # No reward is over 0.5.
        for group in run.groups(1):
            for response in group["responses"]:
                assert response["reward"] == response["text"].count("3") / 100

    def test_an_engine_with_other_log_probs_is_reported_and_stopped(self, own):
        """Every sampled token's log-prob is 0.15 nats too low, then 0.3."""
        (own / "shifted.py").write_text(
            "from dataclasses import replace\n"
            "from gft_lite.rollout.transformers_engine import TransformersEngine\n"
            "class Engine(TransformersEngine):\n"
            "    name, shift = 'shifted', 0.15\n"
            "    def generate(self, *arguments, **options):\n"
            "        return [[replace(c, logprobs=tuple(x - self.shift for x in c.logprobs))\n"
            "                 for c in each] for each in super().generate(*arguments, **options)]\n"
            "class Worse(Engine):\n"
            "    shift = 0.3\n"
        )
        method = ["method=grpo", "group={expert: 0, teacher: 0, self: 4}",
                  "objective.importance.cap=1.1", "train.drop_zero_advantage=false"]  # fmt: skip
        console = Console(record=True, width=120)
        run = train(small(*method, "rollout.engine=shifted:Engine"), own / "run", console=console)
        for metrics in run.metrics():
            gap = metrics["engine_gap"]
            assert gap["mean"] == pytest.approx(0.15, abs=1e-5)
            assert gap["p95"] == pytest.approx(0.15, abs=1e-5)
            assert (gap["effective"], gap["limited"]) == (pytest.approx(1, abs=1e-9), 1)
        assert "step 1: engine and trainer differ by 0.15 nats" in console.export_text()
        with pytest.raises(TrainError, match=r"rollout.probe_limit: step 1: .* more than 0.2"):
            train(small(*method, "rollout.engine=shifted:Worse"), own / "worse", console=QUIET)

    @pytest.mark.parametrize(
        ("body", "text"),
        [
            ("import sys; sys.exit(0)", "method: the loss of bad:method failed: SystemExit: 0"),
            ("raise KeyboardInterrupt", "method: the loss of bad:method failed: KeyboardInterrupt"),
            ("return inputs.logprobs", "method: the loss of bad:method failed: AttributeError"),
            ("return LossOutput(inputs.logprobs.sum())", r"a value per token .* got \[\[\]\]"),
            ("return LossOutput(inputs.logprobs, {'mean': inputs.logprobs.mean()})",
             r"a value per token .* \[\]\]"),
        ],
    )  # fmt: skip
    def test_a_loss_that_fails_is_the_users_error(self, own, body, text):
        (own / "bad.py").write_text(
            "from gft_lite.objective import LossOutput, Method\n"
            f"def loss(inputs):\n    {body}\nmethod = Method(loss, ('expert',), 'mine')\n"
        )
        sys.modules.pop("bad", None)
        recipe = small("method=bad:method", "group={expert: 1, teacher: 0, self: 0}")
        learner = Learner(load_policy(recipe.policy), recipe)
        with pytest.raises(UserError, match=text):
            learner.gradient([Row((1, 2), (3, 4))])

    @pytest.mark.parametrize(
        ("override", "text"),
        [
            ("method=mine:absent", "method: must be a name in mine"),
            (
                "method=mine:threes",
                "method: must be a gft_lite.objective.methods.Method, got a function",
            ),
            ("method=nowhere.at:all", "method: module must be importable"),
            ("reward.functions=[mine.absent]", "reward 'mine.absent': must be a name in mine"),
            ("reward.functions=[{name: exact, parameters: {mark: x}}]", "parameters must fit"),
        ],
    )
    def test_what_is_not_there_is_the_users_error(self, own, override, text):
        with pytest.raises(RecipeError, match=text):
            train(small(override), own / "run", console=QUIET)


def test_the_readmes_import_gives_the_functions():
    """In a new process, and here, where their modules are imported already."""
    code = (
        "from gft_lite import Recipe, evaluate, sweep, train\n"
        "assert all(callable(f) for f in (evaluate, sweep, train))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    exec(code, {})
