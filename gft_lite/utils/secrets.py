"""Recognition of tokens and passwords, to keep them out of recipes and messages."""

from __future__ import annotations

import os
import re

_NAMES = ("TOKEN", "KEY", "SECRET", "PASSWORD")
# Shorter values of such variables are paths, numbers and words like "none".
_MIN_LENGTH = 16
# Tokens of the hub, and the password in a URL.
_PATTERN = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=://)(?!\*)[^/\s@]+(?=@)")


def find_secret(text: str) -> str | None:
    """A secret in a text, None without one: an environment value or a known pattern."""
    for name, value in os.environ.items():
        if name.upper().endswith(_NAMES) and len(value) >= _MIN_LENGTH and value in text:
            return value
    match = _PATTERN.search(text)
    return match[0] if match else None


def redact(text: str) -> str:
    """Replace every secret in a text by `***`."""
    while secret := find_secret(text):
        text = text.replace(secret, "***")
    return text
