"""Two processes that train one policy, as `accelerate launch` starts them, beside one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import LIBRARIES, VLLM, ForkedProcess, ForkServer
from safetensors.torch import load_file

from gft_lite.cli import main
from gft_lite.rollout.vllm_launcher import free_port
from gft_lite.runs.folder import RunFolder
from gft_lite.training import stages
from gft_lite.utils.tables import flatten

FIELDS = [
    "train.problems_per_step=6", "eval.samples=1", "eval.k=[1]", "data.holdout=4",
    "monitor.every=1", "rollout.max_tokens=24", "policy.threads=1", "reward.workers=1",
    "eval.sets.test.problems=5", "eval.sets.retention.problems=4", "data.problems=40",
]  # fmt: skip
# Four updates on one rollout ask for old log-probs; a micro-batch takes one group or so.
METHODS = {
    "gft": ["train.micro_batch_tokens=300", "optim.lr=1e-4"],
    "grpo": ["method=grpo", "group={expert: 0, teacher: 0, self: 4}", "optim.lr=1e-4",
             "train.updates_per_rollout=2", "objective.kl=0.1", "rollout.engine=vllm",
             "rollout.dtype=float32"],
}  # fmt: skip
LAUNCH = [
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
    "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
    "--main_process_port", "0",
]  # fmt: skip
# accelerate's own way to several processes without GPUs wants MPI; torchrun, its way to several
# GPUs, starts them just as well.
CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def arguments(out: Path, *more: str) -> list[str]:
    return ["train", "recipes/lab.yaml", *FIELDS, *more, "--out", str(out)]


def run_two(server: ForkServer, out: Path, *more: str) -> list[ForkedProcess]:
    """Run two processes with the environment that torchrun gives them."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2",
              "LOCAL_WORLD_SIZE": "2"}  # fmt: skip
    started = [
        server.start(*arguments(out, *more), env={**os.environ, **CPU, **shared,
                                                  "RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]  # fmt: skip
    for process in started:
        process.wait()
    return started


@pytest.fixture(scope="module", params=METHODS)
def runs(request, tmp_path_factory, fork_server):
    """(one process's run, two processes' run, the two processes)."""
    folder = tmp_path_factory.mktemp(request.param)
    more = [*METHODS[request.param], "train.steps=2", "checkpoint.every=2"]
    uses_vllm = "rollout.engine=vllm" in more
    server = ForkServer(folder, (*LIBRARIES, *VLLM)) if uses_vllm else fork_server
    alone = server.run(*arguments(folder / "alone", *more), env={**os.environ, **CPU})
    assert alone.returncode == 0, alone.stderr
    two = run_two(server, folder / "two", *more)
    assert [process.returncode for process in two] == [0, 0], two[0].stderr + two[1].stderr
    yield RunFolder(folder / "alone"), RunFolder(folder / "two"), two
    if uses_vllm:
        server.close()


def test_metrics_are_those_of_one_process(runs):
    alone, two, _ = runs
    assert len(two.metrics()) == len(alone.metrics()) == 2
    for one, both in zip(alone.metrics(), two.metrics(), strict=True):
        # What depends on time, on the engine, or on the cut, which two processes make finer.
        for name in ("seconds", "peak_memory", "sync_gap", "engine_gap", "micro_batch_tokens"):
            del one[name], both[name]
        assert both.pop("forwarded_tokens") >= one.pop("forwarded_tokens")
        one, both = flatten(one), flatten(both)
        words = {name for name, value in one.items() if isinstance(value, str)}
        assert all(both.pop(name) == one.pop(name) for name in words)
        assert both == pytest.approx(one, rel=1e-5, abs=1e-7)


def test_groups_and_figures_are_those_of_one_process(runs):
    alone, two, _ = runs

    def texts(run: RunFolder) -> list[list[str]]:
        return [[r["text"] for r in g["responses"]] for s in (1, 2) for g in run.groups(s)]

    assert texts(two) == texts(alone)
    for name in ("base", "trained"):
        one, both = alone.summary()[name], two.summary()[name]
        assert both == pytest.approx(one, rel=1e-5, abs=1e-7)
    base = [json.loads((r.path / "eval" / "base.json").read_text()) for r in (alone, two)]
    assert base[0] == base[1]


def test_the_adapter_is_that_of_one_process(runs):
    alone, two, _ = runs
    one, both = (load_file(r.adapter / "adapter_model.safetensors") for r in (alone, two))
    assert one.keys() == both.keys()
    # Adam divides by the gradient's size, so that where it is near 0 its rounding shows.
    far = [torch.dist(both[n], one[n]) / one[n].norm() for n in one if one[n].any()]
    assert max(far) < 1e-4


def test_one_process_writes_and_talks(runs):
    alone, two, done = runs
    assert "".join(process.stdout for process in done).count("run: ") == 1
    assert "".join(process.stderr for process in done).count("run folder: ") == 1
    files = [{str(p.relative_to(r.path)) for p in r.path.rglob("*")} for r in (alone, two)]
    assert files[0] == files[1]


def test_two_processes_resume_and_run_stages(tmp_path, monkeypatch):
    """A run that one process was interrupted in, between its stages."""
    more = ["stages=[sft, {method: gft, reference: start}]", "train.steps=1"]
    folder = RunFolder(tmp_path / "run")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "copy_base_files", interrupt)
        out = ["--out", str(folder.path)]
        assert main(["train", "recipes/lab.yaml", *FIELDS, *more, *out]) == 130
    command = [*LAUNCH, "-m", "gft_lite", *arguments(folder.path, *more, "--resume")]
    again = subprocess.run(command, cwd=Path(__file__).parents[2], env=os.environ | CPU,
                           timeout=1200, capture_output=True, text=True)  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert [m["stage"] for m in folder.metrics()] == [1, 2]
    assert folder.summary()["method"] == "sft > gft"


def test_only_training_takes_several_processes():
    done = subprocess.run([sys.executable, "-m", "gft_lite", "methods"], capture_output=True,
                          text=True, env=os.environ | {"WORLD_SIZE": "2"})  # fmt: skip
    assert done.returncode == 2 and "only train" in done.stderr


def test_a_wrong_recipe_ends_both(tmp_path, fork_server):
    done = run_two(fork_server, tmp_path / "run", "data.source=nowhere.jsonl")
    assert all(process.returncode for process in done)
    assert "data.source" in done[0].stderr
