"""A search over a grid: what it proposes, when it stops a run, and what it goes on with."""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path

import pytest

from gft_lite.cli import main
from gft_lite.experiments.search import STUDY, Search
from gft_lite.experiments.sweep_config import Sweep, grid_override
from gft_lite.experiments.sweep_results import SweepFolder
from gft_lite.runs.folder import RunFolder
from gft_lite.utils.errors import RecipeError, UserError

optuna = pytest.importorskip("optuna", reason="optuna is not installed")
GRID = ["optim.lr={log: [1e-4, 1e-2]}", "objective.tau=0,0.5,1"]


def plan(*overrides, grid=GRID, every=1):
    changes = [*map(grid_override, grid), f"overrides.eval.every={every}", "search.trials=6"]
    return Sweep.load("recipes/lab.yaml", [*changes, *overrides])


def write_run(run: RunFolder, curve: list[float], *, done: bool = True) -> None:
    """The files of a run that a search reads: `curve` has pass@1 after every second step."""
    run.path.mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": step, **({} if step % 2 else {"eval": {"test": {"pass@1": curve[step // 2 - 1]}}})}
        for step in range(1, 2 * len(curve) + 1)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run.path / "metrics.jsonl").write_text(text)
    if done:
        figures = {"pass@1": curve[-1], "problems": 1, "samples": 1, "correct": {"a": 1}}
        run.write_json("eval/trained.json", {"test": figures})
        run.write_json("summary.json", {"trained": {}, "seconds": {}, "steps": len(lines)})


def score(trial) -> float:
    """A figure with its best value at lr = 1e-3 and tau = 0.5."""
    distance = abs(math.log10(trial.recipe.optim.lr) + 3) + abs(trial.recipe.objective.tau - 0.5)
    return 1 / (1 + distance)


def finish(search: Search, trial, *curve: float) -> None:
    run = search.folder.run(trial.name)
    write_run(run, list(curve))
    search.finish(trial, run)


def run_search(made: Sweep, folder: Path, times: int = 100) -> list[str]:
    """Run up to `times` trials of a search; returns the names of those that it proposed."""
    folder.mkdir(exist_ok=True)
    search, names = Search(made, SweepFolder(folder)), []
    for trial, _ in search.known():
        finish(search, trial, score(trial))
    while len(names) < times and (trial := search.propose()):
        names.append(trial.name)
        finish(search, trial, score(trial))
    return names


def test_a_set_without_answers_is_searched_by_its_likelihood(tmp_path):
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps(chat))
    chats = f"overrides.eval.sets.test.source={file}"

    def settings(*overrides):
        return Search(plan(*overrides), SweepFolder(tempfile.mkdtemp(dir=tmp_path))).settings

    assert settings().metric is None
    found = settings(chats)
    assert (found.metric, found.mode, found.trials) == ("test/nll", "min", 6)
    assert settings(chats, "search.metric=retention/pass@1").metric == "retention/pass@1"
    with pytest.raises(
        UserError, match=r"of test, which has no answers, got 'test/pass@8'\. Write"
    ):
        settings(chats, "search.metric=test/pass@8")


def test_it_is_the_same_for_a_seed_and_when_it_is_continued(tmp_path):
    whole = run_search(plan(), tmp_path / "whole")
    assert len(set(whole)) == 6
    assert run_search(plan("random_seed=1"), tmp_path / "other") != whole
    assert run_search(plan(), tmp_path / "parts", 2) == whole[:2]
    # Stopped between a proposal and its result.
    Search(plan(), SweepFolder(tmp_path / "parts")).propose()
    assert run_search(plan(), tmp_path / "parts") == whole[3:]
    assert len(run_search(plan("search.trials=8"), tmp_path / "parts")) == 2


def test_the_best_trial_is_that_of_the_metric(tmp_path):
    search = Search(plan("search.mode=min", "search.metric=test/pass@1"), SweepFolder(tmp_path))
    assert search.summary()["best"] is None
    trials = [search.propose() for _ in range(3)]
    for trial, value in zip(trials, (0.5, 0.25, 0.75), strict=True):
        finish(search, trial, value)
    assert search.summary()["best"] == trials[1].name
    assert search.summary()["figure"] == 0.25


def test_every_point_of_a_small_grid_is_proposed_once(tmp_path):
    made = plan("search.trials=4", grid=["objective.tau=0,0.5", "group.self=2,4"])
    assert len(set(run_search(made, tmp_path))) == 4


