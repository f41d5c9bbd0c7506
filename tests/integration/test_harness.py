"""`gft-lite eval --harness` on a user's own tasks, against the policy's own log-probs."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from gft_lite.cli import main
from gft_lite.evaluation.harness import (
    HarnessSettings,
    add_to_results,
    harness_table,
    load_tasks,
)
from gft_lite.policy.batching import Row
from gft_lite.utils.errors import UserError

CHOICES = ["1", "2", "3", "4"]
QUESTIONS = [f"{a} + {b} = #" for a in range(1, 7) for b in range(1, 5)]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
{own}
metadata: {{version: 1}}
"""
CHOOSE = 'doc_to_choice: ["1", "2", "3", "4"]\nmetric_list: [{metric: acc}]'
GENERATE = (
    'generation_kwargs: {until: ["?"], max_gen_toks: 2}\nmetric_list: [{metric: exact_match}]'
)


@pytest.fixture(scope="module")
def harness():
    """Skip if lm-evaluation-harness, an extra, is not installed."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with two tasks on a local file, whose right choice is always the second."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [json.dumps({"question": q, "answer": 1}) + "\n" for q in QUESTIONS]
    (folder / "data.jsonl").write_text("".join(rows))
    for name, kind, own in (("own_choice", "multiple_choice", CHOOSE),
                            ("own_text", "generate_until", GENERATE)):  # fmt: skip
        text = TASK.format(name=name, data=folder / "data.jsonl", kind=kind, own=own)
        (folder / f"{name}.yaml").write_text(text)
    return folder


def second_share(policy) -> float:
    """The share of the questions whose most probable choice is the second."""

    def ids(text: str) -> tuple[int, ...]:
        return tuple(policy.tokenizer(text, add_special_tokens=False)["input_ids"])

    rows = [Row(ids(q), ids(choice)) for q in QUESTIONS for choice in CHOICES]
    assert all(len(row.response_ids) == 1 for row in rows)
    [batch] = policy.batches(rows, 100_000)
    with torch.no_grad():
        scores = policy.token_scores(batch).logprobs[batch.row.argsort()].view(-1, len(CHOICES))
    return (scores.argmax(-1) == 1).double().mean().item()


def test_the_figures_are_those_of_the_policys_own_logprobs(
    harness, tasks, tmp_path, lab_policy, capsys
):
    torch.manual_seed(0)
    for parameter in lab_policy.parameters().values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    adapter = str(lab_policy.save_adapter(tmp_path / "adapter"))
    expected = {adapter: second_share(lab_policy)}
    with lab_policy.base():
        expected["lab"] = second_share(lab_policy)
    assert expected["lab"] != expected[adapter]
    command = ["eval", "lab", adapter, "--harness", "own_choice,own_text",
               "--harness-include", str(tasks), "--out", str(tmp_path / "out")]  # fmt: skip
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text('{"suite": "lab"}')
    assert main(command) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["suite"] == "lab"  # Beside what is there.
    found = {name: tasks["own_choice"]["acc"][0] for name, tasks in results["harness"].items()}
    assert found == pytest.approx(expected)
    assert results["harness"]["lab"]["own_text"]["exact_match"][0] == 0.0
    table = (tmp_path / "out" / "results.md").read_text()
    assert f"| own_choice | acc | {expected['lab']:.3f} ±" in table
    assert "own_choice" in capsys.readouterr().out
    add_to_results(tmp_path / "out", results["harness"])  # A table replaces that of before.
    assert (tmp_path / "out" / "results.md").read_text() == table
    # What is known is not computed again.
    file = tmp_path / "out" / "harness.json"
    known = json.loads(file.read_text())
    for figures in known.values():
        figures["own_choice"]["acc"] = [0.125, None]
    file.write_text(json.dumps(known))
    assert main(command) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())["harness"]
    assert [tasks["own_choice"]["acc"][0] for tasks in results.values()] == [0.125, 0.125]


def test_an_unknown_task_is_one_line_with_a_suggestion(harness, tasks):
    with pytest.raises(UserError, match=r"got 'own_choise'\. Did you mean own_choice\?"):
        load_tasks(HarnessSettings(("own_choise",), str(tasks)))
    with pytest.raises(UserError, match="--harness-include: must be a folder"):
        load_tasks(HarnessSettings(("own_choice",), str(tasks / "no")))


def test_data_that_cannot_be_loaded_are_one_line(harness, tmp_path):
    text = TASK.format(name="lost", data="/nowhere.jsonl", kind="multiple_choice", own=CHOOSE)
    (tmp_path / "lost.yaml").write_text(text)
    with pytest.raises(UserError, match="--harness: must be tasks whose data can be loaded") as e:
        load_tasks(HarnessSettings(("lost",), str(tmp_path)))
    assert "\n" not in str(e.value)


def test_without_the_harness_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r"--harness: lm-eval must be installed.*\[lm-eval\]"):
        load_tasks(HarnessSettings(("gsm8k",)))


@pytest.mark.parametrize("code", ["own.py", "task.yaml"])
def test_code_of_tasks_from_elsewhere_needs_allow_code(code, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / code).write_text("doc_to_text: !function own.text")
    command = ["eval", "lab", "--harness", "own", "--harness-include", str(folder)]
    assert main(command) == 2
    assert capsys.readouterr().err.startswith("--allow-code: must be given to run code of task")
    monkeypatch.chdir(tmp_path)  # The folder is now inside of the working directory.
    main(command)
    assert "--allow-code" not in capsys.readouterr().err


def test_a_suite_or_a_harness_must_be_given(capsys):
    assert main(["eval", "lab"]) == 2
    assert capsys.readouterr().err.startswith("--suite: must be given, or --data or --harness.")


def test_the_table_has_a_row_for_each_metric():
    table = harness_table(
        {"a": {"t": {"acc": (0.5, 0.125), "f1": (1.0, None)}}, "b": {"u": {"acc": (0, 0.0)}}}
    )
    assert table.rows == (
        ("t", "acc", "0.500 ±0.125", "-"), ("t", "f1", "1.000", "-"),
        ("u", "acc", "-", "0.000 ±0.000"),
    )  # fmt: skip
