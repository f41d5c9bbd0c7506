"""Rollouts over HTTP, from the vLLM servers of the recipe or from one started for the run."""

from __future__ import annotations

import contextlib
import itertools
import logging
import secrets
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING

from gft_lite.rollout.base import (
    Completion,
    EngineFailed,
    OnCompletion,
    Request,
    RolloutError,
    Sampling,
    noop,
)
from gft_lite.rollout.vllm_client import KEY_VARIABLE, VllmClient
from gft_lite.rollout.vllm_common import (
    VllmRequest,
    adapter_shapes,
    check_adapter,
    engine_dtype,
    sampling_requests,
    scoring_request,
)
from gft_lite.rollout.vllm_launcher import VllmServerProcess
from gft_lite.utils.errors import RecipeError, short_repr
from gft_lite.utils.openai_client import Endpoint, EndpointError, key_from

if TYPE_CHECKING:
    from gft_lite.policy.base import Policy
    from gft_lite.recipe.sections import RolloutSettings


REQUEST_TIMEOUT = 1800.0  # Seconds for one completion; it may wait for others in the queue.
RETRIES = 5
RETRIES_LOCAL = 1  # Between two processes of one machine, waiting does not help.

SERVER_DROPPED = "rollout.servers: continuing without one server (%s)."

_log = logging.getLogger(__name__)


