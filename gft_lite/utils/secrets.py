"""Tokens and passwords: recognised, so that no recipe keeps them and no message shows them."""

from __future__ import annotations

import os
import re

_NAMES = ("TOKEN", "KEY", "SECRET", "PASSWORD")
# Shorter values of such variables are paths, numbers and words like "none".
_SHORTEST = 16
# Tokens of the hub, and the password in an address.
_KNOWN = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=://)(?!\*)[^/\s@]+(?=@)")


def find_secret(text: str) -> str | None:
    """A secret in a text, if there is one: of the environment, or known by its look."""
    for name, value in os.environ.items():
        if name.upper().endswith(_NAMES) and len(value) >= _SHORTEST and value in text:
            return value
    match = _KNOWN.search(text)
    return match[0] if match else None


def redact(text: str) -> str:
    """The text with *** in place of every secret."""
    while secret := find_secret(text):
        text = text.replace(secret, "***")
    return text
