"""`gft-lite eval` on the lab: targets, drift, interruption, regrading, real benchmarks, vLLM."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import shutil
import signal
from functools import partial

import pytest
from rich.console import Console

from gft_lite.evaluation.evaluator import evaluate as evaluate_targets
from gft_lite.evaluation.suites import Suite
from gft_lite.evaluation.tables import tables
from gft_lite.evaluation.targets import content_hash, find_targets, group_by_base
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import LoraSettings, PolicySettings
from gft_lite.runs.folder import RunFolder
from gft_lite.training.run import train
from gft_lite.utils.errors import RecipeError, UserError
from gft_lite.utils.paths import PACKAGE

QUIET = Console(quiet=True)
BENCHMARKS = ["test", "retention"]
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short training with two checkpoints that moved the policy a lot."""
    small = [
        "train.steps=2", "checkpoint.every=1", "train.problems_per_step=3", "data.problems=40",
        "monitor.every=0", "monitor.problems=1", "eval.samples=4", "eval.k=[1]", "optim.lr=5e-3",
        "eval.sets.test.problems=6", "eval.sets.retention.problems=2", "seed=4", "rollout.top_k=5",
        "optim.schedule=constant",
    ]  # fmt: skip
    folder = tmp_path_factory.mktemp("eval") / "run"
    return train(Recipe.load("recipes/lab.yaml", small), folder, console=QUIET).path


def evaluate(targets, out, *overrides, suite="lab", **options):
    options.setdefault("console", QUIET)
    suite = Suite.load(str(suite), ["limit=5", "samples=2", *overrides])
    return evaluate_targets(suite, list(map(str, targets)), out, **options)


@pytest.fixture
def cli(fork_server):
    """Runs the command in a process."""
    return partial(fork_server.run, "eval")


def stored(out):
    """Every response on the disk, by model, benchmark and key."""
    return {
        (file.parent.name, file.stem, entry["key"]): entry
        for file in out.glob("responses/*/*.jsonl")
        for entry in map(json.loads, file.read_text().splitlines())
    }


def lines(out):
    return sum(len(f.read_bytes().splitlines()) for f in out.glob("responses/*/*.jsonl"))


