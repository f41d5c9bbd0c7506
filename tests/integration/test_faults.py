"""Faults around a run, one at a time, with real files and real limits.

Elsewhere: hung and killed reward workers (test_rewards_scorer.py), out of memory (test_layouts.py),
gradients that are no numbers (test_train.py), empty data (test_data.py), an engine that breaks
down and a disk that fills up during a run (test_crash.py).
"""

from __future__ import annotations

import io
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from rich.console import Console

from gft_lite.cli import main
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.training_sections import OptimSettings
from gft_lite.runs import checkpoint
from gft_lite.runs.folder import RunFolder
from gft_lite.training.optim import make_optimizer
from gft_lite.training.run import train
from gft_lite.utils.errors import RecipeError, UserError
from gft_lite.utils.files import atomic_write, lock_folder, write_text_atomic

SMALL = [
    "train.steps=2", "train.problems_per_step=2", "data.problems=20", "data.holdout=2",
    "monitor.every=1", "monitor.problems=1", "eval.samples=1", "eval.k=[1]",
    "eval.sets.test.problems=1", "eval.sets.retention.problems=1", "checkpoint.every=1",
    "policy.quantization=none",
]  # fmt: skip
QUIET = Console(quiet=True)


def small(*overrides):
    return Recipe.load("recipes/lab.yaml", [*SMALL, *overrides])


def weights(run):
    return (run.adapter / "adapter_model.safetensors").read_bytes()


@contextmanager
def mounted(folder, options):
    """A file system of its own; skips if this process may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user can't mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without faults."""
    return train(small(), tmp_path_factory.mktemp("plain") / "run", console=QUIET)


def damage_file(file, damage):
    data = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes({"one bit": data, "cut": data[:-1], "empty": b""}[damage])