class VllmServerEngine:
    """Distributes requests over servers; which one a sample comes from matters only by rounding."""

    name = "vllm_server"

    def __init__(self, settings: RolloutSettings, policy: Policy, scratch: Path) -> None:
        """Connect to the servers of the recipe, or start one.

        Raises: RecipeError if a server is unfit or none can be reached.
        """
        self._context = policy.context
        self._vocabulary = policy.config.get_text_config().vocab_size
        # Servers of the recipe have a dtype that is not known here.
        self.adapter_dtype = policy.dtype if settings.servers else engine_dtype(settings, policy)
        self._end_ids = sorted(policy.eos_ids)
        self._shapes = adapter_shapes(policy.model)
        self._rows = settings.rows
        self._limit = settings.probe_limit
        # A random part, since several runs may share a server.
        self._prefix = f"gft-lite-{secrets.token_hex(4)}"
        self._adapter_ids = itertools.count(1)
        self._lock = threading.Lock()
        self._clients: tuple[VllmClient, ...] = ()
        self._process: VllmServerProcess | None = None
        self._asleep = False
        self.base = "the servers'"
        try:
            if settings.servers:
                self._connect(settings)
            else:
                self._launch(settings, policy, scratch)
        except BaseException:
            self.close()
            raise

    def _launch(self, settings: RolloutSettings, policy: Policy, scratch: Path) -> None:
        self._process = VllmServerProcess(settings, policy, scratch)
        self.base = self._process.base
        endpoint = Endpoint(
            self._process.url, self._process.key, timeout=REQUEST_TIMEOUT, retries=RETRIES_LOCAL
        )
        try:
            self._clients = (self._client(endpoint),)
        except EndpointError as error:
            raise RolloutError(f"rollout.engine: the vllm server failed ({error}).") from None

    def _connect(self, settings: RolloutSettings) -> None:
        key = key_from(KEY_VARIABLE)
        failure = ""
        for url in settings.servers:
            try:
                client = self._client(_open_endpoint(url, key))
                self._check_sampling(client, tuple(settings.stop))
                self._clients += (client,)
            except EndpointError as error:
                failure = str(error)
                _log.warning(SERVER_DROPPED, error)
        if not self._clients:
            raise RecipeError([f"rollout.servers: must have one that answers ({failure})."])

    def _client(self, endpoint: Endpoint) -> VllmClient:
        return VllmClient(endpoint, self._context, self._vocabulary)

    def _check_sampling(self, client: VllmClient, stop: tuple[str, ...]) -> None:
        """Raises: RecipeError unless stop strings are accepted and log-probs are untempered."""
        prompt_ids, hot = (0,), Sampling(temperature=2.0, max_tokens=8, stop=stop)
        [request] = sampling_requests(
            [Request(prompt_ids, (0,))], hot, self._context, self._end_ids
        )
        try:
            sampled = client.sample(request)
        except RolloutError as error:
            advice = "Its number of stop strings is limited by VLLM_MAX_STOP_STRINGS." * bool(stop)
            raise RecipeError(
                [f"rollout.servers: must accept requests. {error} {advice}"]
            ) from None
        scored = self._score_on(client, prompt_ids, sampled.token_ids)
        if not _mean_gap(sampled.logprobs, scored) <= self._limit:
            raise RecipeError(
                ["rollout.servers: must be started with --logprobs-mode raw_logprobs, got "
                 f"log-probs of another temperature at {client.url}."]
            )  # fmt: skip

    def sync(self, adapter: Path | None, version: int) -> None:
        """Serve the adapter saved at `adapter`, which must stay there until the next sync.

        Raises: RolloutError for an adapter of other modules or shapes; the old one stays served.
        """
        if adapter is not None:
            check_adapter(adapter, self._shapes, self.adapter_dtype)
        with self._running():
            loaded = {} if adapter is None else self._load_everywhere(adapter.resolve(), version)
            for client in self._clients:
                client.serve(loaded.get(client))

    def _load_everywhere(self, folder: Path, version: int) -> dict[VllmClient, str]:
        """Load an adapter into every server, or into none if one of them rejects it."""
        loaded: dict[VllmClient, str] = {}
        for client in self._clients:
            # New at every sync, since vLLM caches by name and path, and for every address, since
            # two of them may lead to one server.
            name = f"{self._prefix}-v{version}-{next(self._adapter_ids)}"
            try:
                client.load(name, folder)
                loaded[client] = name
            except EndpointError as error:
                self._drop(client, error)
            except RolloutError:
                for other, other_name in loaded.items():
                    other.unload(other_name)
                raise
        return loaded

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_completion: OnCompletion = noop
    ) -> list[list[Completion]]:
        """Sample each request once per seed.

        Raises: RolloutError for a prompt that fills the context, before anything is sampled.
        """
        queued = sampling_requests(requests, sampling, self._context, self._end_ids)
        # All samples of a prompt go to one server, which computes the prompt's KV cache once.
        shares = [share for share, request in enumerate(requests) for _ in request.seeds]
        keys = [(request.prompt_ids, seed) for request in requests for seed in request.seeds]
        done: dict[int, Completion] = {}
        size = min(len(queued), self._rows * len(self._clients))
        # The threads of this pool end with the process, even while they wait for a response.
        with self._running(), ThreadPool(max(size, 1)) as pool:
            numbered = zip(itertools.count(), shares, queued)
            for index, completion in pool.imap_unordered(self._sample, numbered):
                done[index] = completion
                on_completion(*keys[index], completion)
        indices = itertools.count()
        return [[done[next(indices)] for _ in request.seeds] for request in requests]

    def _sample(self, numbered: tuple[int, int, VllmRequest]) -> tuple[int, Completion]:
        """Sample a request on the server of its share, or on another one if that fails."""
        index, share, request = numbered
        while clients := self._clients:
            client = clients[share % len(clients)]
            try:
                return index, client.sample(request)
            except EndpointError as error:
                self._drop(client, error)
        raise RolloutError("rollout: the engine has been closed.")

    def score(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        """Log-probs [T] in nats of `token_ids` after the prompt, under the served weights.

        Raises: RolloutError if prompt and completion leave no token of the context free, or if
        servers disagree.
        """
        scores: dict[VllmClient, list[float]] = {}
        with self._running():
            for client in self._clients:
                try:
                    scores[client] = self._score_on(client, prompt_ids, token_ids)
                except EndpointError as error:
                    self._drop(client, error)
        (first, expected), *others = scores.items()
        for other, found in others:
            if not (gap := _mean_gap(expected, found)) <= self._limit:
                raise RolloutError(
                    f"rollout.servers: must agree within {self._limit} nats per token, got "
                    f"{gap:.3g} between {first.url} and {other.url}."
                )
        return expected

    def _score_on(
        self, client: VllmClient, prompt_ids: Sequence[int], token_ids: Sequence[int]
    ) -> list[float]:
        return client.score(scoring_request(prompt_ids, token_ids, self._context), token_ids)

    def sleep(self) -> None:
        """Free the device memory of the server that we started; other servers keep theirs."""
        if self._process and self._process.can_sleep and not self._asleep:
            self._post("sleep?level=1")  # Level 2 would also drop the adapter.
            self._asleep = True

    def wake(self) -> None:
        """Serve the same weights as before `sleep`.

        Raises: RolloutError if the device memory is in use.
        """
        if self._asleep:
            self._asleep = False
            self._post("wake_up")

    def _post(self, route: str) -> None:
        """POST to a route of the server that we started."""
        with self._running():
            [client] = self._clients
            try:
                client.post_root(route)
            except EndpointError as error:
                kind = EngineFailed if error.status is None else RolloutError
                raise kind(
                    f"rollout.engine: the vllm server rejected POST /{route} ({error})."
                ) from None

    def close(self) -> None:
        """Unload our adapters and end the server that we started; a second call does nothing."""
        for client in self._clients:
            if not self._process:
                client.serve(None)
            client.close()
        self._clients = ()
        if self._process:
            self._process.close()

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Raises: RolloutError if the engine is closed or asleep; closes it if it fails."""
        if not self._clients:
            raise RolloutError("rollout: the engine has been closed.")
        if self._asleep:
            raise RolloutError("rollout: the engine is asleep; call wake() first.")
        try:
            yield
        except EngineFailed:
            self.close()
            raise

    def _drop(self, client: VllmClient, error: EndpointError) -> None:
        """Continue without a server. Raises: EngineFailed if it is the last one."""
        with self._lock:
            if client not in self._clients:
                return
            if len(self._clients) == 1:
                raise EngineFailed(f"rollout: no server is left ({error}).")
            self._clients = tuple(c for c in self._clients if c is not client)
            _log.warning(SERVER_DROPPED, error)


def _open_endpoint(url: str, key: str | None) -> Endpoint:
    """Raises: RecipeError for an address that is invalid or would expose the key."""
    try:
        endpoint = Endpoint(url, key, timeout=REQUEST_TIMEOUT, retries=RETRIES)
    except ValueError as error:
        raise RecipeError([f"rollout.servers: {error}, got {short_repr(url)}."]) from None
    if endpoint.exposes_key:
        raise RecipeError(
            ["rollout.servers: must be https, or on this machine (such as the end of an SSH "
             f"tunnel), to be sent the key in {KEY_VARIABLE}, got {endpoint.url}."]
        )  # fmt: skip
    return endpoint


def _mean_gap(a: Sequence[float], b: Sequence[float]) -> float:
    """The mean absolute difference in nats."""
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / max(len(a), 1)
