"""Problems by the success share of sampled answers, and the order of an epoch by it."""

from __future__ import annotations

import io
import json
from collections import Counter

import pytest
from rich.console import Console

from gft_lite.cli import main
from gft_lite.data.difficulty import curriculum_order
from gft_lite.recipe.schema import Recipe
from gft_lite.runs.folder import RunFolder
from gft_lite.training.difficulty import RECORD, open_difficulty, record_difficulty
from gft_lite.training.visits import visits_of_step
from gft_lite.types import Problem
from gft_lite.utils.errors import RecipeError

# Right and all sampled answers by problem.
SAMPLED = {"never": (0, 4), "once": (1, 4), "half": (2, 4), "often": (3, 4), "always": (4, 4)}
PROBLEMS = [Problem(f"n{i}", text, "5") for i, text in enumerate([*SAMPLED, "new"])]


def response(correct, source="self", reward=1.0):
    return {"source": source, "correct": correct, "reward": reward}


@pytest.fixture
def groups(tmp_path):
    """A folder as `gft-lite groups` writes it, with other ids and two epochs of one problem."""
    folder = tmp_path / "groups"
    folder.mkdir()
    lines = []
    for text, (right, count) in SAMPLED.items():
        responses = [response(True, "expert"), *(response(i < right) for i in range(count))]
        if text == "half":  # One epoch with both right, one with both wrong.
            lines.append({"problem": text, "visit": 1, "responses": responses[:3]})
            responses = responses[3:]
        lines.append({"problem": text, "visit": 0, "responses": responses})
    for number, line in enumerate(lines):
        line["problem"] = {"id": f"other-{number}", "text": line["problem"], "answer": "5"}
    (folder / "groups.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "recipe.yaml").write_text("policy: {model: lab}\n")
    return folder


def select(folder, run, problems=PROBLEMS, model="lab", **difficulty):
    """The texts of the kept problems with their shares, and what is printed."""
    tree = {"policy": {"model": model}, "data": {"difficulty": {"from": str(folder), **difficulty}}}
    console = Console(file=io.StringIO(), width=300)
    found = open_difficulty(Recipe.from_tree(tree), RunFolder(run), console)
    kept = found.select(problems, console)
    record_difficulty(found, RunFolder(run))
    return {p.text: p.success for p in kept}, console.file.getvalue().strip()


def test_problems_in_the_range_are_kept_and_the_others_counted(groups, tmp_path):
    kept, line = select(groups, tmp_path / "run")
    assert kept == {"once": 0.25, "half": 0.5, "often": 0.75}
    assert line == (
        "data.difficulty: 3 of 6 problems kept, with a success share from 0.1 to 0.9; "
        "dropped 1 below, 1 above, 1 without sampled answers (gft-lite groups samples what the "
        "steps visit: give it more train.steps)"
    )
    assert list(select(groups, tmp_path / "other", low=0.5, high=1.0)[0]) == ["half", "often",
                                                                              "always"]  # fmt: skip


def test_a_resumed_run_has_the_problems_that_it_started_with(groups, tmp_path):
    first = select(groups, tmp_path / "run")
    (groups / "groups.jsonl").unlink()
    assert select(groups, tmp_path / "run") == first
    (tmp_path / "run" / RECORD).write_text("{}")
    with pytest.raises(Exception, match=r"difficulty\.json: must have the success share of each"):
        select(groups, tmp_path / "run")


def test_answers_of_an_evaluation(tmp_path):
    folder = tmp_path / "evals/x"
    file = folder / "problems/the-model/train.jsonl"
    file.parent.mkdir(parents=True)
    graded = [{"id": t, "text": t, "answer": "5", "correct": right, "samples": n, "scores": []}
              for t, (right, n) in SAMPLED.items()]  # fmt: skip
    # Without a rule that decides correctness, a reward above 0.5 is right, as in training.
    graded[1] |= {"correct": None, "scores": [0.6, 0.5, None, 0.2]}
    file.write_text("".join(json.dumps(line) + "\n" for line in graded))
    (folder / "targets.json").write_text(json.dumps({"a": {"model": "other/model"}}))
    kept, printed = select(folder, tmp_path / "run")
    assert kept == {"once": pytest.approx(1 / 3), "half": 0.5, "often": 0.75}
    assert "the answers are those of 'other/model', while policy.model is 'lab'" in printed
    (folder / "problems/second").mkdir()
    (folder / "problems/second/train.jsonl").write_text("")
    with pytest.raises(RecipeError, match=r"of gft-lite eval with one model, got .* 2 models"):
        select(folder, tmp_path / "new")


@pytest.mark.parametrize(
    ("content", "problems", "settings", "error"),
    [
        (None, PROBLEMS, {}, "from: must be a folder of gft-lite groups, or of gft-lite eval"),
        ([], PROBLEMS, {}, "from: must have sampled answers, got"),
        ([response(True, "expert")], PROBLEMS, {}, "from: must have sampled answers, got"),
        ([response(None, reward=None)], PROBLEMS, {}, "from: must have sampled answers, got"),
        ([response(True)], [Problem("n", "x", "5")], {}, "from: must have answers to the training"),
        ([response(True)], [Problem("n", "once", "6")], {}, "from: must have answers to the train"),
        ([response(True)], PROBLEMS, {}, ": must keep problems with a success share from 0.1 to 0.9"
         ", got none: dropped 0 below, 1 above, 5 without sampled answers (gft-lite groups samples "
         "what the steps visit: give it more train.steps). Lower"),
    ],
)  # fmt: skip
def test_folders_that_can_t_be_used(tmp_path, content, problems, settings, error):
    folder = tmp_path / "g"
    if content is not None:
        folder.mkdir()
        line = {"problem": {"id": "o", "text": "once", "answer": "5"}, "visit": 0,
                "responses": content}  # fmt: skip
        (folder / "groups.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(RecipeError) as caught:
        select(folder, tmp_path / "run", problems, **settings)
    [text] = caught.value.problems
    assert text.startswith("data.difficulty") and error in text


# --- the curriculum --------------------------------------------------------------------------

SUCCESS = [0.25, 0.75, 0.5, 0.25, 0.75, 0.5, 0.25, 0.75, 0.5, 0.25, 0.75, 0.5]


def test_easy_problems_come_first_in_every_epoch():
    orders = [curriculum_order(SUCCESS, "easy_first", 4, seed=0, epoch=e) for e in range(3)]
    for order in orders:
        assert [SUCCESS[i] for i in order] == sorted(SUCCESS, reverse=True)
        assert sorted(order) == list(range(12))
    assert orders[0] != orders[1]  # Equals are in another order.
    assert orders[0] == curriculum_order(SUCCESS, "easy_first", 4, seed=0, epoch=0)
    assert orders[0] != curriculum_order(SUCCESS, "easy_first", 4, seed=1, epoch=0)


@pytest.mark.parametrize("per_step", [3, 6])
def test_a_mixed_epoch_has_all_shares_in_each_step(per_step):
    order = curriculum_order(SUCCESS, "mixed", per_step, seed=0, epoch=0)
    assert sorted(order) == list(range(12))
    for start in range(0, 12, per_step):
        found = Counter(SUCCESS[i] for i in order[start : start + per_step])
        assert found == {0.25: per_step // 3, 0.5: per_step // 3, 0.75: per_step // 3}
    # Of sizes that do not divide the data, and of steps with more problems than there are.
    for size in (5, 7, 30):
        assert sorted(curriculum_order(SUCCESS, "mixed", size, seed=0, epoch=0)) == [*range(12)]


def test_the_visits_of_a_step_follow_the_curriculum():
    problems = [Problem(str(i), str(i), "5", success=s) for i, s in enumerate(SUCCESS)]
    data = {"difficulty": {"from": "x"}, "curriculum": "easy_first"}
    recipe = Recipe.from_tree({"data": data, "train": {"problems_per_step": 5}})
    steps = [[v.problem.success for v in visits_of_step(recipe, problems, step)]
             for step in (1, 2, 3)]  # fmt: skip
    assert steps == [[0.75] * 4 + [0.5], [0.5] * 3 + [0.25] * 2, [0.25] * 2 + [0.75] * 3]
    assert [v.epoch for v in visits_of_step(recipe, problems, 3)] == [0, 0, 1, 1, 1]
    assert visits_of_step(recipe, problems, 2) == visits_of_step(recipe, problems, 2)


def test_training_on_the_problems_of_sampled_groups(tmp_path, capsys):
    """From `gft-lite groups` to a training without and with the groups themselves."""
    small = ["train.steps=3", "train.problems_per_step=4", "data.problems=14", "data.holdout=2",
             "group={expert: 1, teacher: 0, self: 4}", "monitor.every=0", "eval.samples=1",
             "eval.k=[1]", "eval.sets.test.problems=1", "eval.sets.retention.problems=1",
             "monitor.problems=1", "rollout.temperature=1"]  # fmt: skip
    groups, run = str(tmp_path / "g"), tmp_path / "run"
    assert main(["groups", "recipes/lab.yaml", *small, "--out", groups]) == 0
    rights = {}
    for line in (tmp_path / "g/groups.jsonl").read_text().splitlines():
        entry = json.loads(line)
        own = [r["correct"] for r in entry["responses"] if r["source"] == "self"]
        rights[entry["problem"]["id"]] = sum(own) / len(own)
    assert len(rights) == 12
    wanted = {name for name, share in rights.items() if share <= 0.5}
    assert 0 < len(wanted) < 12 and len(set(rights.values())) > 2
    by_difficulty = ["data.difficulty.from=" + groups, "data.difficulty.low=0",
                     "data.difficulty.high=0.5", "data.curriculum=easy_first"]  # fmt: skip
    offline = f"group.offline={groups}"
    capsys.readouterr()
    train = ["train", "recipes/lab.yaml", *small, offline, "--out", str(run), *by_difficulty]
    assert main(train) == 0
    assert f"{len(wanted)} of 12 problems kept" in " ".join(capsys.readouterr().err.split())
    entries = [entry for step in (1, 2, 3) for entry in RunFolder(run).groups(step)]
    visited = [entry["problem"]["id"] for entry in entries]
    epoch = visited[: len(wanted)]
    assert sorted(epoch) == sorted(wanted)
    assert [rights[name] for name in epoch] == sorted((rights[n] for n in wanted), reverse=True)
    # The problems are part of what a run is.
    assert main([*train, "data.difficulty.high=0.6", "--resume"]) == 2
    assert "differs in data.difficulty.high (0.5, now 0.6)" in capsys.readouterr().err
