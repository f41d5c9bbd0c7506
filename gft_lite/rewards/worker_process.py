"""The grading process: reads requests from stdin, writes grades to stdout, dies with its parent.

Messages are a four-byte big-endian length and that many bytes of JSON. The first one holds the
reward functions and the time limit; each later one is [function, text, answer, answer_type].
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import sys
from typing import IO, Any

from gft_lite.rewards.base import Grade, RewardFunction
from gft_lite.rewards.registry import make_rule

MEMORY_LIMIT = 3 * 2**30
#: The parent waits this many times the limit on CPU time before it kills a worker itself.
WALL_FACTOR = 4.0
_HEADER = struct.Struct(">I")


def send(pipe: IO[bytes], payload: bytes) -> None:
    """Write one message."""
    pipe.write(_HEADER.pack(len(payload)) + payload)
    pipe.flush()


def receive(pipe: IO[bytes]) -> bytes:
    """Read one message. Raises: EOFError when the other end has gone."""
    header = pipe.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise EOFError
    payload = pipe.read(_HEADER.unpack(header)[0])
    if len(payload) < _HEADER.unpack(header)[0]:
        raise EOFError
    return payload


def main() -> None:
    """Serve grades until stdin ends."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library's stray print must not enter the protocol
    _limit_memory()
    try:
        setup = json.loads(receive(requests))
        rules = [make_rule(RewardFunction(name, 1.0, p)) for name, p in setup["functions"]]
        for rule in rules:  # imports sympy and fills its caches before the clock runs
            rule(r"\boxed{x+1}", "1+x", None)
    except EOFError:
        return
    except Exception as error:  # reported to the parent, which raises it
        send(replies, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # parsers complain about model text there
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
        sys.exit(1)  # the heap is in an unknown state; the parent starts a fresh worker
    except Exception:  # sympy raises anything on hostile text; the verdict counts it
        return Grade(0.0, "error")
    finally:
        _alarms(0, 0)


def _alarms(cpu_seconds: float, wall_seconds: float) -> None:
    """Have the kernel end this process, whatever Python is doing, after that long; 0 cancels.

    CPU time, so that a busy machine changes no reward; wall time in case the parent has gone.
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
