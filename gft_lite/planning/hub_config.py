"""The config.json of a model of the hub: from its cache, or by one small request."""

from __future__ import annotations

from pathlib import Path

from gft_lite.utils.errors import RecipeError
from gft_lite.utils.hub import HubUnreachableError, get_from_hub, why_offline

_MAX_BYTES = 1 << 20


def read_hub_file(model: str, name: str, revision: str | None = None) -> bytes | None:
    """A small file of a model; None if the model has none of that name.

    Raises: RecipeError if the hub can't be reached, doesn't have the model or asks for access.
    """
    offline = why_offline()
    # Imported here because they take longer than everything else in a plan.
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, name, revision=revision)
    except HFValidationError:
        raise _unknown(model, "which is no name of a model") from None
    if isinstance(cached, str):
        return Path(cached).read_bytes()
    if cached is not None and constants.HF_HUB_OFFLINE:  # The cache knows that there is none.
        return None
    if constants.HF_HUB_OFFLINE:
        raise _unknown(model, f"whose {name} has not been downloaded, and {offline}")
    return _request(model, name, revision)


def _request(model: str, name: str, revision: str | None) -> bytes | None:
    from huggingface_hub import hf_hub_url

    try:
        reply = get_from_hub(hf_hub_url(model, name, revision=revision))
    except HubUnreachableError as error:
        raise _unknown(model, f"and {error}") from None
    # The hub says 401 for a model that does not exist, too.
    if reply.headers.get("X-Error-Code") == "EntryNotFound":
        return None
    if reply.status_code in (401, 403):
        raise _unknown(model, "which the hub does not have, or shows only to those with access "
                       "(log in with `hf auth login`)")  # fmt: skip
    if reply.status_code != 200:
        raise _unknown(model, f"for which the hub replied {reply.status_code}")
    return reply.content[:_MAX_BYTES]


def _unknown(model: str, why: str) -> RecipeError:
    return RecipeError(
        [f"policy.model: must be lab, a folder with a config.json, or a model of the hub, got "
         f"{model!r}, {why}. Check the name, or give a folder."]
    )  # fmt: skip
