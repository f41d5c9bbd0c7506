"""Differences of torch 2.11 and vLLM 0.26, which some machines have instead of our pins."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

from torch.nn.attention import varlen

from gft_lite.policy import attention


def native_groups() -> bool:
    """True if torch's varlen_attn has `enable_gqa`; 2.11 supports groups without the argument."""
    return "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters


def adapt_attention() -> None:
    """Omit `enable_gqa` if torch does not have it: its flash kernel supports fewer key heads."""
    if native_groups():
        return

    def without_argument(*arguments: Any, enable_gqa: bool = False, **options: Any) -> Any:
        return varlen.varlen_attn(*arguments, **options)

    attention.varlen_attn = without_argument  # type: ignore[assignment]


def adapt_vllm() -> bool:
    """Define the error names of vLLM 0.32 in 0.26; returns True if they were missing."""
    exceptions: Any = import_module("vllm.exceptions")
    if hasattr(exceptions, "VLLMError"):
        return False
    exceptions.VLLMError = exceptions.VLLMNotFoundError
    exceptions.VLLMClientError = exceptions.VLLMValidationError
    return True
