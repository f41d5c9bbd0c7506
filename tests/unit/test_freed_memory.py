"""What a process on a CPU keeps of freed memory and of compiled products, and what a user's own
settings in the environment change.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

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


PRODUCTS = """
import ctypes, torch
from gft_lite.utils.memory import bound_product_caches
bound_product_caches()

class Heap(ctypes.Structure):  # mallinfo2 of glibc's malloc.h
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split())]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Heap

def multiply(rows):
    for count in rows:
        torch.ones(count, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)
    return libc.mallinfo2().uordblks

print(-multiply(range(100, 300)) + multiply(range(300, 500)))
"""
GLIBC = pytest.mark.skipif(
    sys.platform != "linux" or os.confstr("CS_GNU_LIBC_VERSION") is None, reason="glibc's malloc"
)


def printed(script, environment):
    """The number that a script prints in a process with no settings but these."""
    variables = ("MALLOC_", "ONEDNN_", "LRU_CACHE_")
    plain = {n: v for n, v in os.environ.items() if not n.startswith(variables)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=plain | environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return int(done.stdout)


def new_pages(environment):
    """Pages that the system hands out in four steps of 64 MiB after the first one."""
    return printed(STEPS, environment)


@GLIBC
@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="bf16 products by oneDNN"
)
def test_products_of_new_sizes_replace_old_ones():
    """Bytes in use after 200 sizes more; both caches are full after the first 200."""
    assert printed(PRODUCTS, {}) < 1 << 20
    assert printed(PRODUCTS, {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024"}) > 4 << 20
    assert printed(PRODUCTS, {"LRU_CACHE_CAPACITY": "1024"}) > 4 << 20


@GLIBC
def test_a_second_step_gets_the_pages_of_the_first():
    assert new_pages({}) < 1000
    assert new_pages({"MALLOC_TRIM_THRESHOLD_": "131072"}) > 4 * (56 << 20) // 4096
