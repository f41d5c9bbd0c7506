"""What can go wrong around a run, one thing at a time, with real files and real limits.

Elsewhere: hung and killed reward workers (test_rewards_scorer.py), out of memory (test_layouts.py),
gradients that are no numbers (test_train.py), empty data (test_data.py), an engine that breaks
down and a disk that fills up during a run (test_crash.py).
"""

from __future__ import annotations

import io
import itertools
import os
import resource
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from rich.console import Console

from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.training_sections import OptimSettings
from gft_lite.runs import checkpoint
from gft_lite.runs.folder import RunFolder
from gft_lite.training.optim import make_optimizer
from gft_lite.training.run import train
from gft_lite.utils.errors import RecipeError
from gft_lite.utils.files import atomic_write, lock_folder, write_text_atomic

SMALL = [
    "train.steps=2", "train.problems_per_step=2", "data.problems=20", "data.holdout=2",
    "monitor.every=1", "monitor.problems=1", "eval.samples=1", "eval.k=[1]",
    "eval.sets.test.problems=1", "eval.sets.retention.problems=1", "checkpoint.every=1",
]  # fmt: skip
QUIET = Console(quiet=True)


def small(*overrides):
    return Recipe.load("recipes/lab.yaml", [*SMALL, *overrides])


def weights(run):
    return (run.adapter / "adapter_model.safetensors").read_bytes()


@contextmanager
def mounted(folder, options):
    """A file system of its own, where this process may mount one."""
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
    """A run with which nothing went wrong."""
    return train(small(), tmp_path_factory.mktemp("plain") / "run", console=QUIET)


