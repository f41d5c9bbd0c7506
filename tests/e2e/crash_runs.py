"""The command line in processes that are killed or disturbed at chosen moments of their work.

`crash_runs.py PLAN` runs the jobs of a JSON file, first those of "whole" and then those of
"others", two at a time, and writes their exit codes and output. The attempts of a job follow each
other, each in a fork of this process, which has imported the large libraries once. Only the chosen
functions are replaced. A job can start in a copy of another folder.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

from gft_lite.cli import main
from gft_lite.utils.files import lock_folder

PRELOADED = (
    "torch._dynamo",
    "gft_lite.evaluation.sets",
    "gft_lite.policy.qlora",
    "gft_lite.rollout.transformers_engine",
    "gft_lite.training.run",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
)
VLLM = ("vllm.entrypoints.llm", "vllm.v1.engine.llm_engine")
PARALLEL_JOBS = 2
# Bytes that a file may have: an adapter of the lab fits in the first, no tensors in the second.
NO_CHECKPOINT, NO_ADAPTER = 600_000, 50_000


def kill(folder, file):
    os.kill(os.getpid(), signal.SIGKILL)


def tear(folder, file):
    """Cut the end of a file, as a power failure may, and kill."""
    _cut(folder / file)
    kill(folder, file)


def _cut(file):
    os.truncate(file, file.stat().st_size - 30)


def _limit_files(size):
    """Let writing fail beyond a file size, as it does on a full disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def full(folder, file):
    _limit_files(NO_CHECKPOINT)


def full_for_adapters(folder, file):
    _limit_files(NO_ADAPTER)


def keep_copy(folder, file, *, copy="killed"):
    """Copy the folder: what a kill at this moment leaves on the disk."""
    shutil.copytree(folder, folder.with_name(f"{folder.name}-{copy}"))


def keep_torn_copy(folder, file, *, copy):
    """Copy the folder: what is left by a kill that cuts the end of a file."""
    keep_copy(folder, file, copy=copy)
    _cut(folder.with_name(f"{folder.name}-{copy}") / file)


def fail(folder, file):
    raise RuntimeError("broken at this moment")


def interrupt(folder, file):
    os.kill(os.getpid(), signal.SIGINT)


def occupy(folder, file):
    """Lock the folder, as another run does that starts at the same time."""
    lock = lock_folder(folder)
    lock.__enter__()
    LOCKS.append(lock)


def terminate(folder, file):
    os.kill(os.getpid(), signal.SIGTERM)


ACTS = {
    act.__name__: act
    for act in (kill, tear, keep_copy, keep_torn_copy, full, full_for_adapters, fail, interrupt,
                occupy, terminate)
}  # fmt: skip
LOCKS = []  # Held until the process ends.


def arm(moment, folder):
    """Replace a function so that some of its calls act before or after their work.

    `at` is the function and `acts` maps the number of a call to an act; calls count only in `step`
    (0 is before the first step) and with `matching` in one of their arguments. `file` is the path
    in `folder` that is cut, and `copy` the end of the name of a copy.
    """
    now = {"step": 0, "calls": 0}
    training = importlib.import_module("gft_lite.training.loop")
    train_step = training.train_step

    def counting(run, step):
        now["step"] = step
        return train_step(run, step)

    training.train_step = counting
    module, _, path = moment["at"].partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    original, matching = getattr(owner, name), moment["matching"]
    named = {"copy": moment["copy"]} if "copy" in moment else {}

    def replacement(*args, **kwargs):
        act, in_step = None, now["step"] == moment.get("step", now["step"])
        if in_step and (not matching or any(matching in str(a) for a in args)):
            now["calls"] += 1
            act = moment["acts"].get(str(now["calls"]))
        if act and not moment.get("after"):
            ACTS[act](folder, moment.get("file"), **named)
        result = original(*args, **kwargs)
        if act and moment.get("after"):
            ACTS[act](folder, moment.get("file"), **named)
        return result

    setattr(owner, name, replacement)


def attempt(arguments, moments, folder, log):
    """Run the command line in a fork; returns its exit code, negative if a signal ended it."""
    pid = os.fork()
    if pid == 0:
        with log.open("w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        # A background shell starts its commands with SIGINT ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for moment in moments:
            arm(moment, folder)
        code = main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def run(job):
    """Make all attempts of a job and copy the folder after each."""
    folder = Path(job["folder"])
    if "start" in job:
        shutil.copytree(job["start"], folder)
    for number, (arguments, moments) in enumerate(job["attempts"]):
        log = folder.with_name(f"{folder.name}.{number}.txt")
        code = attempt(arguments, moments, folder, log)
        folder.with_name(f"{folder.name}.{number}.code").write_text(str(code))
        if folder.exists():
            shutil.copytree(folder, folder.with_name(f"{folder.name}.{number}"))


def run_all(jobs):
    """Run jobs in processes, a few at a time."""
    running = 0
    for job in jobs:
        if running == PARALLEL_JOBS:
            os.wait()
            running -= 1
        if os.fork() == 0:
            run(job)
            os._exit(0)
        running += 1
    while running:
        os.wait()
        running -= 1


if __name__ == "__main__":
    plan = Path(sys.argv[1]).read_text()
    for module in PRELOADED + (VLLM if "vllm" in plan else ()):
        importlib.import_module(module)
    for part in ("whole", "others"):
        run_all(json.loads(plan)[part])
