"""The suite schema: the shipped suites, the user's files, and the errors."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from gft_lite.evaluation.suites import Suite, find_file, load_benchmark, shipped
from gft_lite.recipe.schema import Recipe
from gft_lite.utils.errors import RecipeError

PAPER = ["AMC23", "College Math", "Gaokao 2023 EN", "MATH-500", "Minerva", "TabMWP",
         "OlympiadBench", "MMLU-STEM", "SAT Math", "MAWPS", "SVAMP"]  # fmt: skip
WORDS = SimpleNamespace(
    prompt_ids=lambda text, *_: tuple(range(len(text.split()))), chat=None, notes=()
)


def errors(name, *overrides):
    with pytest.raises(RecipeError) as caught:
        Suite.load(str(name), overrides)
    return caught.value.problems


def write(folder, text):
    file = folder / "mine.yaml"
    file.write_text(text)
    return file


def test_the_shipped_suites():
    assert list(shipped()) == ["diversity", "lab", "paper", "retention"]
    paper = Suite.load("paper")
    assert [paper.title(name) for name in paper.names] == PAPER
    assert (paper.samples, paper.ks) == (16, [1, 2, 4, 8, 16])
    assert (paper.rollout.temperature, paper.rollout.max_tokens) == (0.5, 4096)
    assert Suite.load("retention").names == ["mawps", "svamp", "mmlu_stem"]
    diversity = Suite.load("diversity")
    assert diversity.names == ["sat_math", "minerva", "tabmwp"]
    assert diversity.ks == [1, 2, 4, 8, 16, 32, 64, 128, 256]


@pytest.mark.parametrize("name", ["paper", "lab"])
def test_every_benchmark_has_a_source_and_a_license(name):
    for benchmark in Suite.load(name).definitions.values():
        assert benchmark.license
        assert benchmark.source == "lab" or "/" in benchmark.source


def test_fewer_samples_have_fewer_k():
    assert Suite.load("diversity", ["samples=5"]).ks == [1, 2, 4]
    assert Suite.load("diversity", ["samples=5", "k=[5]"]).ks == [1, 5]


def test_a_users_file(tmp_path):
    file = write(tmp_path, "definitions: {a: {source: a.jsonl}, b: {source: b.jsonl}}\n")
    assert Suite.load(str(file)).names == ["a", "b"]
    mixed = write(tmp_path, "extends: [configs/suites/paper.yaml]\nbenchmarks: [svamp, b]\n"
                  "definitions: {b: {source: b, prompt: {template: 'Q {problem}'}}}\n")  # fmt: skip
    suite = Suite.load(str(mixed))
    assert suite.names == ["svamp", "b"]
    assert suite.prompt_of("b").template == "Q {problem}"
    assert "boxed" in suite.prompt_of("svamp").template
    assert suite.rollout.max_tokens == 4096


def test_all_errors_are_reported_with_file_and_line(tmp_path):
    file = write(
        tmp_path,
        "sampels: 3\ndefinitions:\n  a:\n    source: a.jsonl\n    answer_typ: math\n"
        "  b: {answer_type: maths}\n",
    )
    assert errors(file) == [
        f"{file}:1: sampels: unknown field, got 3. Did you mean samples?",
        f"{file}:5: definitions.a.answer_typ: unknown field, got 'math'. "
        "Did you mean definitions.a.answer_type?",
        f"{file}:6: definitions.b.source: is required, got nothing.",
        f"{file}:6: definitions.b.answer_type: must be 'math' or 'choice', got 'maths'. "
        "Did you mean math?",
    ]


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("k=[3,99]", "k: must be at most samples, which is 16"),
        ("benchmarks=[amc32]", "definitions, which lack amc32 (did you mean amc23?)"),
        ("rollout.temperature=0", "samples: must be 1 at temperature 0"),
        ("rollout.top_k=1", "samples: must be 1 at temperature 0, top_k 1"),
        ("definitions={a/b: {source: x}}", "definitions: must have letters, digits"),
        ("name=../up", "name: must have letters, digits"),
    ],
)
def test_rules(override, text):
    [problem] = errors("paper", override)
    assert text in problem


def test_unknown_suites():
    assert errors("papr") == [
        "--suite: must be diversity, lab, paper, retention or a file, got 'papr'. "
        "Did you mean paper?"
    ]
    assert "no.yaml" in errors("no.yaml")[0]


def test_a_wrong_suite_name_imports_nothing_heavy():
    code = (
        "import sys; from gft_lite.cli import main\n"
        "assert main(['eval', 'lab', '--suite', 'papr']) == 2\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'vllm', 'peft'}\n"
        "sys.exit(sorted(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_data_are_evaluated_by_the_rules_of_a_run():
    overrides = [
        "data.columns.problem=q", "data.columns.expert=[worked]", "rollout.stop=[x]",
        "data.prompt.template='Q {problem}'", "eval.samples=4", "eval.k=[2]",
        "eval.temperature=0.7", "eval.top_p=0.9",
    ]  # fmt: skip
    recipe = Recipe.load("recipes/lab.yaml", overrides)
    suite = Suite.of_data("some folder/my rows.v2.jsonl", recipe, ["samples=3", "limit=5"])
    assert (suite.name, suite.names, suite.limit) == ("my-rows.v2", ["my-rows.v2"], 5)
    benchmark = suite.definitions[suite.name]
    assert benchmark.source == "some folder/my rows.v2.jsonl"
    assert (
        suite.prompt_of(suite.name) == recipe.data.prompt != suite.definitions["my-rows.v2"].prompt
    )
    assert suite.reward == recipe.reward
    assert (suite.samples, suite.ks) == (3, [1, 2])
    rollout = suite.rollout
    assert (rollout.temperature, rollout.top_p, rollout.stop) == (0.7, 0.9, ["x"])
    assert rollout.max_tokens == recipe.rollout.max_tokens != type(rollout)().max_tokens
    assert Suite.of_data("x", recipe, ["samples=1"]).ks == [1]  # k=2 is only of more samples.
    longer = Recipe.load("recipes/lab.yaml", ["eval.max_tokens=9"])
    assert Suite.of_data("x", longer).rollout.max_tokens == 9
    filtered = Recipe.load("recipes/lab.yaml", ["rollout.top_k=3", "seed=7"])
    assert (Suite.of_data("x", filtered).rollout.top_k, Suite.of_data("x", filtered).seed) == (0, 7)
    of_run = Suite.of_data("lab", recipe)
    assert of_run.names == ["test", "retention"]
    assert of_run.definitions["retention"].split == "retention"
    # The file need not have demonstrations, unless they are all that there is to evaluate.
    assert (benchmark.columns.problem, benchmark.columns.expert) == ("q", [])
    columns = {"answer": None, "expert": ["worked"]}
    without = Recipe.from_tree({"method": "sft", "data": {"source": "y", "columns": columns}})
    assert Suite.of_data("x", without).definitions["x"].columns.expert == ["worked"]
    with pytest.raises(RecipeError, match=r"rollout\.temprature.*Did you mean"):
        Suite.of_data("x", recipe, ["rollout.temprature=1"])


# --- problems --------------------------------------------------------------------------------


def test_a_file_in_data_dir_replaces_the_hub(tmp_path):
    row = '{"id": "x", "problem": "one two", "answer": "B", "answer_type": "choice"}\n'
    (tmp_path / "svamp.jsonl").write_text(row + row.replace('"x"', '"y"').replace("one ", ""))
    suite = Suite.load("paper")
    found = load_benchmark(suite, "svamp", WORDS, 100, tmp_path).problems
    assert {p.id for p in found} == {"x", "y"}
    # A row's own type of answer overrides its benchmark's.
    assert {p.columns["answer_type"] for p in found} == {"choice"}
    one = load_benchmark(Suite.load("paper", ["limit=1"]), "svamp", WORDS, 100, tmp_path).problems
    assert len(one) == 1
    with pytest.raises(RecipeError, match=r"--data-dir: must be a folder .*absent"):
        find_file(tmp_path / "absent", "svamp")


def test_the_benchmarks_answer_type_for_rows_without_one(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"problem": "p", "answer": "B"}\n')
    file = write(tmp_path, f"definitions: {{a: {{source: {tmp_path}/rows.jsonl, "
                 "answer_type: choice}}\n")  # fmt: skip
    [problem] = load_benchmark(Suite.load(str(file)), "a", WORDS, 100, None).problems
    assert problem.columns["answer_type"] == "choice"


def test_too_long_prompts_are_left_out(tmp_path):
    rows = [f'{{"id": "{n}", "problem": "{"w " * n}", "answer": "1"}}\n' for n in (3, 9)]
    (tmp_path / "svamp.jsonl").write_text("".join(rows))
    # Half of a context of 10 and a token are reserved for the response: at most 4 prompt tokens.
    suite = Suite.load("paper")
    loaded = load_benchmark(suite, "svamp", WORDS, 10, tmp_path)
    assert [p.id for p in loaded.problems] == ["3"]
    assert loaded.describe() == (
        "1 problems of 2 rows, skipped 1 with prompt too long (> 4 tokens)"
    )


def test_the_error_of_a_benchmark_that_does_not_load(tmp_path):
    file = write(tmp_path, "definitions: {a: {source: no/such.jsonl, unverified: its columns}}\n")
    with pytest.raises(RecipeError) as caught:
        load_benchmark(Suite.load(str(file)), "a", WORDS, 100, None)
    assert caught.value.problems == [
        "definitions.a.source: no such file or folder, got 'no/such.jsonl'.",
        "definitions.a: its columns could not be checked by us; "
        "a.jsonl in --data-dir DIR takes the hub's place.",
    ]