class TestCheckpoints:
    @pytest.fixture
    def save(self, lab_policy):
        """Write the checkpoint of a step; the weights differ by step."""
        optimizer = make_optimizer(lab_policy, OptimSettings())

        def save(folder, step):
            for parameter in lab_policy.parameters().values():
                parameter.data.fill_(step)
                parameter.grad = parameter.data.clone()
            optimizer.step()
            return checkpoint.save(folder, step, lab_policy, optimizer, keep=3)

        return save

    def test_a_full_disk_leaves_the_previous_one_valid(self, save, tmp_path):
        with mounted(tmp_path / "disk", "size=2m") as disk:  # A checkpoint has 1.2 MB.
            folder = disk / "checkpoints"
            first = save(folder, 1)
            free = os.statvfs(disk).f_bfree
            with pytest.raises(checkpoint.CheckpointError, match=r"space.*untouched: step-000001"):
                save(folder, 2)
            assert checkpoint.list_checkpoints(folder) == [first]
            assert checkpoint.find_damage(first) is None
            # What was written in part is removed; the folder's own entries may take a block.
            assert os.statvfs(disk).f_bfree >= free - 1

    def test_a_file_size_limit_leaves_the_previous_one_valid(self, save, tmp_path):
        first = save(tmp_path, 1)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            with pytest.raises(checkpoint.CheckpointError, match="untouched: step-000001"):
                save(tmp_path, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert list(tmp_path.iterdir()) == [first]
        assert checkpoint.find_damage(first) is None
        assert checkpoint.find_damage(save(tmp_path, 2)) is None

    @pytest.mark.parametrize(
        "name",
        ["adapter/adapter_model.safetensors", "adapter/adapter_config.json",
         "optimizer.safetensors", "state.json", "manifest.json"],
    )  # fmt: skip
    @pytest.mark.parametrize("damage", ["one bit", "cut", "gone", "empty"])
    def test_a_damaged_one_is_reported_and_the_previous_one_used(
        self, name, damage, save, tmp_path
    ):
        first, second = save(tmp_path, 1), save(tmp_path, 2)
        reports = []
        assert checkpoint.newest_valid(tmp_path, reports.append) == second
        assert reports == []
        damage_file(second / name, damage)
        assert checkpoint.newest_valid(tmp_path, reports.append) == first
        [text] = reports
        assert text.startswith("damaged checkpoint, going back to the one before: ")
        assert str(second) in text
        assert name in text or (name == "manifest.json" and damage != "gone")
        # Renamed: it does not count and does not block its successor.
        assert checkpoint.list_checkpoints(tmp_path) == [first]
        assert save(tmp_path, 2) == second
        assert checkpoint.newest_valid(tmp_path, reports.append) == second

    def test_damage_at_one_step_again_and_again(self, save, tmp_path):
        first = save(tmp_path, 1)
        for number in range(3):
            damage_file(save(tmp_path, 2) / "state.json", "empty")
            reports = []
            assert checkpoint.newest_valid(tmp_path, reports.append) == first
            assert len(reports) == 1, number
        names = sorted(p.name for p in tmp_path.iterdir())
        assert names == ["step-000001", "step-000002.damaged"]

    @pytest.mark.parametrize("manifest", ["{}", '{"sha256": {}}', '{"sha256": []}', "[]", "7"])
    def test_a_manifest_that_lists_nothing_is_damage(self, save, tmp_path, manifest):
        saved = save(tmp_path, 1)
        (saved / "manifest.json").write_text(manifest, encoding="utf-8")
        assert checkpoint.find_damage(saved)

    def test_checkpoints_are_ordered_by_number_and_other_entries_ignored(self, tmp_path):
        for name in ("step-999999", "step-1000000", "step-000002", "step-x", "step-3.tmp"):
            (tmp_path / name).mkdir()
        (tmp_path / "step-000009").touch()
        names = [p.name for p in checkpoint.list_checkpoints(tmp_path)]
        assert names == ["step-000002", "step-999999", "step-1000000"]
        assert list(map(checkpoint.step_of, checkpoint.list_checkpoints(tmp_path)))[-1] == 1_000_000

    def test_without_a_valid_one_there_is_an_error_and_no_change(self, save, tmp_path):
        for step in (1, 2):
            os.truncate(save(tmp_path, step) / "state.json", 3)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(checkpoint.CheckpointError) as caught:
            checkpoint.newest_valid(tmp_path, print)
        for word in ("step-000001", "step-000002", "state.json has changed", f"Remove {tmp_path}"):
            assert word in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before


def test_a_run_returns_to_the_checkpoint_before_a_damaged_one(plain, tmp_path):
    out = shutil.copytree(plain.path, tmp_path / "run")
    os.truncate(out / "checkpoints" / "step-000002" / "optimizer.safetensors", 1000)
    console = Console(file=io.StringIO(), width=400)
    again = train(small(), out, resume=True, console=console)
    assert "optimizer.safetensors has changed" in console.file.getvalue()
    assert [m["step"] for m in again.metrics()] == [1, 2]
    assert weights(again) == weights(plain)
    names = sorted(p.name for p in again.checkpoints.iterdir())
    assert names == ["step-000001", "step-000002", "step-000002.damaged"]


# A run that loads this model fails with another error.
NO_MODEL = "policy.model=no/such-model"


def test_two_runs_in_one_folder_are_rejected_until_the_first_has_ended(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.create(small(NO_MODEL).to_yaml())
    code = (
        "import sys; from pathlib import Path; from gft_lite.utils.files import lock_folder\n"
        "with lock_folder(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    first = subprocess.Popen([sys.executable, "-c", code, str(run.path)],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert first.stdout.readline() == b"held\n"
    text = f"--out: must not be in use by another run.*process {first.pid} is at work"
    with pytest.raises(RecipeError, match=text):
        train(small(NO_MODEL), run.path, resume=True, console=QUIET)
    first.kill()
    first.communicate()
    with lock_folder(run.path):
        pass


@pytest.mark.parametrize("resume", [False, True])
def test_a_read_only_folder_is_an_error_before_anything_is_loaded(resume, tmp_path):
    folder = tmp_path / "locked"
    if os.geteuid():
        folder.mkdir(mode=0o555)
        place = contextmanager(lambda: (yield))()
    else:  # Root may write where the mode forbids it, but not to a read-only file system.
        place = mounted(folder, "ro")
    with place, pytest.raises(RecipeError) as caught:
        train(small(NO_MODEL), folder / "run", resume=resume, console=QUIET)
    [text] = caught.value.problems
    if resume:
        assert text.startswith("--resume: must find a run to continue")
    else:
        assert text.startswith("--out: must be a folder that can be written to, got ")
        assert f"Make {str(folder)!r} writable" in text


# A file of a run, what is written to it, and the start of the error of --resume.
SIDE_FILES = {
    "a damaged metric": ("metrics.jsonl", "{", "metrics.jsonl:1: must be the metrics of one step"),
    "lost metrics": ("metrics.jsonl", "", "metrics.jsonl: must have the metrics of the 2 steps"),
    "a damaged KL set": ("kl_set.json", "[[1", "kl_set.json:1: must have one response"),
    "an empty KL set": ("kl_set.json", "[]", "kl_set.json: must have one response"),
    "no base results": ("eval/base.json", "{}", "eval/base.json: must have the base's results"),
    "damaged base results": ("eval/base.json", "{", "eval/base.json:1: must have the base's"),
    "a damaged identity": ("data.json", "[]", "data.json: must have a fingerprint"),
}


@pytest.mark.parametrize("name", SIDE_FILES)
def test_a_damaged_side_file_is_named_with_what_to_do(name, plain, tmp_path, capsys):
    file, text, error = SIDE_FILES[name]
    out = shutil.copytree(plain.path, tmp_path / "run")
    lines = (out / file).read_text(encoding="utf-8").splitlines(keepends=True)
    damaged = f"{text}\n" + "".join(lines[1:]) if name == "a damaged metric" else text
    (out / file).write_text(damaged, encoding="utf-8")
    assert main(["train", str(out / "recipe.yaml"), "--out", str(out), "--resume"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"{out}/{error}")
    assert "Remove the file" in last or "Restore the file" in last


@pytest.mark.parametrize("name", ["kl_set.json", "eval/base.json"])
def test_what_is_removed_is_computed_again(name, plain, tmp_path):
    out = shutil.copytree(plain.path, tmp_path / "run")
    before = (out / name).read_bytes()
    (out / name).unlink()
    again = train(small(), out, resume=True, console=QUIET)
    assert (out / name).read_bytes() == before
    assert weights(again) == weights(plain)


def test_bad_lines_after_the_checkpoint_do_not_block_it(plain, tmp_path):
    out = shutil.copytree(plain.path, tmp_path / "run")
    shutil.rmtree(out / "checkpoints" / "step-000002")
    lines = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (out / "metrics.jsonl").write_bytes(lines[0] + b"garbage\n" + lines[1][:20])
    again = train(small(), out, resume=True, console=QUIET)
    assert [m["step"] for m in again.metrics()] == [1, 2]
    assert weights(again) == weights(plain)


def test_changed_data_stop_a_resume(tmp_path):
    rows = tmp_path / "rows.jsonl"
    row = {"problem": "011-012+131....=", "answer": "130", "expert": "@011;004;130#130"}
    rows.write_text("".join(json.dumps(row | {"id": i}) + "\n" for i in range(4)), encoding="utf-8")
    columns = "{problem: problem, answer: answer, expert: expert}"
    own = small(f"data.source={rows}", f"data.columns={columns}", "data.holdout=1",
                "group={expert: 1, teacher: 0, self: 2}", "train.steps=1")  # fmt: skip
    run = train(own, tmp_path / "run", console=QUIET)
    train(own, run.path, resume=True, console=QUIET)
    rows.write_text(rows.read_text(encoding="utf-8").replace("130", "131"), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        train(own, run.path, resume=True, console=QUIET)
    [text] = caught.value.problems
    assert text.startswith("data: must be the data that the run was started with")


def test_a_data_set_of_one_row(tmp_path):
    run = train(small("data.problems=1", "data.holdout=0"), tmp_path / "run", console=QUIET)
    assert run.summary()["problems"] == 1
    # Two problems a step: the only one, once for each of two epochs.
    assert [(m["groups"], m["trajectories"]) for m in run.metrics()] == [(2, 16), (2, 16)]
    assert len({g["problem"]["id"] for step in (1, 2) for g in run.groups(step)}) == 1


def test_a_clock_that_jumps_changes_nothing(plain, tmp_path, monkeypatch):
    """For vLLM, which reads the clock, see test_hot_loads.py."""
    days, real = itertools.count(), time.time
    # Forward and back by more and more days, at every reading.
    monkeypatch.setattr(time, "time", lambda: real() + 86400 * (-1) ** (day := next(days)) * day)
    begun = time.perf_counter()
    run = train(small(), tmp_path / "run", console=QUIET)
    elapsed = time.perf_counter() - begun
    assert weights(run) == weights(plain)
    assert all(0 <= seconds <= elapsed for seconds in run.summary()["seconds"].values())


def test_a_file_that_is_written_in_part_replaces_none(tmp_path):
    file = tmp_path / "eval" / "base.json"
    write_text_atomic(file, "old")
    with pytest.raises(OSError, match="disk"), atomic_write(file) as partial:
        partial.write_text("ne")
        raise OSError("disk full")
    assert file.read_text() == "old"
    write_text_atomic(file, "new")
    assert [f.read_text() for f in file.parent.iterdir()] == ["new"]
