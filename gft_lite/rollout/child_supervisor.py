"""Run a command that ends with its parent: `child_supervisor.py PARENT_PID COMMAND ...`.

A server that outlived a killed trainer would keep its memory and its port. This script depends on
no thread of the trainer and no feature of one operating system, and also ends what the command
itself started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

POLL_SECONDS = 0.5
TERMINATE_SECONDS = 15.0  # How long the command may take to end after SIGTERM.


def main(parent: int, command: list[str]) -> None:
    """Run `command` until it exits, until SIGTERM, or until `parent` is no longer the parent."""
    os.setsid()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    child = subprocess.Popen(command)
    try:
        while os.getppid() == parent and child.poll() is None:
            time.sleep(POLL_SECONDS)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(TERMINATE_SECONDS)
        os.killpg(0, signal.SIGKILL)  # The remaining processes of the command, and this one.


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