def test_base_adapter_and_checkpoints_in_one_call(run, tmp_path, cli):
    out = tmp_path / "out"
    done = cli("lab", run, f"{run}@all", "--suite", "lab", "--limit", 5, "--samples", 4,
               "--k", "1,3", "--out", out, "drift=3")  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in ("Accuracy (%)", "pass@3", "Differences in", "Drift", f"results: {out}"):
        assert text in done.stdout
    results = json.loads((out / "results.json").read_text())
    targets = results["targets"]
    assert list(targets) == ["lab", str(run), f"{run}@step-1", f"{run}@step-2"]
    # The final adapter is the last checkpoint: three models, each sampled once.
    assert targets[str(run)]["identity"] == targets[f"{run}@step-2"]["identity"]
    assert results["sampled"] == len(stored(out)) == lines(out) == 3 * 2 * 5 * 4
    assert results["reused"] == 2 * 5 * 4 + 2 * 3  # A twin, and the base for the drift.
    assert targets[str(run)]["benchmarks"] == targets[f"{run}@step-2"]["benchmarks"]
    assert targets["lab"]["drift"].keys() == {"entropy"}
    for label in list(targets)[1:]:
        assert all(value > 0 for value in targets[label]["drift"].values())
    assert targets[f"{run}@step-1"]["drift"] != targets[str(run)]["drift"]
    assert len(results["pairs"]) == 6
    assert "Differences in accuracy on the same problems, first model minus second" in done.stdout
    with (out / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 8
    assert r"\toprule" in (out / "results.tex").read_text()
    assert "| model | test | retention | average |" in (out / "results.md").read_text()
    assert "# Right and wrong answers" in (out / "examples.md").read_text()
    assert not (out / "engine").exists()


def test_rows_of_ones_own(run, tmp_path, cli):
    file, out = tmp_path / "my rows.jsonl", tmp_path / "out"
    file.write_text('{"problem": "403+201+302-410=", "answer": "041"}\n')
    done = cli("lab", run, "--data", file, "--out", out, "--samples", 8, "drift=0")
    assert done.returncode == 0, done.stderr
    targets = json.loads((out / "results.json").read_text())["targets"]
    texts = [response["text"] for response in stored(out).values()]
    # As the run's recipe says, an answer is what is after `#`.
    right = sum(text.rpartition("#")[2] == "041" for text in texts)
    assert len(texts) == 2 * 8 and 0 < right < 16
    assert sum(t["benchmarks"]["my-rows"]["pass@1"] for t in targets.values()) == right / 8
    for arguments, text in (
        (["lab", "--data", file], "--data: must have a run among the targets"),
        ([run, "--data", file, "--suite", "lab"], "--data: must be given without --suite."),
        ([run, "--data", tmp_path / "absent.jsonl"], "absent.source: no such file or folder"),
    ):
        done = cli(*arguments)
        assert done.returncode == 2 and text in done.stderr


def test_the_rows_of_a_run_have_the_figures_of_the_run(run, tmp_path):
    """Its recipe has a seed, and a top_k, which is of training alone."""
    suite = Suite.of_data("lab", Recipe.load(run / "recipe.yaml"), ["drift=1"])
    evaluate_targets(suite, ["lab", str(run)], tmp_path, console=QUIET)
    targets = json.loads((tmp_path / "results.json").read_text())["targets"]
    for label, name in (("lab", "base"), (str(run), "trained")):
        found = {b: {k: v for k, v in figures.items() if k != "distinct"}
                 for b, figures in targets[label]["benchmarks"].items()}  # fmt: skip
        assert found == RunFolder(run).evaluation(name)


def test_figures_are_those_of_the_stored_grades(run, tmp_path):
    results = evaluate([run], tmp_path, "samples=4")
    entry = results["targets"][str(run)]
    responses = stored(tmp_path)
    for name in BENCHMARKS:
        file = tmp_path / "problems" / entry["identity"] / f"{name}.jsonl"
        problems = list(map(json.loads, file.read_text().splitlines()))
        assert len(problems) == 5
        right = 0
        for problem in problems:
            texts = [responses[entry["identity"], name, key]["text"] for key in problem["keys"]]
            ends = [text.rpartition("#")[2] == problem["answer"] for text in texts]
            assert problem["scores"] == list(map(float, ends))
            right += sum(ends)
        assert entry["benchmarks"][name]["pass@1"] == pytest.approx(right / 20)
        assert entry["benchmarks"][name]["samples"] == 20
    # The base is sampled for the drift only: once for each problem, without figures of its own.
    assert results["sampled"] == 2 * 5 * 4 + 2 * 5
    assert list(results["targets"]) == [str(run)]


def test_the_training_run_and_the_suite_agree_on_the_base(run, tmp_path):
    # Same seeds, same protocol: training's own figures of the base come out again.
    of_run = RunFolder(run).evaluation("base")
    results = evaluate(["lab"], tmp_path, "limit=6", "samples=4", "seed=4", "drift=0")
    found = results["targets"]["lab"]["benchmarks"]
    assert {i: found["retention"]["correct"][i] for i in of_run["retention"]["correct"]} == (
        of_run["retention"]["correct"]
    )
    assert (found["test"]["correct"], found["test"]["length"]) == (
        of_run["test"]["correct"], of_run["test"]["length"]
    )  # fmt: skip


@pytest.mark.parametrize("order", [["lab", "RUN"], ["RUN", "lab"]])
def test_the_difference_is_what_training_added_in_either_order(order, run, tmp_path):
    targets = [str(run) if name == "RUN" else name for name in order]
    results = evaluate(targets, tmp_path, "samples=1", "rollout.temperature=0", "drift=0")
    assert list(results["targets"]) == targets
    [pair] = results["pairs"]
    assert (pair["a"], pair["b"]) == ("lab", str(run))
    base, trained = (results["targets"][name]["average"]["pass@1"] for name in ("lab", str(run)))
    assert pair["differences"]["average"]["difference"] == pytest.approx(trained - base)
    table = next(t for t in tables(results) if t.title.startswith("Differences"))
    assert table.title.startswith("Differences in accuracy on the same problems, first model minus")
    assert table.rows[0][0] == f"{run} - lab"
    assert table.rows[0][-1].startswith(f"{100 * (trained - base):+.1f} [")


def test_a_graded_reward_is_no_accuracy(run, tmp_path, monkeypatch):
    (tmp_path / "graded.py").write_text(
        "def reward(completions, **_):\n    return [len(c) / 100 for c in completions]\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    results = evaluate([run, "lab"], "out", "reward.functions=['graded:reward']", "drift=0")
    target = results["targets"]["lab"]
    assert not [name for name in target["benchmarks"]["test"] if name.startswith("pass@")]
    assert results["protocol"]["k"] == []
    mean = target["average"]["mean_reward"]
    first, *_, pairs, _ = tables(results)
    assert first.title == "Mean reward, the mean over 2 samples a problem"
    assert first.rows[1][-1] == f"{mean:.3f}"
    assert pairs.title.startswith("Differences in mean reward") and "points" not in pairs.title
    assert f"{mean:.3f}" in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    with (tmp_path / "out" / "results.csv").open(encoding="utf-8") as file:
        assert all(float(row["low"]) <= float(row["high"]) for row in csv.DictReader(file))


def test_without_answers_demonstrations_are_scored(run, tmp_path):
    columns = "columns={answer: null, expert: [expert], id: id}"
    without = [f"definitions.test.{columns}", "benchmarks=[test]", "drift=1", "limit=3"]
    results = evaluate(["lab", run], tmp_path, *without)
    figures = {label: target["benchmarks"] for label, target in results["targets"].items()}
    base, trained = figures["lab"]["test"], figures[str(run)]["test"]
    assert base["tokens"] == trained["tokens"] and base["problems"] == 3
    assert base["nll"] == sum(base["nats"].values()) / sum(base["tokens"].values())
    assert 0 < base["nll"] != trained["nll"]
    [pair] = results["pairs"]
    difference = pair["differences"]["test"]["difference"]
    assert difference == pytest.approx(trained["nll"] - base["nll"])
    page = (tmp_path / "results.md").read_text()
    assert "Negative log-likelihood of the demonstrations" in page and "Differences in nll" in page
    assert results["sampled"] == 2  # For the drift alone.
    again = evaluate(["lab"], tmp_path, *without, regrade=True)
    assert again["targets"]["lab"]["benchmarks"]["test"]["nats"] == base["nats"]
    with pytest.raises(RecipeError, match=r"benchmarks: must all have answers.* got test without"):
        evaluate(["lab"], tmp_path / "mixed", without[0])


def test_default_folders(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=io.StringIO(), force_terminal=True, width=300)
    found = evaluate([run], None, "samples=1", console=console)
    assert found["folder"] == str(run / "eval" / "lab")
    # Each part has a progress of its own, which does not go backwards.
    for part in (
        "sampling the base on test for KL",
        "sampling the base on retention for KL",
        f"KL of {run} on the base's responses",
        f"KL of {run} on its own responses",
    ):
        assert f"{part}: " in console.file.getvalue()
    assert evaluate(["lab", run], None, "samples=1")["folder"] == "evals/lab"
    assert (tmp_path / "evals" / "lab" / "results.json").exists()


class TestNothingIsSampledTwice:
    def test_a_killed_evaluation_continues(self, run, tmp_path, fork_server):
        overrides = ["samples=3", "rollout.batch_size=1"]
        whole = evaluate(["lab", run], tmp_path / "whole", *overrides)
        out = tmp_path / "killed"
        command = ["eval", "lab", run, "--suite", "lab", "limit=5", *overrides, "--out", out]
        moment = ("gft_lite.evaluation.response_cache:ResponseCache.add", 8, signal.SIGKILL)
        killed = fork_server.run(*command, signal_after=moment)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        found = lines(out)
        assert 8 <= found < 60
        again = evaluate(["lab", run], out, *overrides)
        # Complete lines are not sampled again, and no key is stored twice.
        assert found - 1 <= 60 - again["sampled"] <= found
        assert len(stored(out)) == lines(out) == 60
        assert stored(out) == stored(tmp_path / "whole")
        for label, target in again["targets"].items():
            assert target["benchmarks"] == whole["targets"][label]["benchmarks"]

    def test_more_samples_and_more_problems_are_added(self, tmp_path):
        assert evaluate(["lab"], tmp_path)["sampled"] == 2 * 5 * 2
        assert evaluate(["lab"], tmp_path)["sampled"] == 0
        more = evaluate(["lab"], tmp_path, "samples=3", "limit=6")
        assert (more["sampled"], more["reused"]) == (2 * 6 * 3 - 2 * 5 * 2, 2 * 5 * 2)
        assert evaluate(["lab"], tmp_path, "rollout.temperature=0.6")["sampled"] == 2 * 5 * 2
        assert evaluate(["lab"], tmp_path, "seed=1")["sampled"] == 2 * 5 * 2

    def test_the_engines_dtype_is_part_of_the_key(self, tmp_path, monkeypatch):
        (tmp_path / "own_serving.py").write_text(
            "from gft_lite.rollout.transformers_engine import TransformersEngine\n"
            "class Engine(TransformersEngine):\n    name = 'own'\n",
            encoding="utf-8",
        )
        monkeypatch.syspath_prepend(tmp_path)
        for dtype in ("float32", "bfloat16"):
            own = ["limit=1", "samples=1", "rollout.engine=own_serving:Engine"]
            for sampled in (2, 0):
                done = evaluate(["lab"], tmp_path / "out", *own, f"rollout.dtype={dtype}")
                assert done["sampled"] == sampled


class TestRegrade:
    @pytest.fixture(scope="class")
    def evaluated(self, tmp_path_factory):
        out = tmp_path_factory.mktemp("evaluated") / "out"
        evaluate(["lab"], out)
        return out

    def test_it_needs_no_model(self, tmp_path):
        model, out = tmp_path / "model", tmp_path / "out"
        shutil.copytree(PACKAGE / "lab" / "base", model)
        first = evaluate([model], out)
        (model / "model.safetensors").unlink()
        with pytest.raises(RecipeError, match=r"policy\.model"):
            evaluate([model], out)
        label = str(model)
        again = evaluate([model], out, regrade=True)
        assert again["sampled"] == 0
        assert again["targets"][label]["benchmarks"] == first["targets"][label]["benchmarks"]
        assert again["targets"][label]["drift"] == first["targets"][label]["drift"]
        # Another grader: what follows an `@` is never the answer alone.
        other = 'reward={"functions": [{"name": "exact", "parameters": {"marker": "@"}}]}'
        harsh = evaluate([model], out, other, "k=[2]", regrade=True)
        assert harsh["targets"][label]["average"]["pass@1"] == 0
        assert first["targets"][label]["average"]["pass@1"] > 0
        assert harsh["protocol"]["temperature"] == 0.5
        # After another evaluation in the same folder this one can still be graded again.
        evaluate(["lab"], out, "samples=1")
        assert (
            evaluate([model], out, regrade=True)["targets"][label]["identity"]
            == (first["targets"][label]["identity"])
        )
        evaluate([model], out, other, "k=[2]", regrade=True)
        file = out / "problems" / harsh["targets"][label]["identity"] / "retention.jsonl"
        assert all(json.loads(line)["correct"] == 0 for line in file.read_text().splitlines())

    @pytest.mark.parametrize(
        "file, text, error",
        [("responses", "", "must have the responses of the evaluation, got 10 of them missing"),
         ("responses", "{}\n", "test.jsonl:1: must be a response with its key"),
         ("problems", "", "must have a line for each of the 5 problems, got 0"),
         ("problems", "{\n", "test.jsonl:1: must be a problem with the keys of its responses"),
         ("targets", "{", "targets.json:1: must have the results of each target"),
         ("targets", '{"lab": {}}', "targets.json: must have the results of each target")],
    )  # fmt: skip
    def test_damaged_files_are_named(self, file, text, error, evaluated, tmp_path):
        out = shutil.copytree(evaluated, tmp_path / "out")
        [path] = out.glob("targets.json" if file == "targets" else f"{file}/*/test.jsonl")
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError) as caught:
            evaluate(["lab"], out, regrade=True)
        [problem] = caught.value.problems
        assert problem.startswith(str(path)) and error in problem
        assert "Restore the file" in problem or "Remove the line" in problem

    def test_damaged_results_are_found_before_a_model_is_loaded(self, run, tmp_path):
        adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
        (adapter / "adapter_model.safetensors").write_bytes(b"")  # An error where it is loaded.
        (tmp_path / "targets.json").write_text("{", encoding="utf-8")
        with pytest.raises(UserError, match=r"targets\.json:1: must have the results"):
            evaluate([adapter], tmp_path)

    def test_what_was_never_evaluated(self, run, tmp_path):
        evaluate(["lab"], tmp_path, "samples=1")
        with pytest.raises(RecipeError) as caught:
            evaluate([run], tmp_path, regrade=True)
        assert caught.value.problems == [
            f"--regrade: must find an evaluation of {run} in {tmp_path}, which has lab."
        ]


class TestTargets:
    def test_adapters_of_another_shape_get_a_base_of_their_own(self, run, tmp_path):
        settings = PolicySettings(lora=LoraSettings(rank=4, alpha=8), gradient_checkpointing=False)
        small = load_policy(settings).save_adapter(tmp_path / "small")
        arguments = [str(run / "adapter"), str(small), "lab"]
        found = find_targets(arguments, Suite.load("lab").policy)
        again = find_targets(found, Suite.load("lab", ["policy.dtype=bfloat16"]).policy)
        assert all(a is b for a, b in zip(again, found, strict=True))
        groups = group_by_base(found)
        assert [[t.label for t in group] for group in groups] == [
            [arguments[0], "lab"],
            [arguments[1]],
        ]
        results = evaluate(arguments, tmp_path / "out", "samples=1")
        targets = results["targets"]
        assert list(targets) == [str(run / "adapter"), str(small), "lab"]
        # A fresh adapter is the base: the same answers, and not a step away from it.
        assert targets[str(small)]["benchmarks"] == targets["lab"]["benchmarks"]
        assert targets[str(small)]["drift"]["forward"] == 0
        assert targets[str(run / "adapter")]["drift"]["forward"] > 0
        assert targets[str(small)]["identity"] != targets["lab"]["identity"]

    def test_what_is_not_a_target(self, run, tmp_path, cli):
        (tmp_path / "empty").mkdir()
        done = cli("nowhere", tmp_path / "empty", f"{run}@step-7", "--suite", "lab")
        assert done.returncode == 2
        errors = [line for line in done.stderr.splitlines() if not line.startswith("importing")]
        assert len(errors) == 3
        assert "must be lab, a hub id, or the folder of a model" in errors[0]
        assert "must hold a config.json, an adapter_config.json or a run's" in errors[1]
        assert "There: @step-1, @step-2." in errors[2]

    def test_names_that_cannot_be_paths(self):
        names = ["x" * 300, "~nobody-of-that-name/x", "a" * 300 + "/b/c", "run@step-" + "9" * 5000]
        with pytest.raises(UserError) as caught:
            find_targets(names, Suite.load("lab").policy)
        assert len(caught.value.problems) == len(names)
        assert all(text.startswith("TARGET: must ") for text in caught.value.problems)

    def test_a_wrong_suite_setting_is_an_error_before_anything_is_loaded(self, cli):
        done = cli("lab", "--suite", "lab", "--samples", "0", "rollout.temprature=1")
        assert done.returncode == 2
        assert "samples: " in done.stderr
        assert "Did you mean rollout.temperature?" in done.stderr

    def test_the_base_of_a_run_is_loaded_as_in_that_run(self, run, tmp_path):
        other = tmp_path / "other"
        shutil.copytree(run, other)
        text = (other / "recipe.yaml").read_text()
        assert "quantization: nf4" in text
        (other / "recipe.yaml").write_text(text.replace("quantization: nf4", "quantization: none"))
        policy = Suite.load("lab").policy
        base, trained = find_targets(["lab", str(other)], policy)
        assert base.policy.quantization == trained.policy.quantization == "none"
        assert len(group_by_base([base, trained])) == 1
        [alone] = find_targets(["lab"], policy)
        assert alone.policy.quantization == "nf4"

    def test_an_adapters_weights_are_part_of_its_name(self, run):
        first, last = sorted((run / "checkpoints").iterdir())
        weights = "*.safetensors"
        assert content_hash(first / "adapter", weights) != content_hash(last / "adapter", weights)
        assert content_hash(run / "adapter", weights) == content_hash(last / "adapter", weights)


def test_real_benchmarks_from_a_folder(shared_data, run, tmp_path):
    names = ["amc23", "gaokao2023en", "math500", "olympiadbench", "mmlu_stem", "sat_math",
             "mawps", "svamp"]  # fmt: skip
    console = Console(record=True, width=200, quiet=False, file=(tmp_path / "log").open("w"))
    results = evaluate(
        ["lab", run], tmp_path / "out", f"benchmarks=[{','.join(names)}]", "limit=2",
        "policy.context=512", "drift=0", suite="paper", data_dir=shared_data / "bench",
        console=console,
    )  # fmt: skip
    found = results["targets"]["lab"]
    assert list(found["benchmarks"]) == names
    assert results["sampled"] == 2 * 8 * 2 * 2
    least, most = found["max_tokens"]
    assert 256 <= least < most < 512
    text = f"the model's context of 512 tokens leaves responses {least} to {most} of the 4096"
    assert text in console.export_text()
    assert found["drift"] == {"entropy": None}


@needs_vllm
def test_vllm_gives_the_greedy_answers_of_transformers(run, tmp_path):
    overrides = ["samples=1", "rollout.temperature=0", "limit=8"]
    texts = []
    for engine, dtype in {"vllm": ["rollout.dtype=float32"], "transformers": []}.items():
        out = tmp_path / engine
        targets = ["lab", run, f"{run}@step-1"]
        results = evaluate(targets, out, *overrides, *dtype, f"rollout.engine={engine}")
        assert {t["engine"] for t in results["targets"].values()} == {engine}
        answers = {}
        for label, entry in results["targets"].items():
            file = out / "problems" / entry["identity"] / "test.jsonl"
            for problem in map(json.loads, file.read_text().splitlines()):
                key = entry["identity"], "test", problem["keys"][0]
                answers[label, problem["id"]] = stored(out)[key]["text"]
        texts.append(answers)
    assert texts[0] == texts[1]
    by_target = [{k[1]: v for k, v in texts[0].items() if k[0] == t} for t in results["targets"]]
    assert by_target[0] != by_target[1] != by_target[2]
