"""What differs in torch 2.11 and vLLM 0.26, which some machines have in place of our pins."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

from torch.nn.attention import varlen

from gft_lite.policy import attention


def native_groups() -> bool:
    """Whether torch's varlen_attn knows of heads in groups; 2.11 only lacks the word for it."""
    return "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters


def adapt_attention() -> None:
    """Leave `enable_gqa` out for a torch without: its flash kernel takes fewer heads of keys."""
    if native_groups():
        return

    def without_word(*arguments: Any, enable_gqa: bool = False, **options: Any) -> Any:
        return varlen.varlen_attn(*arguments, **options)

    attention.varlen_attn = without_word  # type: ignore[assignment]


def adapt_vllm() -> bool:
    """Give vLLM 0.26 the names of errors that 0.32 has; returns whether it lacked them."""
    exceptions: Any = import_module("vllm.exceptions")
    if hasattr(exceptions, "VLLMError"):
        return False
    exceptions.VLLMError = exceptions.VLLMNotFoundError
    exceptions.VLLMClientError = exceptions.VLLMValidationError
    return True
