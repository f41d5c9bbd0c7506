"""One request to the hub that ends within seconds; libraries try again for half a minute."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx

TIMEOUT = 5  # seconds


class HubUnreachableError(Exception):
    """The hub does not answer; the text names its address and the reason."""


def get_from_hub(url: str) -> httpx.Response:
    """The reply to a GET request with the user's token. Raises: HubUnreachableError."""
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers

    try:
        return httpx.get(url, headers=build_hf_headers(), timeout=TIMEOUT, follow_redirects=True)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = str(error) or type(error).__name__
        raise HubUnreachableError(
            f"{constants.ENDPOINT} can't be reached ({reason}); HF_HUB_OFFLINE=1 uses what has "
            "been downloaded"
        ) from None
