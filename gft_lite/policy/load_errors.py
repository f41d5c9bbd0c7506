"""The errors of libraries that read models; no library that is slow to import."""

from __future__ import annotations

import re

from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError

# transformers, peft and safetensors raise any of these for broken tokenizers, configs and weights.
LOAD_ERRORS = (
    OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, ArithmeticError,
    ImportError, RuntimeError, SafetensorError, HFValidationError,
    StrictDataclassError, re.error,
)  # fmt: skip


def describe_error(error: BaseException) -> str:
    """Type and text of an error on one line of at most 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
