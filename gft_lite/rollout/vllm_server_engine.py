"""Rollouts over HTTP: vLLM servers that somebody runs, or one that we start beside the trainer."""

from __future__ import annotations

import contextlib
import itertools
import logging
import secrets
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gft_lite.rollout.base import (
    Completion,
    EngineFailed,
    OnCompletion,
    Request,
    RolloutError,
    Sampling,
    noop,
)
from gft_lite.rollout.vllm_common import (
    Job,
    adapter_shapes,
    check_adapter,
    sampling_jobs,
    scoring_job,
)
from gft_lite.rollout.vllm_launcher import OwnServer
from gft_lite.utils.openai_client import LISTING, Endpoint, EndpointError, key_from

if TYPE_CHECKING:
    from gft_lite.policy.base import Policy
    from gft_lite.recipe.sections import RolloutSettings


KEY = "GFT_LITE_SERVER_KEY"
TIMEOUT = 1800.0  # Seconds for one answer; long ones queue behind others.
LOADING = 300.0  # Seconds for an adapter, or for the weights on their way to the card.
RETRIES = 5
RETRIES_OWN = 1  # Nothing passes by itself between two processes of one machine.

# What a server may otherwise take from its model's generation_config.json.
NEUTRAL = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}

GONE = "rollout.servers: going on without one (%s)."

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Server:
    """A server, its name for the base, and the name of the adapter that it has from us."""

    endpoint: Endpoint
    base: str
    adapter: str | None = None