class TestCheckpoints:
    @pytest.fixture
    def save(self, lab_policy):
        """Write the checkpoint of a step; every step has other weights."""
        optimizer = make_optimizer(lab_policy, OptimSettings())

        def save(folder, step):
            for parameter in lab_policy.parameters().values():
                parameter.data.fill_(step)
                parameter.grad = parameter.data.clone()
            optimizer.step()
            return checkpoint.save(folder, step, lab_policy, optimizer, keep=3)

        return save

    def test_a_full_disk_leaves_the_old_one_whole(self, save, tmp_path):
        with mounted(tmp_path / "disk", "size=2m") as disk:  # A checkpoint has 1.2 MB.
            folder = disk / "checkpoints"
            first = save(folder, 1)
            free = os.statvfs(disk).f_bfree
            with pytest.raises(checkpoint.CheckpointError, match=r"space.*untouched: step-000001"):
                save(folder, 2)
            assert checkpoint.list_checkpoints(folder) == [first]
            assert checkpoint.find_damage(first) is None
            # What was half written is gone: the folder's own entries may take a block.
            assert os.statvfs(disk).f_bfree >= free - 1

    def test_files_that_may_not_grow_leave_the_old_one_whole(self, save, tmp_path):
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
    def test_a_damaged_one_is_told_and_the_one_before_taken(self, name, damage, save, tmp_path):
        first, second = save(tmp_path, 1), save(tmp_path, 2)
        told = []
        assert checkpoint.newest_valid(tmp_path, told.append) == second
        assert told == []
        file = second / name
        data = bytearray(file.read_bytes())
        if damage == "gone":
            file.unlink()
        else:
            data[len(data) // 2] ^= 1
            file.write_bytes({"one bit": data, "cut": data[:-1], "empty": b""}[damage])
        assert checkpoint.newest_valid(tmp_path, told.append) == first
        [text] = told
        assert text.startswith("damaged checkpoint, going back to the one before: ")
        assert str(second) in text
        assert name in text or (name == "manifest.json" and damage != "gone")
        # Set aside: it neither counts as one nor is in the way of its successor.
        assert checkpoint.list_checkpoints(tmp_path) == [first]
        assert save(tmp_path, 2) == second
        assert checkpoint.newest_valid(tmp_path, told.append) == second

    def test_none_that_is_whole_is_an_error_and_nothing_is_touched(self, save, tmp_path):
        for step in (1, 2):
            os.truncate(save(tmp_path, step) / "state.json", 3)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(checkpoint.CheckpointError) as caught:
            checkpoint.newest_valid(tmp_path, print)
        for word in ("step-000001", "step-000002", "state.json has changed", f"Remove {tmp_path}"):
            assert word in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before


def test_a_run_goes_back_to_the_checkpoint_before_a_damaged_one(plain, tmp_path):
    out = shutil.copytree(plain.path, tmp_path / "run")
    os.truncate(out / "checkpoints" / "step-000002" / "optimizer.safetensors", 1000)
    console = Console(file=io.StringIO(), width=400)
    again = train(small(), out, resume=True, console=console)
    assert "optimizer.safetensors has changed" in console.file.getvalue()
    assert [m["step"] for m in again.metrics()] == [1, 2]
    assert weights(again) == weights(plain)
    names = sorted(p.name for p in again.checkpoints.iterdir())
    assert names == ["step-000001", "step-000002", "step-000002.damaged"]


def test_two_runs_in_one_folder_are_refused_until_the_first_has_died(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.create(small().to_yaml())
    code = (
        "import sys; from pathlib import Path; from gft_lite.utils.files import lock_folder\n"
        "with lock_folder(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    first = subprocess.Popen([sys.executable, "-c", code, str(run.path)],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert first.stdout.readline() == b"held\n"
    told = f"--out: must not be in use by another run.*process {first.pid} is at work"
    begun = time.monotonic()
    with pytest.raises(RecipeError, match=told):
        train(small(), run.path, resume=True, console=QUIET)
    assert time.monotonic() - begun < 1  # Before a model is loaded.
    first.kill()
    first.communicate()
    with lock_folder(run.path):
        pass


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_cannot_be_written_to_is_told_before_anything_is_loaded(resume, tmp_path):
    folder = tmp_path / "locked"
    if os.geteuid():
        folder.mkdir(mode=0o555)
        place = contextmanager(lambda: (yield))()
    else:  # Root may write where the mode forbids it, but not to a file system that is read-only.
        place = mounted(folder, "ro")
    with place:
        begun = time.monotonic()
        with pytest.raises(RecipeError) as caught:
            train(small(), folder / "run", resume=resume, console=QUIET)
        assert time.monotonic() - begun < 1
    [text] = caught.value.problems
    if resume:
        assert text.startswith("--resume: must find a run to continue")
    else:
        assert text.startswith("--out: must be a folder that can be written to, got ")
        assert f"Make {str(folder)!r} writable" in text


def test_a_data_set_of_one_row(tmp_path):
    run = train(small("data.problems=1", "data.holdout=0"), tmp_path / "run", console=QUIET)
    assert run.summary()["problems"] == 1
    # Two problems a step: the one there is, once for each of two epochs.
    assert [(m["groups"], m["trajectories"]) for m in run.metrics()] == [(2, 16), (2, 16)]
    assert len({g["problem"]["id"] for step in (1, 2) for g in run.groups(step)}) == 1


def test_a_clock_that_jumps_changes_nothing(plain, tmp_path, monkeypatch):
    """For vLLM, which looks at it, see test_hot_loads.py."""
    days, real = itertools.count(), time.time
    # Forth and back by more and more days, at every look at it.
    monkeypatch.setattr(time, "time", lambda: real() + 86400 * (-1) ** (day := next(days)) * day)
    begun = time.perf_counter()
    run = train(small(), tmp_path / "run", console=QUIET)
    elapsed = time.perf_counter() - begun
    assert weights(run) == weights(plain)
    assert all(0 <= seconds <= elapsed for seconds in run.summary()["seconds"].values())


def test_half_a_file_takes_no_whole_one_s_place(tmp_path):
    file = tmp_path / "eval" / "base.json"
    write_text_atomic(file, "old")
    with pytest.raises(OSError, match="disk"), atomic_write(file) as partial:
        partial.write_text("ne")
        raise OSError("disk full")
    assert file.read_text() == "old"
    write_text_atomic(file, "new")
    assert [f.read_text() for f in file.parent.iterdir()] == ["new"]
