"""Process state around vLLM in the trainer's process: environment, random state, torch patches."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from gft_lite.utils.library_output import hide_library_messages

# What vLLM replaces in torch on a CPU, once per process. The originals are put back after every
# block, vLLM's own at the start of the next one; environment variables are treated alike.
_PATCHED: list[tuple[Any, str]] = [
    (torch, "set_num_threads"),
    (torch, "Event"),
    *((torch.accelerator, n) for n in ("synchronize", "empty_cache", "get_memory_info")),
    *((torch.cuda, n) for n in ("Event", "Stream", "set_stream", "current_stream", "stream")),
    *((torch.Tensor, n) for n in ("pin_memory", "record_stream")),
]
_vllm_functions: dict[tuple[Any, str], Any] = {}
_vllm_environment: dict[str, str] = {}


@contextlib.contextmanager
def isolated_process_state(environment: Mapping[str, str]) -> Iterator[None]:
    """Run vLLM calls under `environment`, and restore the trainer's process state afterwards.

    Restored are the random states of Python, numpy and torch, the number of threads, the
    environment variables, and the torch functions that vLLM replaces.
    """
    threads, variables = torch.get_num_threads(), dict(os.environ)
    functions = {place: getattr(*place) for place in _PATCHED}
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
    """Environment variables for vLLM; the user's values of the first two take precedence."""
    hide_library_messages()
    variables = {
        "VLLM_LOGGING_LEVEL": os.environ["VLLM_LOGGING_LEVEL"],
        "VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1"),
        # Without these two, the ports of vLLM's process group are open to the network.
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    if device.type == "cpu":
        # Compiling one helper of the sampler would take longer than the rest of the start.
        variables["TORCHDYNAMO_DISABLE"] = "1"
    return variables