def test_a_run_goes_on_if_it_is_among_the_best_third(tmp_path):
    """Comparisons come after 1 and 3 evaluations; three runs are needed for a third of one."""
    search = Search(plan("search.prune=true"), SweepFolder(tmp_path))
    first, second, third = (search.propose() for _ in range(3))
    runs = {t.name: search.folder.run(t.name) for t in (first, second, third)}
    write_run(runs[first.name], [0.5, 0.1], done=False)
    assert search.observe(first, runs[first.name]) is None  # Nothing to compare with.
    write_run(runs[second.name], [0.25], done=False)
    assert search.observe(second, runs[second.name]) == 2
    assert search.observe(second, runs[second.name]) is None  # Once.
    write_run(runs[third.name], [0.75, 0.0], done=False)
    assert search.observe(third, runs[third.name]) is None  # The second evaluation isn't compared.
    finish(search, first, 0.5, 0.1, 0.5)
    write_run(runs[third.name], [0.75, 0.0, 0.25], done=False)
    assert search.observe(third, runs[third.name]) == 6
    again = Search(plan("search.prune=true"), SweepFolder(tmp_path))
    assert [(t.name, at) for t, at in again.known()] == [
        (first.name, None), (second.name, 2), (third.name, 6)
    ]  # fmt: skip
    assert again.summary()["best"] == first.name


def test_without_prune_no_run_is_stopped(tmp_path):
    search = Search(plan(), SweepFolder(tmp_path))
    for value in (0.5, 0.25):
        trial = search.propose()
        write_run(search.folder.run(trial.name), [value], done=False)
        assert search.observe(trial, search.folder.run(trial.name)) is None


def test_failed_trials_count_once_and_are_replaced_later(tmp_path):
    search = Search(plan("search.trials=2", grid=["objective.tau=0,0.5"]), SweepFolder(tmp_path))
    failed = [search.propose()]
    search.finish(failed[0], search.folder.run(failed[0].name))
    failed.append(search.propose())
    search.finish(failed[1], search.folder.run(failed[1].name))
    assert failed[0].name != failed[1].name
    assert search.propose() is None
    again = Search(plan("search.trials=2", grid=["objective.tau=0,0.5"]), SweepFolder(tmp_path))
    assert list(again.known()) == []
    assert again.propose() is not None


def test_a_folder_of_another_search_is_an_error(tmp_path):
    Search(plan(), SweepFolder(tmp_path))
    Search(plan("search.trials=7"), SweepFolder(tmp_path))
    for other in (plan("search.prune=true"), plan("overrides.optim.warmup=0")):
        with pytest.raises(UserError, match="--out: must be a new folder or one of the same sear"):
            Search(other, SweepFolder(tmp_path))
    (tmp_path / STUDY).write_text("{}\n")
    with pytest.raises(UserError, match=f"{STUDY}: must be a study of Optuna"):
        Search(plan(), SweepFolder(tmp_path))


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ("--search 3 --metric tets/pass@1", "search.metric: must be test/pass@1, test/pass@8, test/"
         "mean_reward, test/nll, retention/pass@1, retention/pass@8, retention/mean_reward, "
         "retention/nll, got 'tets/pass@1'. Did you mean test/pass@1?"),
        ("--search 3 --prune", "search.prune: must have evaluations while training, got eval."),
        ("--search 7", "search.trials: must be at most 3, the points of the grid"),
        ("--search 3 --seeds 2", "seeds: must be 1 with search"),
        ("--search 3 --random 2", "random: must not be given with search"),
        ("--prune", "--prune: must be given with --search N, got no --search."),
        ("--metric test/pass@1 --prune", "--metric: must be given with --search N"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(flags, error, capsys):
    command = ["sweep", "recipes/lab.yaml", "--grid", "objective.tau=0,0.5,1", "--dry-run"]
    assert main([*command, *flags.split()]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert error in lines[0]


def test_a_search_without_a_grid_is_one_line(capsys):
    assert main(["sweep", "recipes/lab.yaml", "--search", "3", "--dry-run"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "grid: must have the fields to search" in line


def test_each_value_of_the_grid_is_checked_before_anything_runs():
    with pytest.raises(RecipeError, match=r"optim\.lr: must be .*-1"):
        plan(grid=["optim.lr=1e-3,1e-4,-1", "objective.tau={uniform: [0, 1]}"])


def test_without_optuna_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"--search: optuna must be installed.*gft-lite\[optuna\]"):
        Search(plan(), SweepFolder(tmp_path))
