"""Client of one vLLM server over HTTP: its base, completions, scores and adapters."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gft_lite.rollout.base import Completion, RolloutError
from gft_lite.rollout.vllm_common import VllmRequest
from gft_lite.utils.errors import RecipeError, short_repr
from gft_lite.utils.openai_client import LISTING, Endpoint, EndpointError

KEY_VARIABLE = "GFT_LITE_SERVER_KEY"
LOAD_TIMEOUT = 300.0  # Seconds to load an adapter, or to move the weights to or from the card.

# Overrides what a server may read from its model's generation_config.json.
NEUTRAL_SAMPLING = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class VllmClient:
    """One server, and the adapter that we have loaded into it (None: the base is served)."""

    def __init__(self, endpoint: Endpoint, context: int, vocabulary: int) -> None:
        """Look up the server's base; `vocabulary` is the number of the policy's token ids.

        Raises: RecipeError for a server without one or with too short a context; EndpointError
        for one that can't be reached.
        """
        self._endpoint = endpoint
        self._vocabulary = vocabulary
        self._base = self._find_base(context)
        self._adapter: str | None = None

    @property
    def url(self) -> str:
        """The address of the server's OpenAI-compatible routes."""
        return self._endpoint.url

    def _find_base(self, context: int) -> str:
        try:
            models = self._endpoint.models()
        except EndpointError as error:
            if error.transient:
                raise
            what = f"rollout.servers: must be vLLM servers ({error})."
            raise RecipeError([what + _hint(error)]) from None
        bases = [(name, card) for name, card in models.items() if not card.get("parent")]
        name, card = bases[0] if bases else ("", {})
        longest = card.get("max_model_len")
        if not isinstance(longest, int) or longest < context:
            raise RecipeError(
                [f"rollout.servers: must be vLLM servers with --max-model-len {context} "
                 f"(policy.context) or more, got {short_repr(longest or 0)} at {self.url}."]
            )  # fmt: skip
        return name

    def sample(self, request: VllmRequest) -> Completion:
        """Raises: RolloutError if the server rejects the request; EndpointError if it fails."""
        choice = self._complete(request)
        with self._malformed():
            ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            self._check_ids(ids, request.parameters["max_tokens"])
            _check_logprobs(logprobs, len(ids))
            return Completion(tuple(ids), tuple(logprobs), choice["finish_reason"])

    def score(self, request: VllmRequest, token_ids: Sequence[int]) -> list[float]:
        """Log-probs [T] of `token_ids`, the last T tokens of the request's prompt.

        Raises: as `sample`.
        """
        choice = self._complete(request)
        with self._malformed():
            listed = choice["prompt_logprobs"][len(request.prompt_ids) - len(token_ids) :]
            logprobs = [
                found[str(t)]["logprob"] for t, found in zip(token_ids, listed, strict=True)
            ]
            _check_logprobs(logprobs, len(token_ids))
            return logprobs

    def _complete(self, request: VllmRequest) -> Mapping[str, Any]:
        """The single choice of the server's response."""
        body = {
            "model": self._adapter or self._base,
            "prompt": list(request.prompt_ids),
            "return_token_ids": True,
            **NEUTRAL_SAMPLING,
            **request.parameters,
        }
        try:
            response = self._endpoint.post("completions", body)
        except EndpointError as error:
            # 404: the server was restarted and no longer has the adapter.
            if error.transient or error.status == 404:
                raise
            raise _rejected("rollout: vllm rejected the request", error) from None
        with self._malformed():
            [choice] = response["choices"]
            if choice["finish_reason"] not in ("stop", "length"):
                raise ValueError(f"finish_reason {choice['finish_reason']!r:.60}")
            return choice

    def _check_ids(self, ids: Any, most: int) -> None:
        """Raises: ValueError unless `ids` is a list of 1 to `most` token ids."""
        if not isinstance(ids, list) or not 1 <= len(ids) <= most:
            raise ValueError(f"must have 1 to {most} token_ids")
        if not all(type(i) is int and 0 <= i < self._vocabulary for i in ids):
            raise ValueError(f"token_ids must be integers from 0 to {self._vocabulary - 1}")

    @contextlib.contextmanager
    def _malformed(self) -> Iterator[None]:
        """Raise an EndpointError for content that isn't a vLLM completion."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"[:200]
            raise EndpointError(f"{self.url}: sent a malformed completion ({what})") from None

    def serve(self, adapter: str | None) -> None:
        """Sample from the loaded adapter of that name, or from the base, and unload the old one."""
        self.unload(self._adapter)
        self._adapter = adapter

    def load(self, name: str, folder: Path) -> None:
        """Load the adapter in `folder` under a name that the server has not seen.

        Raises: RolloutError if the server rejects the adapter; EndpointError if it fails.
        """
        body = {"lora_name": name, "lora_path": str(folder)}
        failure: EndpointError | None = None
        for _ in range(2):
            try:
                # No retries: vLLM returns status 500 for an adapter that it can't load.
                self._endpoint.post("load_lora_adapter", body, timeout=LOAD_TIMEOUT, max_retries=0)
            except EndpointError as error:
                if error.status not in (None, 408, 429, 502, 503, 504):
                    what = f"adapter: must load in vllm, got {folder}"
                    raise _rejected(what, error) from None
                failure = error
            if name in self._endpoint.models():
                return
        raise failure or RolloutError(
            f"adapter: must load in vllm, got {folder}, which is not listed."
        )

    def unload(self, name: str | None) -> None:
        """Unload an adapter; if that fails, only a name stays in the server's list."""
        if name is not None:
            with contextlib.suppress(EndpointError):
                body = {"lora_name": name}
                self._endpoint.post("unload_lora_adapter", body, timeout=LISTING, max_retries=0)

    def post_root(self, route: str) -> None:
        """POST to a development route of the server. Raises: EndpointError."""
        url = f"{self._endpoint.root}/{route}"
        self._endpoint.post(url, timeout=LOAD_TIMEOUT, max_retries=0)

    def close(self) -> None:
        """Close the connections."""
        self._endpoint.close()


def _rejected(what: str, error: EndpointError) -> RolloutError:
    return RolloutError(f"{what} ({error}).{_hint(error)}")


def _hint(error: EndpointError) -> str:
    """What a status means here."""
    if error.status == 401:
        return f" Set the environment variable {KEY_VARIABLE} to the key of the servers."
    if error.status == 404:
        return (
            " A server needs --enable-lora, VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its "
            "environment, and adapters under the same path as here."
        )
    return ""


def _check_logprobs(logprobs: Any, length: int) -> None:
    """Raises: ValueError unless `logprobs` is a list of `length` finite numbers."""
    if not isinstance(logprobs, list) or len(logprobs) != length:
        raise ValueError(f"must have {length} log-probs")
    if not all(type(x) in (int, float) and math.isfinite(x) for x in logprobs):
        raise ValueError("log-probs must be finite numbers")
