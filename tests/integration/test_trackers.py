"""What TensorBoard, W&B (offline) and trackio have on the disk after a run and its resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gft_lite.recipe.schema import Recipe
from gft_lite.runs.trackers import TRACKERS, Trackers, _run_name, check_trackers, tracked_values
from gft_lite.types import Group, Problem, Response, ScoredGroup
from gft_lite.utils.errors import UserError

STEP = {"step": 1, "loss": 0.125, "skipped": None, "reward": {"self": 0.25},
        "eval": {"test": {"pass@1": 0.5}}}  # fmt: skip
VALUES = {"train/loss": 0.125, "reward/self": 0.25, "eval/test/pass@1": 0.5}
GROUP = ScoredGroup(
    Group(
        Problem("p", "What is 2 + 2?", "4"),
        (
            Response((1,), "4", "expert", reward=1.0, verdict="ok"),
            Response((1,), "a | b\n<think>", "self", verdict="not_applicable"),
        ),
    ),
    (0.5, -0.5),
)
COLUMNS = ["step", "prompt", "source", "response", "reward", "advantage"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make a run's folder with one tracker: two steps, then a resume that repeats the second."""
    home = tmp_path_factory.mktemp("trackers")
    environment = pytest.MonkeyPatch()
    environment.setenv("WANDB_MODE", "offline")
    environment.setenv("WANDB_SILENT", "true")
    environment.setenv("TRACKIO_DIR", str(home / "trackio"))  # Read when trackio is imported.

    def write(name: str) -> Path:
        pytest.importorskip(name, reason=f"{name} is not installed")
        run = home / name / "mine"
        recipe = Recipe.load("recipes/lab.yaml", [f"log.trackers=[{name}]", "log.completions=1"])
        for steps in ((1, 2), (2, 3)):
            trackers = Trackers([name], recipe, run)
            for step in steps:
                trackers.log_groups(step, [GROUP, GROUP])
                trackers.log({**STEP, "step": step, "loss": step / 8}, step)
            trackers.close()
        return run

    yield write
    environment.undo()


def test_names_are_grouped_and_only_numbers_are_sent():
    assert tracked_values(STEP) == VALUES


def test_the_name_of_a_stage_has_that_of_its_run(tmp_path):
    assert _run_name(tmp_path / "mine") == "mine"
    assert _run_name(tmp_path / "mine" / "stages" / "1-sft") == "mine/1-sft"


def test_without_trackers_nothing_is_written(tmp_path):
    Trackers([], Recipe.load("recipes/lab.yaml"), tmp_path / "run").log(STEP, 1)
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed_names_the_extra(monkeypatch):
    check_trackers([])
    monkeypatch.setattr("gft_lite.runs.trackers.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"log.trackers: wandb must be installed, .*\[trackers\]"):
        check_trackers(["wandb"])


def test_tensorboard(folder):
    run = folder("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert all(f.parent == run / "tracker" for f in run.rglob("events.out*"))
    events = EventAccumulator(str(run / "tracker")).Reload()
    assert set(events.Tags()["scalars"]) == set(VALUES)
    # The repeated step replaces the first one's value.
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (1, 0.125), (2, 0.25), (3, 0.375)
    ]  # fmt: skip
    [first, *_] = events.Tensors("completions/text_summary")
    table = first.tensor_proto.string_val[0].decode()
    assert [line.split(" | ")[0] for line in table.splitlines()] == [
        "| step",
        "| :--",
        "| 1",
        "| 1",
    ]
    assert "| self | a \\| b<br>&lt;think&gt; | - | -0.5 |" in table


def test_wandb(folder):
    run = folder("wandb")
    name = (run / "tracker" / "id").read_text()
    parts = sorted((run / "tracker" / "wandb").glob("offline-run-*"))
    assert len(parts) == 2 and all(p.name.endswith(f"-{name}") for p in parts)
    log = (parts[0] / f"run-{name}.wandb").read_bytes()
    for text in (b"mine", b"train/loss", b"0.125", b"eval/test/pass@1"):
        assert text in log
    # The record of a metric: "*" as its pattern (field 2), "step" as its axis (field 4).
    assert b"\x12\x01*" in log and b'"\x04step' in log
    table, _ = parts[1].rglob("completions_*_*.table.json")
    assert json.loads(table.read_text())["columns"] == COLUMNS


def test_trackio(folder):
    run = folder("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    [name] = SQLiteStorage.get_runs("lab")
    assert name == f"mine-{(run / 'tracker' / 'id').read_text()}"
    logs = SQLiteStorage.get_logs("lab", name)
    assert [(e["step"], e["train/loss"]) for e in logs if "train/loss" in e] == [
        (1, 0.125), (2, 0.25), (2, 0.25), (3, 0.375)
    ]  # fmt: skip
    rows = next(entry["completions"] for entry in logs if "completions" in entry)["_value"]
    assert [row["response"] for row in rows] == ["4", "a | b\n<think>"]
    assert list(rows[0]) == COLUMNS


def test_every_tracker_of_the_schema_is_in_the_table():
    Recipe.load("recipes/lab.yaml", [f"log.trackers=[{', '.join(TRACKERS)}]"])
