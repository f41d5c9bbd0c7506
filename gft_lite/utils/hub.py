"""Requests to the hub that end within seconds; libraries try again for minutes."""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx

TIMEOUT = 5  # seconds
BY_CHOICE = "HF_HUB_OFFLINE is set"


class HubUnreachableError(Exception):
    """The hub does not answer; the text names its address and the reason."""


@cache
def why_offline() -> str | None:
    """Why only what has been downloaded can be used; None if the hub answers.

    Without an answer, HF_HUB_OFFLINE is set for this process and its children. Otherwise libraries
    would request each file of the cache again and again. They read it when they are imported.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return BY_CHOICE
    import httpx

    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        httpx.head(endpoint, timeout=TIMEOUT)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        os.environ["HF_HUB_OFFLINE"] = "1"
        if constants := sys.modules.get("huggingface_hub.constants"):
            constants.__dict__["HF_HUB_OFFLINE"] = True
        return _unreachable(endpoint, error)
    return None


def get_from_hub(url: str) -> httpx.Response:
    """The reply to a GET request with the user's token. Raises: HubUnreachableError."""
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers

    try:
        return httpx.get(url, headers=build_hf_headers(), timeout=TIMEOUT, follow_redirects=True)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise HubUnreachableError(_unreachable(constants.ENDPOINT, error)) from None


def _unreachable(endpoint: str, error: Exception) -> str:
    return f"{endpoint} can't be reached ({str(error) or type(error).__name__})"
