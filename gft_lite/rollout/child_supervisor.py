"""Runs a command for as long as its parent lives: `leash.py PARENT_PID COMMAND ...`.

A server that outlived a killed trainer would keep its memory and its port. This script asks
nothing of the trainer's threads or of the operating system, and ends what the command started too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

LOOK = 0.5  # Seconds between two looks at the parent.
PATIENCE = 15.0  # Seconds for the command to end by itself.


def main(parent: int, command: list[str]) -> None:
    """Run it; end it on SIGTERM, when it ends itself, or when the parent is another one."""
    os.setsid()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    child = subprocess.Popen(command)
    try:
        while os.getppid() == parent and child.poll() is None:
            time.sleep(LOOK)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(PATIENCE)
        os.killpg(0, signal.SIGKILL)  # What the command left behind, and this process with it.


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
