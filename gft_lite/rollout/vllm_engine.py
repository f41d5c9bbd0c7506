"""Rollouts with vLLM in this process: adapters are loaded beside the base, never merged into it."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gft_lite.policy.vllm_process import engine_environment, vllm_in_charge
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
    engine_options,
    sampling_jobs,
    scoring_job,
)
from gft_lite.types import FinishReason

if TYPE_CHECKING:
    from gft_lite.policy.base import Policy
    from gft_lite.recipe.sections import RolloutSettings


class VllmEngine:
    """Serves a copy of the base and at most one adapter; shares the process with the trainer."""

    name = "vllm"

    def __init__(self, settings: RolloutSettings, policy: Policy, scratch: Path) -> None:
        """Start vLLM. Raises: RolloutError when a setting doesn't fit."""
        self._context = policy.context
        self._dtype = policy.dtype
        self._eos_ids = sorted(policy.eos_ids)
        self._shapes = adapter_shapes(policy.model)
        self._numbers = itertools.count(1)
        self._lora: Any = None
        self._sleeps, self._asleep = settings.sleep, False
        self._environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            **engine_environment(policy.device),
        }
        # One of several processes: its engine lives in the process group that they have.
        self._guest = torch.distributed.is_initialized()
        if self._guest:
            for name in ("VLLM_HOST_IP", "GLOO_SOCKET_IFNAME"):  # They may be on other machines.
                self._environment.pop(name, None)
        self._llm = self._start(settings, policy, scratch)

    def _start(self, settings: RolloutSettings, policy: Policy, scratch: Path) -> Any:
        options = engine_options(settings, policy)
        if self._guest:
            options["distributed_executor_backend"] = "external_launcher"
        logging.getLogger("vllm").setLevel(self._environment["VLLM_LOGGING_LEVEL"])
        with vllm_in_charge(self._environment), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            from vllm import LLM
            from vllm.distributed import cleanup_dist_env_and_memory, model_parallel_is_initialized
            from vllm.exceptions import VLLMError

            if model_parallel_is_initialized():
                # The one that closes first would take down what both stand on.
                raise RolloutError("rollout.engine: close the other vllm engine of this process.")
            base = policy.serving_base(settings.base)
            self.base = base.about
            try:
                return LLM(model=base.location, use_tqdm_on_load=False, **options)
            # An assertion fails where sleep mode finds that an engine before it is not gone.
            except (VLLMError, ValueError, RuntimeError, OSError, AssertionError) as error:
                cleanup_dist_env_and_memory()
                raise RolloutError(f"rollout.engine: vllm could not start. {error}") from error

    def sync(self, adapter: Path | None, version: int) -> None:
        """Serve the adapter saved at `adapter`, which must stay there until the next sync.

        Raises: RolloutError for an adapter that isn't the policy's; the old one stays served.
        """
        request = None
        with self._running() as llm:
            if adapter is not None:
                check_adapter(adapter, self._shapes, self._dtype)
                request = self._load(llm.llm_engine, adapter, version)
            if self._lora is not None:
                llm.llm_engine.remove_lora(self._lora.lora_int_id)
        self._lora = request

    def _load(self, engine: Any, adapter: Path, version: int) -> Any:
        """Load under a name, a number and a path that vLLM has not seen: it caches by all three."""
        from vllm.exceptions import VLLMError
        from vllm.lora.request import LoRARequest

        number = next(self._numbers)
        request = LoRARequest(f"policy-v{version}-{number}", number, str(adapter.resolve()))
        try:
            loaded = engine.add_lora(request) and number in engine.list_loras()
        except (VLLMError, ValueError, RuntimeError) as error:
            raise RolloutError(f"adapter: must load in vllm, got {adapter}. {error}") from error
        if not loaded:
            raise RolloutError(f"adapter: must load in vllm, got {adapter}, which it did not list.")
        return request

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_completion: OnCompletion = noop
    ) -> list[list[Completion]]:
        """Sample each request once per seed.

        Raises: RolloutError for a prompt without room, before anything is sampled.
        """
        jobs = sampling_jobs(requests, sampling, self._context, self._eos_ids)
        asked = [(request.prompt_ids, seed) for request in requests for seed in request.seeds]
        done: dict[int, Completion] = {}

        def note(number: int, output: Any) -> None:
            done[number] = _completion(output)
            on_completion(*asked[number], done[number])

        self._run(jobs, note, detokenize=bool(sampling.stop))
        numbers = itertools.count()
        return [[done[next(numbers)] for _ in request.seeds] for request in requests]

    def score(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        """Log-probs [T] of `token_ids` after the prompt, under what is served.

        Raises: RolloutError when both together leave no room for one more token.
        """
        job = scoring_job(prompt_ids, token_ids, self._context)
        done: list[Any] = []
        self._run([job], lambda _, output: done.append(output), detokenize=False)
        return _chosen(token_ids, done[0].prompt_logprobs[len(prompt_ids) :])

    def sleep(self) -> None:
        """Give the card's memory back until `wake`; the next call does nothing."""
        if self._sleeps and not self._asleep:
            with self._running() as llm:
                # The weights and, with them, the adapter wait in RAM, the KV cache is dropped.
                # Level 2 drops the adapter as well, and yet vLLM goes on listing it.
                llm.sleep(level=1)
            self._asleep = True

    def wake(self) -> None:
        """Serve again what was served before, with an empty prefix cache.

        Raises: RolloutError when its place on the card is taken.
        """
        if not self._asleep:
            return
        self._asleep = False
        with self._running() as llm:
            try:
                llm.wake_up()
            except RuntimeError as error:
                self.close()
                raise RolloutError(
                    f"rollout.engine: vllm could not take its memory back after training. {error} "
                    "Lower rollout.gpu_memory or train.micro_batch_tokens."
                ) from error

    def close(self) -> None:
        """Free the engine's memory and its rendezvous file; the second call does nothing."""
        if self._llm is None:
            return
        self._asleep = False
        with self._running() as llm:
            worker = llm.llm_engine.model_executor.driver_worker.worker
            rendezvous = worker.distributed_init_method.removeprefix("file://")
            with _group_kept() if self._guest else contextlib.nullcontext():
                llm.llm_engine.engine_core.shutdown()
            self._llm = self._lora = None
        del llm, worker
        gc.collect()
        Path(rendezvous).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _running(self) -> Iterator[Any]:
        if self._llm is None:
            raise RolloutError("rollout: the engine has been closed.")
        if self._asleep:
            # vLLM itself would wait for ever.
            raise RolloutError("rollout: the engine is asleep; call wake() first.")
        with vllm_in_charge(self._environment):
            yield self._llm

    def _run(
        self, jobs: Sequence[Job], note: Callable[[int, Any], None], *, detokenize: bool
    ) -> None:
        """Run a vLLM request per job; `note` gets the job's number and what came of it."""
        with self._running() as llm:
            from vllm.exceptions import VLLMClientError

            engine = llm.llm_engine
            try:
                self._submit(engine, jobs, detokenize)
                while engine.has_unfinished_requests():
                    for output in engine.step():
                        note(int(output.request_id), output)
            except VLLMClientError as error:
                raise RolloutError(f"rollout: vllm refused the request. {error}") from error
            except BaseException as error:
                # A step that was interrupted or failed can make the next one hang.
                self.close()
                if isinstance(error, Exception):
                    reason = f"{type(error).__name__}: {error}"
                    raise EngineFailed(f"rollout: vllm failed. {reason}") from error
                raise

    def _submit(self, engine: Any, jobs: Sequence[Job], detokenize: bool) -> None:
        """Queue every job, or none; vLLM takes them up as others end."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind

        common: dict[str, Any] = {
            "detokenize": detokenize,
            "output_kind": RequestOutputKind.FINAL_ONLY,
        }
        queued: list[str] = []
        try:
            for number, (ids, own) in enumerate(jobs):
                prompt = TokensPrompt(prompt_token_ids=list(ids))
                parameters = SamplingParams(**common, **own)
                engine.add_request(str(number), prompt, parameters, lora_request=self._lora)
                queued.append(str(number))
        except VLLMClientError:
            engine.abort_request(queued)
            raise


def _completion(output: Any) -> Completion:
    [sample] = output.outputs
    reason: FinishReason = "stop" if sample.finish_reason == "stop" else "length"
    logprobs = _chosen(sample.token_ids, sample.logprobs)
    return Completion(tuple(sample.token_ids), tuple(logprobs), reason)


def _chosen(token_ids: Sequence[int], candidates: Sequence[Mapping[int, Any]]) -> list[float]:
    """The log-prob of each token among the candidates that vLLM lists for its place."""
    return [found[t].logprob for t, found in zip(token_ids, candidates, strict=True)]


@contextlib.contextmanager
def _group_kept() -> Iterator[None]:
    """Let vLLM not destroy the process group that it was only a guest in."""
    destroy = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda *_: None
    try:
        yield
    finally:
        torch.distributed.destroy_process_group = destroy
