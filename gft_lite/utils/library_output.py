"""The messages of libraries: hidden where a user can do nothing about them, unless --verbose."""

from __future__ import annotations

import logging
import os
import warnings

VERBOSE = "GFT_LITE_VERBOSE"  # Set by --verbose; the processes that a command starts inherit it.

# Read by the libraries when they are imported; the user's own values take precedence.
_ENVIRONMENT = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # Such as vLLM's binding to NUMA nodes.
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
# This package sets the options that the warnings of these are about, or checks them itself.
_LOGGERS = ("bitsandbytes", "torch.utils.flop_counter", "torch.distributed", "vllm")
_MODULES = r"(bitsandbytes|peft|transformers|triton|vllm)(\.|$)"
_CATEGORIES = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)


def is_verbose() -> bool:
    """True if all messages of libraries are shown."""
    return os.environ.get(VERBOSE, "0") not in ("", "0")


def hide_library_messages() -> None:
    """Hide what libraries log and warn of, but not their errors; call it before importing them.

    Genuine warnings stay: those of torch, such as one of an old GPU driver, of the hub's
    connection, and of the user's own code.
    """
    if is_verbose():
        for name in _ENVIRONMENT:
            if name != "TORCH_CPP_LOG_LEVEL":  # Its default shows warnings.
                os.environ.setdefault(name, "INFO" if name.startswith("VLLM") else "info")
        return
    for name, level in _ENVIRONMENT.items():
        os.environ.setdefault(name, level)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub.utils._http").addFilter(_is_no_advertisement)
    for category in _CATEGORIES:
        warnings.filterwarnings("ignore", category=category)
    warnings.filterwarnings("ignore", category=UserWarning, module=_MODULES)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    """False for the hub's request to log in, which a run without private models does not need."""
    return "unauthenticated" not in record.getMessage()
