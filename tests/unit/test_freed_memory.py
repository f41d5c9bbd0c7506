"""Freed memory is kept for the next step, unless the user's own threshold returns it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

STEPS = """
import ctypes, resource
from gft_lite.utils.memory import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
keep_freed_memory()

def step():
    blocks = [ctypes.c_void_p(libc.malloc(8 << 20)) for _ in range(8)]
    for block in blocks:
        ctypes.memset(block, 1, 8 << 20)
    for block in blocks:
        libc.free(block)

step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def new_pages(environment):
    """Pages that the system hands out in four steps of 64 MiB after the first one."""
    plain = {n: v for n, v in os.environ.items() if not n.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", STEPS], env=plain | environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return int(done.stdout)


@pytest.mark.skipif(
    sys.platform != "linux" or os.confstr("CS_GNU_LIBC_VERSION") is None, reason="glibc's malloc"
)
def test_a_second_step_gets_the_pages_of_the_first():
    assert new_pages({}) < 1000
    assert new_pages({"MALLOC_TRIM_THRESHOLD_": "131072"}) > 4 * (56 << 20) // 4096
