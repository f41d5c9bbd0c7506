"""The process that calls users' reward functions: a call that hangs or ends it costs no training.

The first message has the functions and `sys.path`; each later one the index of a function, its
calls and, for coroutine functions, how many may run at a time. The reply has the entries of each
call, or the error of a function that returns anything but an entry for each response.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import decimal
import json
import os
import signal
import sys
from typing import Any

from gft_lite.rewards.base import RewardError, RewardFunction
from gft_lite.rewards.user_function import Entry, UserFunction
from gft_lite.rewards.worker import receive, send

_TYPE = "\0type"  # The key that marks a value of a column that JSON does not have.
_MOMENTS = {kind.__name__: kind for kind in (datetime.datetime, datetime.date, datetime.time)}


def pack(value: Any) -> bytes:
    """A message with values as data files have them.

    Raises: RewardError for values of other types.
    """
    return json.dumps(value, default=_tagged).encode()


def unpack(message: bytes) -> Any:
    """The values of a message."""
    return json.loads(message, object_hook=_untagged)


def main() -> None:
    """Call functions as requests say, until the end of stdin."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what functions print must not reach the reply pipe
    try:
        setup = unpack(receive(requests))
        sys.path[:] = setup["path"]
        functions = [UserFunction(RewardFunction(name, 1.0, p)) for name, p in setup["functions"]]
    except EOFError:
        return
    except RewardError as error:
        send(replies, json.dumps({"error": str(error)}).encode())
        return
    kinds = [(f.is_async, None if f.accepted is None else sorted(f.accepted)) for f in functions]
    send(replies, json.dumps({"functions": kinds}).encode())
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            request = unpack(receive(requests))
            signal.setitimer(signal.ITIMER_REAL, request["seconds"] + 5)  # if the parent has died
            try:
                reply: Any = {"entries": _call(functions[request["function"]], request)}
            except RewardError as error:
                reply = {"error": str(error)}
            signal.setitimer(signal.ITIMER_REAL, 0)
            send(replies, json.dumps(reply).encode())


def _call(function: UserFunction, request: dict[str, Any]) -> list[list[Entry]]:
    calls = request["calls"]
    if function.is_async:
        return function.call_concurrently(calls, request["concurrency"])
    return [function.call(arguments, responses) for arguments, responses, _ in calls]


def _tagged(value: Any) -> dict[str, Any]:
    for name, kind in _MOMENTS.items():  # datetime comes before date, which it is as well
        if isinstance(value, kind):
            return {_TYPE: name, "value": value.isoformat()}
    if isinstance(value, datetime.timedelta):
        return {_TYPE: "timedelta", "value": value.total_seconds()}
    if isinstance(value, decimal.Decimal):
        return {_TYPE: "Decimal", "value": str(value)}
    if isinstance(value, bytes):
        return {_TYPE: "bytes", "value": base64.b64encode(value).decode()}
    raise RewardError(
        "reward: columns and parameters must be numbers, texts, times, bytes, lists or objects of "
        f"them, got a {type(value).__name__}. Convert it, or remove the column."
    )


def _untagged(value: dict[str, Any]) -> Any:
    kind = value.get(_TYPE)
    if kind is None:
        return value
    if kind == "timedelta":
        return datetime.timedelta(seconds=value["value"])
    if kind == "Decimal":
        return decimal.Decimal(value["value"])
    if kind == "bytes":
        return base64.b64decode(value["value"])
    return _MOMENTS[kind].fromisoformat(value["value"])
