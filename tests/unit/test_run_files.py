"""The files of a run: damaged, incomplete or of other data; and where a run may be put."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gft_lite.policy.batching import Row
from gft_lite.recipe.schema import Recipe
from gft_lite.runs.base_cache import copy_base_files, read_base_evaluation, read_kl_set
from gft_lite.runs.folder import RunFolder, WorkerRunFolder, find_folder
from gft_lite.types import Group, Problem, Response, ScoredGroup
from gft_lite.utils.distributed import SINGLE_PROCESS
from gft_lite.utils.errors import RecipeError, UserError
from gft_lite.utils.files import check_output_path, is_disk_full

NAME_MAX = 255
METRICS = {
    "groups": 1, "trajectories": 1, "tokens": 10, "rollout_tokens": 10, "trained_tokens": 10,
    "updates": 1, "sources": {"self": 1}, "seconds": {}, "skipped": None,
}  # fmt: skip
PROBLEMS = [Problem("a", "1+1", "2", (5, 6)), Problem("b", "1+2", "3", (5, 7))]
FIGURES = {"pass@1": 0.5, "pass@2": 1.0, "problems": 2, "samples": 4, "correct": {"a": 1, "b": 1}}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with the metrics and groups of three steps."""
    run = RunFolder(tmp_path / "run")
    for step in (1, 2, 3):
        run.append_metrics(METRICS | {"step": step})
        response = Response((1, 2), "2", "self", reward=1.0, verdict="ok")
        run.write_groups(step, [ScoredGroup(Group(PROBLEMS[0], (response,)), (0.0,))])
    return run


def lines_of(file: Path) -> list[bytes]:
    return file.read_bytes().splitlines(keepends=True)


