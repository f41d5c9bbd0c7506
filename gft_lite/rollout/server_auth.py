"""API key check inside the vLLM server that we start: only /health is open without the key.

vLLM's own check leaves /invocations, /tokenize and the development routes open.
"""

from __future__ import annotations

import hmac
import os
from typing import Any


class ApiKeyMiddleware:
    """ASGI middleware that requires the key in VLLM_API_KEY as a bearer token."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Forward a request with the right key; reject the others with status 401."""
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        authorized = hmac.compare_digest(given, self._expected)
        if authorized or scope["type"] == "lifespan" or scope["path"] == "/health":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b"The key is missing or wrong."})
        else:
            await send({"type": "websocket.close", "code": 1008})
