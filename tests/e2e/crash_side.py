"""The command line in processes that die, or are disturbed, at a chosen moment of their work.

`crash_side.py PLAN` runs the jobs of a JSON file, two at a time, and prints how they ended. A
job's attempts follow each other, each in its own process: a fork of this one, which has paid for
the imports. Nothing but the moment is tampered with.
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
    "gft_lite.evaluation.evaluator",
    "gft_lite.policy.qlora",
    "gft_lite.rollout.transformers_engine",
    "transformers.models.llama.modeling_llama",
)
AT_A_TIME = 2
FULL = 600_000  # Bytes: an adapter of the lab fits, its optimiser state does not.


def kill(folder):
    os.kill(os.getpid(), signal.SIGKILL)


def tear(folder):
    """As a power cut may leave the file that was written last."""
    last = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_mtime_ns)
    os.truncate(last, last.stat().st_size - 30)
    kill(folder)


def full(folder):
    """No file may grow beyond FULL bytes: writing fails as it does on a full disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, hard))


def fail(folder):
    raise RuntimeError("broken at this moment")


def interrupt(folder):
    os.kill(os.getpid(), signal.SIGINT)


def occupy(folder):
    """As another run does that starts there at the same time."""
    lock = lock_folder(folder)
    lock.__enter__()
    HELD.append(lock)


def terminate(folder):
    os.kill(os.getpid(), signal.SIGTERM)


ACTS = {act.__name__: act for act in (kill, tear, full, fail, interrupt, occupy, terminate)}
HELD = []  # Locks, which go with the process.


def arm(moment, folder):
    """Have the calls of one function do what the moment says, before or after their work.

    `at` is the function, `acts` what to do at which call of it; only calls in `step` (0 is before
    the first one) with `matching` in their arguments count.
    """
    now = {"step": 0, "calls": 0}
    training = importlib.import_module("gft_lite.training.loop")
    train_step = training.train_step

    def counting(session, step):
        now["step"] = step
        return train_step(session, step)

    training.train_step = counting
    module, _, path = moment["at"].partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    real, wanted = getattr(owner, name), moment["matching"]

    def disturbed(*args, **kwargs):
        act, in_step = None, now["step"] == moment.get("step", now["step"])
        if in_step and (not wanted or any(wanted in str(a) for a in args)):
            now["calls"] += 1
            act = moment["acts"].get(str(now["calls"]))
        if act and not moment.get("after"):
            ACTS[act](folder)
        result = real(*args, **kwargs)
        if act and moment.get("after"):
            ACTS[act](folder)
        return result

    setattr(owner, name, disturbed)


def attempt(arguments, moment, folder, log):
    """Run the command line in a fork; returns its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        # A shell in the background has its commands ignore it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if moment:
            arm(moment, folder)
        code = main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def run(job):
    """All attempts of a job; keeps what each leaves beside the folder."""
    folder = Path(job["folder"])
    for number, (arguments, moment) in enumerate(job["attempts"]):
        log = folder.with_name(f"{folder.name}.{number}.txt")
        code = attempt(arguments, moment, folder, log)
        folder.with_name(f"{folder.name}.{number}.code").write_text(str(code))
        if folder.exists():
            shutil.copytree(folder, folder.with_name(f"{folder.name}.{number}"))


if __name__ == "__main__":
    for module in PRELOADED:
        importlib.import_module(module)
    running = 0
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if running == AT_A_TIME:
            os.wait()
            running -= 1
        if os.fork() == 0:
            run(job)
            os._exit(0)
        running += 1
    while running:
        os.wait()
        running -= 1
