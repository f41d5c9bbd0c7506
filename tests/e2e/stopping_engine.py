"""An engine that signals the sweep of its own run at a chosen step, however busy the machine is."""

from __future__ import annotations

import glob
import os
import signal
import time
from pathlib import Path

from gft_lite.rollout.transformers_engine import TransformersEngine

#: The signal, the steps that the run has made, and the pattern of its metrics, or nothing.
VARIABLE = "TEST_STOPPING_ENGINE"


class Engine(TransformersEngine):
    """The transformers engine; the sweep is the parent of the process that trains."""

    name = "stopping"
    _stopped = False

    def generate(self, *arguments, **options):
        if os.environ.get(VARIABLE) and not self._stopped:
            number, steps, pattern = os.environ[VARIABLE].split(" ", 2)
            lines = [line for f in glob.glob(pattern) for line in Path(f).read_bytes().splitlines()]
            if len(lines) == int(steps):
                self._stopped = True
                _signal_sweep(int(number))
        return super().generate(*arguments, **options)


def _signal_sweep(number):
    """Return when the sweep has passed SIGINT on; a killed one ends this process."""
    received = []
    before = signal.getsignal(signal.SIGINT)

    def note(*arguments):
        received.append(number)
        before(*arguments)

    signal.signal(signal.SIGINT, note)
    os.kill(os.getppid(), number)
    until = time.monotonic() + 300
    while not received:
        assert time.monotonic() < until, "the sweep passed no signal on"
        time.sleep(0.01)
    signal.signal(signal.SIGINT, before)
