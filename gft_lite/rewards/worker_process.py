"""The grading process: reads requests from stdin, writes grades to stdout, ends at end of file.

The first message has the reward functions and the time limit; each later one is
[function, text, answer, answer_type].
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from typing import Any

from gft_lite.rewards.base import Grade, RewardFunction
from gft_lite.rewards.registry import make_rule
from gft_lite.rewards.worker import receive, send

MEMORY_LIMIT = 3 * 2**30
#: The parent kills a worker after this multiple of the CPU time limit, on the wall clock.
WALL_FACTOR = 4.0


def main() -> None:
    """Grade requests until the end of stdin."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # prints of libraries must not reach the reply pipe
    _limit_memory()
    try:
        setup = json.loads(receive(requests))
        rules = [make_rule(RewardFunction(name, 1.0, p)) for name, p in setup["functions"]]
        for rule in rules:  # import sympy and fill its caches before the time limit applies
            rule(r"\boxed{x+1}", "1+x", None)
    except EOFError:
        return
    except Exception as error:  # the parent raises it
        send(replies, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # parsers print warnings about model text
    send(replies, json.dumps({"ready": True}).encode())
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            index, *item = json.loads(receive(requests))
            send(replies, json.dumps(_grade(rules[index], item, setup["timeout"])).encode())


def _grade(rule: Any, item: list[Any], timeout: float) -> Grade:
    _alarms(timeout, WALL_FACTOR * timeout + 5)
    try:
        return rule(*item)
    except MemoryError:
        sys.exit(1)  # the heap is in an unknown state: the parent starts a new worker
    except Exception:  # sympy raises any type on hostile text; counted by the verdict
        return Grade(0.0, "error")
    finally:
        _alarms(0, 0)


def _alarms(cpu_seconds: float, wall_seconds: float) -> None:
    """Set the kernel timers that end this process, even inside C code; 0 cancels them.

    CPU time, so that load does not change rewards; wall time in case the parent has died.
    """
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        signal.setitimer(signal.ITIMER_REAL, wall_seconds)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not on this platform
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_LIMIT if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT, hard)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
