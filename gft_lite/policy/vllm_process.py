"""TODO: gft_lite/policy/vllm_process.py"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch


def starting() -> AbstractContextManager[None]:
    """Let Unsloth start vLLM for the length of a `with`, and leave no trace of it outside."""
    return vllm_in_charge(engine_environment(torch.device("cuda")))


# What vLLM replaces in torch on a CPU, once for the process. The trainer gets its own back after
# every call and vLLM finds its own in the next one; the same holds for environment variables.
_REPLACED: list[tuple[Any, str]] = [
    (torch, "set_num_threads"),
    (torch, "Event"),
    *((torch.accelerator, n) for n in ("synchronize", "empty_cache", "get_memory_info")),
    *((torch.cuda, n) for n in ("Event", "Stream", "set_stream", "current_stream", "stream")),
    *((torch.Tensor, n) for n in ("pin_memory", "record_stream")),
]
_vllm_functions: dict[tuple[Any, str], Any] = {}
_vllm_environment: dict[str, str] = {}


@contextlib.contextmanager
def vllm_in_charge(environment: Mapping[str, str]) -> Iterator[None]:
    """Let vLLM change the process inside, and leave no trace of it for the trainer outside.

    Kept: the random states of Python, numpy and torch, the number of threads, the environment,
    and the functions of torch that vLLM replaces.
    """
    threads, variables = torch.get_num_threads(), dict(os.environ)
    functions = {place: getattr(*place) for place in _REPLACED}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    os.environ.update(_vllm_environment | dict(environment))
    for place, function in _vllm_functions.items():
        setattr(*place, function)
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for place, function in functions.items():
            _vllm_functions[place] = getattr(*place)
            setattr(*place, function)
        torch.set_num_threads(threads)
        changed = {k: v for k, v in os.environ.items() if variables.get(k) != v}
        _vllm_environment.update(changed)
        os.environ.update(variables)
        for name in changed.keys() - variables.keys():
            del os.environ[name]
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def engine_environment(device: torch.device) -> dict[str, str]:
    """The variables under which vLLM runs, where the user has not set the first two."""
    variables = {
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1"),
        # Else the ports of its process group are open to the network.
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    if device.type == "cpu":
        # Compiling one helper of the sampler would take longer than the rest of the start.
        variables["TORCHDYNAMO_DISABLE"] = "1"
    return variables