class VllmServerEngine:
    """Deals requests to servers in turn; what is sampled doesn't depend on which one answers."""

    name = "vllm_server"

    def __init__(self, settings: RolloutSettings, policy: Policy, scratch: Path) -> None:
        """Find or start the servers. Raises: RolloutError if one doesn't fit or none answers."""
        self._context = policy.context
        self._dtype = policy.dtype
        self._eos_ids = sorted(policy.eos_ids)
        self._shapes = adapter_shapes(policy.model)
        self._in_flight = settings.rows
        self._limit = settings.probe_limit
        self._prefix = f"gft-lite-{secrets.token_hex(4)}"  # Others may use the same servers.
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._servers: tuple[_Server, ...] = ()
        self._own = None if settings.servers else OwnServer(settings, policy, scratch)
        self.base = self._own.base if self._own else "the servers'"
        self._asleep = False
        try:
            self._connect(settings.servers)
        except BaseException:
            self.close()
            raise

    def _connect(self, urls: Sequence[str]) -> None:
        if self._own:
            endpoints = [
                Endpoint(self._own.url, self._own.key, timeout=TIMEOUT, retries=RETRIES_OWN)
            ]
        else:
            key = key_from(KEY)
            endpoints = [Endpoint(url, key, timeout=TIMEOUT, retries=RETRIES) for url in urls]
        lost = ""
        for endpoint in endpoints:
            if endpoint.exposes_key:
                raise RolloutError(
                    "rollout.servers: must be https, or on this machine (such as the end of an SSH "
                    f"tunnel), to be sent the key in {KEY}, got {endpoint.url}."
                )
            try:
                server = _Server(endpoint, self._base_of(endpoint))
                if not self._own:
                    self._check_logprobs(server)
                self._servers += (server,)
            except EndpointError as error:
                lost = str(error)
                _log.warning(GONE, error)
        if not self._servers:
            raise RolloutError(f"rollout.servers: must have one that answers ({lost}).")

    def _base_of(self, endpoint: Endpoint) -> str:
        """The server's name for the base, once it is one that we can use."""
        try:
            models = endpoint.models()
        except EndpointError as error:
            if error.passing:
                raise
            raise _refused("rollout.servers: must be vLLM servers", error) from None
        bases = [(name, card) for name, card in models.items() if not card.get("parent")]
        base, card = bases[0] if bases else ("", {})
        room = card.get("max_model_len") or 0
        if room < self._context:
            raise RolloutError(
                f"rollout.servers: must be vLLM servers with --max-model-len {self._context} "
                f"(policy.context) or more, got {room} at {endpoint.url}."
            )
        return base

    def _check_logprobs(self, server: _Server) -> None:
        """They must be those of temperature 1 at every other one, too."""
        request = Request((0,), (0,))
        hot = Sampling(temperature=2.0, max_tokens=8)
        [job] = sampling_jobs([request], hot, self._context, self._eos_ids)
        sampled = _completion(self._ask(server, job))
        scored = self._scored(server, request.prompt_ids, sampled.token_ids)
        if not _gap(sampled.logprobs, scored) <= self._limit:
            raise RolloutError(
                "rollout.servers: must be started with --logprobs-mode raw_logprobs, got log-probs "
                f"of another temperature at {server.endpoint.url}."
            )

    def sync(self, adapter: Path | None, version: int) -> None:
        """Serve the adapter saved at `adapter`, which must stay there until the next sync.

        Raises: RolloutError for an adapter that isn't the policy's; the old one stays served.
        """
        if adapter is not None:
            check_adapter(adapter, self._shapes, self._dtype)
        with self._running():
            fresh = {} if adapter is None else self._load_everywhere(adapter.resolve(), version)
            for server in self._servers:
                self._unload(server, server.adapter)
                server.adapter = fresh.get(server)

    def _load_everywhere(self, folder: Path, version: int) -> dict[_Server, str]:
        fresh: dict[_Server, str] = {}
        for server in self._servers:
            try:
                fresh[server] = self._load(server, folder, version)
            except EndpointError as error:
                self._drop(server, error)
            except RolloutError:
                for loaded, name in fresh.items():
                    self._unload(loaded, name)
                raise
        return fresh

    def _load(self, server: _Server, folder: Path, version: int) -> str:
        """Load under a name that the server has not seen: it caches by name and path."""
        name = f"{self._prefix}-v{version}-{next(self._numbers)}"
        body = {"lora_name": name, "lora_path": str(folder)}
        lost: EndpointError | None = None
        for _ in range(2):
            try:
                # vLLM says 500 for adapters that it can't load, which no repetition mends.
                server.endpoint.post("load_lora_adapter", body, timeout=LOADING, max_retries=0)
            except EndpointError as error:
                if error.status is not None and error.status not in (408, 429, 502, 503, 504):
                    what = f"adapter: must load in vllm, got {folder}"
                    raise _refused(what, error) from None
                lost = error
            if name in server.endpoint.models():
                return name
        raise lost or RolloutError(
            f"adapter: must load in vllm, got {folder}, which is not listed."
        )

    def _unload(self, server: _Server, name: str | None) -> None:
        """Have a server forget an adapter; what can't be unloaded is only a name in its list."""
        if name is not None:
            with contextlib.suppress(EndpointError):
                body = {"lora_name": name}
                server.endpoint.post("unload_lora_adapter", body, timeout=LISTING, max_retries=0)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_completion: OnCompletion = noop
    ) -> list[list[Completion]]:
        """Sample each request once per seed.

        Raises: RolloutError for a prompt without room, before anything is sampled.
        """
        jobs = sampling_jobs(requests, sampling, self._context, self._eos_ids)
        # A server takes all samples of a prompt, which it has then read already.
        turns = [turn for turn, request in enumerate(requests) for _ in request.seeds]
        asked = [(request.prompt_ids, seed) for request in requests for seed in request.seeds]
        done: dict[int, Completion] = {}
        size = min(len(jobs), self._in_flight * len(self._servers))
        # Threads of this pool end with the process, even in the middle of an answer.
        with self._running(), ThreadPool(max(size, 1)) as pool:
            dealt = zip(itertools.count(), turns, jobs)
            for number, choice in pool.imap_unordered(self._dealt, dealt):
                done[number] = _completion(choice)
                on_completion(*asked[number], done[number])
        numbers = itertools.count()
        return [[done[next(numbers)] for _ in request.seeds] for request in requests]

    def score(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        """Log-probs [T] of `token_ids` after the prompt, under what is served.

        Raises: RolloutError if there is no room for one more token, or if servers disagree.
        """
        scores: dict[_Server, list[float]] = {}
        with self._running():
            for server in self._servers:
                try:
                    scores[server] = self._scored(server, prompt_ids, token_ids)
                except EndpointError as error:
                    self._drop(server, error)
        (first, expected), *others = scores.items()
        for other, found in others:
            if not (gap := _gap(expected, found)) <= self._limit:
                raise RolloutError(
                    f"rollout.servers: must agree within {self._limit} nats per token, got "
                    f"{gap:.3g} between {first.endpoint.url} and {other.endpoint.url}."
                )
        return expected

    def _scored(
        self, server: _Server, prompt_ids: Sequence[int], token_ids: Sequence[int]
    ) -> list[float]:
        choice = self._ask(server, scoring_job(prompt_ids, token_ids, self._context))
        listed = choice["prompt_logprobs"][len(prompt_ids) :]
        return [found[str(t)]["logprob"] for t, found in zip(token_ids, listed, strict=True)]

    def sleep(self) -> None:
        """Give our own server's memory on the card back; those of others are left alone."""
        if self._own and self._own.sleeps and not self._asleep:
            self._tell_own("sleep?level=1")  # Level 2 would drop the adapter as well.
            self._asleep = True

    def wake(self) -> None:
        """Serve again what was served before. Raises: RolloutError when its memory is taken."""
        if self._asleep:
            self._asleep = False
            self._tell_own("wake_up")

    def close(self) -> None:
        """Leave the servers as they were, end our own; the second call does nothing."""
        for server in self._servers:
            if not self._own:
                self._unload(server, server.adapter)
            server.endpoint.close()
        self._servers = ()
        if self._own:
            self._own.close()

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        if not self._servers:
            raise RolloutError("rollout: the engine has been closed.")
        if self._asleep:
            raise RolloutError("rollout: the engine is asleep; call wake() first.")
        try:
            yield
        except EngineFailed:
            self.close()
            raise

    def _tell_own(self, route: str) -> None:
        with self._running():
            [server] = self._servers
            url = f"{server.endpoint.root}/{route}"
            try:
                server.endpoint.post(url, timeout=LOADING, max_retries=0)
            except EndpointError as error:
                kind = EngineFailed if error.status is None else RolloutError
                raise kind(f"rollout.engine: vllm must obey {route} ({error}).") from None

    def _dealt(self, dealt: tuple[int, int, Job]) -> tuple[int, Any]:
        """The job's number and the answer of the server whose turn it is, or of another one."""
        number, turn, job = dealt
        while servers := self._servers:
            server = servers[turn % len(servers)]
            try:
                return number, self._ask(server, job)
            except EndpointError as error:
                self._drop(server, error)
        raise RolloutError("rollout: the engine has been closed.")

    def _ask(self, server: _Server, job: Job) -> Any:
        """The one choice in a server's answer.

        Raises: RolloutError if it refuses the request, EndpointError if it is of no use.
        """
        ids, parameters = job
        body = {
            "model": server.adapter or server.base,
            "prompt": list(ids),
            "return_token_ids": True,
            **NEUTRAL,
            **parameters,
        }
        try:
            answer = server.endpoint.post("completions", body)
        except EndpointError as error:
            # It was started anew, without our adapter, when it doesn't know the model.
            if error.passing or error.status == 404:
                raise
            raise _refused("rollout: vllm refused the request", error) from None
        try:
            [choice] = answer["choices"]
            finished = choice["finish_reason"] in ("stop", "length")
            usable = finished and choice["token_ids"] is not None
        except (KeyError, TypeError, ValueError):
            usable = False
        if not usable:
            raise EndpointError(f"{server.endpoint.url}: broke off, or is no vLLM server")
        return choice

    def _drop(self, server: _Server, error: EndpointError) -> None:
        """Go on without a server. Raises: EngineFailed if it was the last one."""
        with self._lock:
            if server not in self._servers:
                return
            if len(self._servers) == 1:
                raise EngineFailed(f"rollout: no server is left ({error}).")
            self._servers = tuple(s for s in self._servers if s is not server)
            _log.warning(GONE, error)


def _completion(choice: Any) -> Completion:
    logprobs = tuple(choice["logprobs"]["token_logprobs"])
    return Completion(tuple(choice["token_ids"]), logprobs, choice["finish_reason"])


def _gap(a: Sequence[float], b: Sequence[float]) -> float:
    """The mean distance in nats."""
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / max(len(a), 1)


def _refused(what: str, error: EndpointError) -> RolloutError:
    hints = {
        401: f" Set the environment variable {KEY} to the key of the servers.",
        404: " A server needs --enable-lora, VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its "
        "environment, and adapters under the same path as here.",
    }
    return RolloutError(f"{what} ({error}).{hints.get(error.status or 0, '')}")