def error_of(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    [problem] = caught.value.problems
    assert "\n" not in problem
    return problem


class TestMetrics:
    @pytest.mark.parametrize("line", [b"{", b"[]", b"{}", b'{"step": "2"}', b"\xff", b""])
    def test_a_damaged_line_is_named(self, run: RunFolder, line: bytes):
        file = run.path / "metrics.jsonl"
        lines = lines_of(file)
        file.write_bytes(lines[0] + line + b"\n" + lines[2])
        for call in (run.metrics, lambda: run.truncate_after(3)):
            assert error_of(call).startswith(f"{file}:2: must be the metrics of one step, got ")

    @pytest.mark.parametrize("name", sorted(METRICS.keys() - {"groups"}))
    def test_a_resumed_run_needs_all_that_the_summary_reads(self, run: RunFolder, name: str):
        file = run.path / "metrics.jsonl"
        lines = lines_of(file)
        damaged = {k: v for k, v in json.loads(lines[1]).items() if k != name}
        file.write_bytes(lines[0] + json.dumps(damaged).encode() + b"\n" + lines[2])
        assert len(run.metrics()) == 3  # A report shows what there is.
        text = error_of(run.truncate_after, 3)
        assert text.startswith(f"{file}:2: must be the metrics of one step, got ")

    @pytest.mark.parametrize("lost, line", [(0, 1), (1, 2)])
    def test_a_lost_line_is_named(self, run: RunFolder, lost: int, line: int):
        file = run.path / "metrics.jsonl"
        lines = lines_of(file)
        del lines[lost]
        file.write_bytes(b"".join(lines))
        rule = f"{file}:{line}: must be the metrics of step {line}, got those of step {line + 1}."
        assert error_of(run.metrics).startswith(rule)
        assert error_of(run.truncate_after, 2).startswith(rule)

    def test_lost_last_lines_are_noticed_by_the_checkpoint_and_by_the_summary(self, run: RunFolder):
        file = run.path / "metrics.jsonl"
        file.write_bytes(b"".join(lines_of(file)[:2]))
        text = error_of(run.truncate_after, 3)
        assert text.startswith(
            f"{file}: must have the metrics of the 3 steps before the checkpoint"
        )
        assert ", got 2. " in text and str(run.checkpoints) in text
        assert [m["step"] for m in run.metrics()] == [1, 2]  # As of a run in progress.
        run.write_json("summary.json", {"steps": 3, "base": {}, "trained": {}, "seconds": {}})
        assert "must have a line for each of the run's 3 steps, got 2" in error_of(run.metrics)

    def test_lines_after_the_checkpoint_are_not_read(self, run: RunFolder):
        with (run.path / "metrics.jsonl").open("ab") as file:
            file.write(b'not JSON\n{"step": 9}\n{"ste')
        run.write_json("summary.json", {"steps": 3, "base": {}, "trained": {}, "seconds": {}})
        run.truncate_after(2)
        assert [m["step"] for m in run.metrics()] == [1, 2]
        assert run.group_steps() == [1, 2]
        assert not (run.path / "summary.json").exists()  # The run is not finished any more.

    def test_steps_count_from_one_in_every_stage(self, tmp_path: Path):
        run = RunFolder(tmp_path)
        for stage, step in ((1, 1), (1, 2), (2, 1)):
            run.append_metrics({"stage": stage, "step": step})
        assert len(run.metrics()) == 3
        run.append_metrics({"stage": 3, "step": 2})
        assert "metrics.jsonl:4: must be the metrics of step 1" in error_of(run.metrics)


class TestGroups:
    @pytest.mark.parametrize(
        "line",
        [
            b"{",
            b"{}",
            b'{"problem": {"id": 1}, "responses": []}',
            b'{"problem": {"id": "x"}, "responses": [{}]}',
            b'{"problem": {"id": "x"}, "responses": [1]}',
        ],
    )
    def test_a_damaged_line_is_named(self, run: RunFolder, line: bytes):
        file = run.path / "groups" / "step-000002.jsonl"
        file.write_bytes(lines_of(file)[0] + line + b"\n")
        assert error_of(run.groups, 2).startswith(f"{file}:2: must be a group with its responses")

    def test_lost_lines_are_noticed(self, run: RunFolder):
        assert len(run.groups(2, expected=1)) == 1
        file = run.path / "groups" / "step-000002.jsonl"
        file.write_bytes(b"")
        assert "must have a line for each of the step's 1 groups, got 0" in error_of(
            run.groups, 2, 1
        )
        assert run.groups(7, expected=1) == []  # Not written: log.groups was off.


class TestSingleValues:
    @pytest.mark.parametrize(
        "text",
        ["", "{", "[]", "{}", '{"trained": 1}', '{"base": {}, "trained": {}}', "null", '"x"'],
    )
    def test_a_damaged_summary(self, run: RunFolder, text: str):
        (run.path / "summary.json").write_text(text, encoding="utf-8")
        assert f"{run.path}/summary.json" in error_of(run.summary)

    @pytest.mark.parametrize(
        "text",
        [
            "{",
            "[]",
            '{"test": {}}',
            '{"test": {"problems": 2}}',
            '{"test": {"problems": 2, "correct": {}}}',
        ],
    )
    def test_a_damaged_evaluation(self, run: RunFolder, text: str):
        assert run.evaluation("base") == {}
        file = run.path / "eval" / "base.json"
        run.write_json("eval/base.json", {})
        file.write_text(text, encoding="utf-8")
        assert error_of(run.evaluation, "base").startswith(str(file))

    @pytest.mark.parametrize(
        "value",
        [{}, {"other": FIGURES}, {"test": FIGURES, "more": FIGURES}, {"test": {}},
         {"test": FIGURES | {"correct": {"a": 1}}}, {"test": FIGURES | {"problems": 3}},
         {"test": {k: v for k, v in FIGURES.items() if k != "pass@1"}}, [], None,
         {"test": {k: v for k, v in FIGURES.items() if k != "pass@2"}},
         {"test": FIGURES | {"pass@2": float("nan")}}, {"test": FIGURES | {"pass@1": "0.5"}}],
    )  # fmt: skip
    def test_the_base_evaluation_has_all_sets_and_problems(self, tmp_path: Path, value: object):
        file = tmp_path / "base.json"
        file.write_text(json.dumps({"test": FIGURES}), encoding="utf-8")
        sets = {"test": PROBLEMS}
        assert read_base_evaluation(file, sets, [1, 2]) == {"test": FIGURES}
        file.write_text(json.dumps(value), encoding="utf-8")
        text = error_of(read_base_evaluation, file, sets, [1, 2])
        assert text.startswith(f"{file}: must have the base's results on test, got ")
        assert text.endswith("Remove the file: --resume then computes it again.")

    def test_a_base_evaluation_without_correctness(self, tmp_path: Path):
        file = tmp_path / "base.json"
        figures = {"mean_reward": 0.5, "problems": 2, "samples": 2, "rewards": {"a": 0.5}}
        file.write_text(json.dumps({"test": figures}), encoding="utf-8")
        assert read_base_evaluation(file, {"test": PROBLEMS}, [1, 2]) == {"test": figures}

    @pytest.mark.parametrize(
        "value",
        [[], [[[5, 6], [1]]], [[[5, 6], [1]], [[5, 8], [1]]], [[[5, 7], [1]], [[5, 6], [1]]],
         [[[5, 6], ["1"]], [[5, 7], [1]]], [[[5, 6], [-1]], [[5, 7], [1]]], [[5, 6], [5, 7]], {},
         [[[5, 6], [1]], [[5, 7], []]], [[[5, 6], [8]], [[5, 7], [1]]]],
    )  # fmt: skip
    def test_the_kl_set_has_a_response_to_each_problem(self, tmp_path: Path, value: object):
        file = tmp_path / "kl_set.json"
        file.write_text(json.dumps([[[5, 6], [1, 2]], [[5, 7], [7]]]), encoding="utf-8")
        assert read_kl_set(file, PROBLEMS, 8) == [Row((5, 6), (1, 2)), Row((5, 7), (7,))]
        file.write_text(json.dumps(value), encoding="utf-8")
        error = error_of(read_kl_set, file, PROBLEMS, 8)
        assert error.startswith(f"{file}: must have one response")

    def test_a_syntax_error_has_its_line(self, tmp_path: Path):
        file = tmp_path / "kl_set.json"
        file.write_text("[\n[1,\n}", encoding="utf-8")
        error = error_of(read_kl_set, file, PROBLEMS, 8)
        assert error.startswith(f"{file}:3: must have one response")


class TestDataIdentity:
    def test_changed_data_are_named_by_field(self, tmp_path: Path):
        run = RunFolder(tmp_path)
        first = {"data": "aa", "eval.sets.test": "bb", "eval.sets.other": "cc"}
        run.check_data(first)
        run.check_data(first)
        with pytest.raises(UserError) as caught:
            run.check_data(first | {"data": "xx", "eval.sets.other": "yy"})
        names = [text.partition(":")[0] for text in caught.value.problems]
        assert names == ["data", "eval.sets.other"]
        assert all("Restore them, or start a new run" in text for text in caught.value.problems)
        run.check_data(first)  # The record is that of the first start.

    @pytest.mark.parametrize("text", ["[]", '{"data": 1}', "{"])
    def test_a_damaged_record(self, tmp_path: Path, text: str):
        (tmp_path / "data.json").write_text(text, encoding="utf-8")
        assert f"{tmp_path}/data.json" in error_of(RunFolder(tmp_path).check_data, {"data": "a"})

    def test_a_copy_of_the_bases_files_has_the_identity(self, tmp_path: Path):
        donor, run = RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")
        donor.check_data({"data": "aa"})
        copy_base_files(run, Recipe.from_tree({}), donor, [])
        assert error_of(run.check_data, {"data": "bb"}).startswith("data: must be the data")

    def test_other_processes_neither_write_nor_compare(self, tmp_path: Path):
        worker = WorkerRunFolder(tmp_path / "run", 1)
        worker.check_data({"data": "aa"})
        assert not worker.path.exists()


class TestFindFolder:
    RECIPE = Recipe.from_tree({"name": "mine"})

    def find(self, out: Path | str | None, resume: bool = False) -> Path:
        found = find_folder(self.RECIPE, out, resume=resume, distributed=SINGLE_PROCESS)
        return found.path

    @pytest.mark.parametrize("leftovers", [[], [".lock"], [".lock", "recipe.yaml.tmp"]])
    @pytest.mark.parametrize("resume", [False, True])
    def test_what_a_start_leaves_that_was_killed(self, tmp_path: Path, resume: bool, leftovers):
        for name in leftovers:
            (tmp_path / name).touch()
        assert self.find(tmp_path, resume) == tmp_path

    def test_a_folder_with_other_files_or_none_is_no_run(self, tmp_path: Path):
        (tmp_path / "notes.txt").touch()
        with pytest.raises(RecipeError, match="--out: must be a new or empty folder"):
            self.find(tmp_path)
        for out in (tmp_path, tmp_path / "none", tmp_path / ("x" * 300), "", "a\0b"):
            with pytest.raises(RecipeError, match="--resume: must find a run to continue"):
                self.find(out, resume=True)

    def test_an_unusable_folder(self, tmp_path: Path):
        file = tmp_path / "file"
        file.touch()
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        unusable = ["", "a\0b", file, file / "run", tmp_path / "link", tmp_path / ("x" * 256),
                    tmp_path / "new" / ("x" * 256), tmp_path / ("é" * 128),
                    tmp_path / "/".join(["y" * 200] * 25)]  # fmt: skip
        for out in unusable:
            with pytest.raises(RecipeError, match="--out: must be a folder that can be written"):
                self.find(out)
        assert {p.name for p in tmp_path.iterdir()} == {"file", "link"}

    def test_a_recipe_whose_name_is_too_long(self, tmp_path: Path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        recipe = Recipe.from_tree({"name": "n" * 300})
        for resume in (False, True):
            with pytest.raises(RecipeError):
                find_folder(recipe, None, resume=resume, distributed=SINGLE_PROCESS)


def test_an_output_file(tmp_path: Path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "new" / "x.html", "x" * (NAME_MAX - 4)):
        check_output_path(path, "--out", "file")
    for path in ("", tmp_path, tmp_path / "file" / "x", "x" * (NAME_MAX - 3)):
        with pytest.raises(RecipeError, match="--out: must be a file that can be written to"):
            check_output_path(path, "--out", "file")


def test_errors_of_a_full_disk_are_recognised():
    full = OSError(28, os.strerror(28))
    wrapped = RuntimeError("checkpoint")
    wrapped.__cause__ = full
    rust = RuntimeError("Error while serializing: I/O error: File too large (os error 27)")
    assert all(map(is_disk_full, (full, wrapped, rust, OSError(122, "quota"))))
    others = (OSError(2, "none"), RuntimeError("x"), RuntimeError("I/O error (os error 5)"), None)
    assert not any(map(is_disk_full, others))
