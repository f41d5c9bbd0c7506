"""Rollouts with vLLM in the trainer's process; adapters are loaded beside the base, not merged."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gft_lite.policy.vllm_process import engine_environment, isolated_process_state
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
    VllmRequest,
    adapter_shapes,
    check_adapter,
    describe_base,
    engine_dtype,
    engine_options,
    sampling_requests,
    scoring_request,
    start_inputs,
)
from gft_lite.rollout.vllm_failures import describe, start_failure
from gft_lite.types import FinishReason

if TYPE_CHECKING:
    from gft_lite.policy.base import Policy
    from gft_lite.recipe.sections import RolloutSettings


OnOutput = Callable[[int, Any], None]  # Receives a request's index and vLLM's RequestOutput.


class VllmEngine:
    """Serves a copy of the base and at most one adapter, in the trainer's process."""

    name = "vllm"

    def __init__(self, settings: RolloutSettings, policy: Policy, scratch: Path) -> None:
        """Start vLLM. Raises: RolloutError if a setting is out of range or vLLM can't start."""
        self._context = policy.context
        self.adapter_dtype = engine_dtype(settings, policy)
        self._end_ids = sorted(policy.eos_ids)
        self._shapes = adapter_shapes(policy.model)
        self._adapter_ids = itertools.count(1)
        self._lora: Any = None
        self._inputs: dict[str, Any] = {}
        self._can_sleep, self._asleep = settings.sleep, False
        self._environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            **engine_environment(policy.device),
        }
        # In a distributed run, vLLM joins the existing process group of the trainer.
        self._joins_group = torch.distributed.is_initialized()
        if self._joins_group:
            for name in ("VLLM_HOST_IP", "GLOO_SOCKET_IFNAME"):  # Ranks may be on other machines.
                self._environment.pop(name, None)
        self._llm = self._start(settings, policy, scratch)

    def take_over(self, settings: RolloutSettings, policy: Policy) -> bool:
        """Serve the base to another policy on it, with empty caches, as after a start.

        Returns False if a start with these settings would give another engine.
        """
        if self._llm is None or self._inputs != start_inputs(settings, policy):
            return False
        self._shapes = adapter_shapes(policy.model)
        self.wake()
        self.sync(None, 0)
        with self._running() as llm:
            return llm.reset_prefix_cache()

    def _start(self, settings: RolloutSettings, policy: Policy, scratch: Path) -> Any:
        options = engine_options(settings, policy)
        self._inputs = start_inputs(settings, policy)
        if self._joins_group:
            options["distributed_executor_backend"] = "external_launcher"
        logging.getLogger("vllm").setLevel(self._environment["VLLM_LOGGING_LEVEL"])
        with isolated_process_state(self._environment):
            _check_no_other_engine()
            base = policy.serving_base(settings.base, engine_dtype(settings, policy))
            self.base = describe_base(base, settings, policy)
            return _start_llm(base.location, options)

    def sync(self, adapter: Path | None, version: int) -> None:
        """Serve the adapter saved at `adapter`, which must stay there until the next sync.

        Raises: RolloutError for an adapter of other modules or shapes; the old one stays served.
        """
        request = None
        with self._running() as llm:
            if adapter is not None:
                check_adapter(adapter, self._shapes, self.adapter_dtype)
                request = self._load(llm.llm_engine, adapter, version)
            if self._lora is not None:
                llm.llm_engine.remove_lora(self._lora.lora_int_id)
        self._lora = request

    def _load(self, engine: Any, adapter: Path, version: int) -> Any:
        """Load an adapter under a new name, id and path, since vLLM caches by all three."""
        from vllm.exceptions import VLLMError
        from vllm.lora.request import LoRARequest

        lora_id = next(self._adapter_ids)
        request = LoRARequest(f"policy-v{version}-{lora_id}", lora_id, str(adapter.resolve()))
        try:
            loaded = engine.add_lora(request) and lora_id in engine.list_loras()
        except (VLLMError, ValueError, RuntimeError) as error:
            raise RolloutError(f"adapter: must load in vllm, got {adapter}. {error}") from error
        if not loaded:
            raise RolloutError(f"adapter: must load in vllm, got {adapter}, which is not listed.")
        return request

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_completion: OnCompletion = noop
    ) -> list[list[Completion]]:
        """Sample each request once per seed.

        Raises: RolloutError for a prompt that fills the context, before anything is sampled.
        """
        queued = sampling_requests(requests, sampling, self._context, self._end_ids)
        keys = [(request.prompt_ids, seed) for request in requests for seed in request.seeds]
        done: dict[int, Completion] = {}

        def on_output(index: int, output: Any) -> None:
            done[index] = _completion(output)
            on_completion(*keys[index], done[index])

        self._run(queued, on_output, detokenize=bool(sampling.stop))
        indices = itertools.count()
        return [[done[next(indices)] for _ in request.seeds] for request in requests]

    def score(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        """Log-probs [T] in nats of `token_ids` after the prompt, under the served weights.

        Raises: RolloutError if prompt and completion leave no token of the context free.
        """
        request = scoring_request(prompt_ids, token_ids, self._context)
        done: list[Any] = []
        self._run([request], lambda _, output: done.append(output), detokenize=False)
        return _token_logprobs(token_ids, done[0].prompt_logprobs[len(prompt_ids) :])

    def sleep(self) -> None:
        """Free the device memory until `wake`; a second call does nothing."""
        if self._can_sleep and not self._asleep:
            with self._running() as llm:
                # Level 1 keeps weights and adapter in CPU memory and drops the KV cache. Level 2
                # would also drop the adapter while vLLM goes on listing it.
                llm.sleep(level=1)
            self._asleep = True

    def wake(self) -> None:
        """Serve the same weights as before `sleep`, with an empty prefix cache.

        Raises: RolloutError if the device memory is in use.
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
        """Free the engine's memory and its rendezvous file; a second call does nothing."""
        if self._llm is None:
            return
        self._asleep = False
        with self._running() as llm:
            worker = llm.llm_engine.model_executor.driver_worker.worker
            rendezvous = worker.distributed_init_method.removeprefix("file://")
            with _keep_process_group() if self._joins_group else contextlib.nullcontext():
                llm.llm_engine.engine_core.shutdown()
            self._llm = self._lora = None
        del llm, worker
        gc.collect()
        Path(rendezvous).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _running(self) -> Iterator[Any]:
        """The LLM, in vLLM's process state. Raises: RolloutError if it is closed or asleep."""
        if self._llm is None:
            raise RolloutError("rollout: the engine has been closed.")
        if self._asleep:
            # vLLM itself would wait forever.
            raise RolloutError("rollout: the engine is asleep; call wake() first.")
        with isolated_process_state(self._environment):
            yield self._llm

    def _run(
        self, requests: Sequence[VllmRequest], on_output: OnOutput, *, detokenize: bool
    ) -> None:
        """Run all requests to their end, and call `on_output` for each as it finishes.

        Raises: RolloutError for a request that vLLM rejects; EngineFailed if vLLM breaks down.
        """
        with self._running() as llm:
            engine = llm.llm_engine
            _add_requests(engine, requests, self._lora, detokenize)
            try:
                while engine.has_unfinished_requests():
                    for output in _step(engine):
                        on_output(int(output.request_id), output)
            except BaseException:
                # After an interrupted or failed step, the next one can hang.
                self.close()
                raise


def _check_no_other_engine() -> None:
    try:
        from vllm.distributed import model_parallel_is_initialized
    except Exception as error:  # Whatever the loader of its compiled libraries raises.
        raise start_failure("vllm could not be imported", describe(error)) from error
    if model_parallel_is_initialized():
        # Closing one of two engines would destroy state that both use.
        raise RolloutError("rollout.engine: close the other vllm engine of this process.")


def _start_llm(model: str, options: dict[str, Any]) -> Any:
    """Start vLLM. Raises: UserError or RolloutError if that fails."""
    try:
        from vllm import LLM

        return LLM(model=model, use_tqdm_on_load=False, **options)
    except Exception as error:  # Whatever its kernels, torch and CUDA raise.
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
        raise start_failure("vllm could not start", describe(error)) from error


def _add_requests(
    engine: Any, requests: Sequence[VllmRequest], lora: Any, detokenize: bool
) -> None:
    """Queue all requests with their index as id, or none of them.

    Raises: RolloutError for a request that vLLM rejects.
    """
    from vllm import SamplingParams, TokensPrompt
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import RequestOutputKind

    common: dict[str, Any] = {
        "detokenize": detokenize,
        "output_kind": RequestOutputKind.FINAL_ONLY,
    }
    queued: list[str] = []
    try:
        for index, request in enumerate(requests):
            queued.append(str(index))
            prompt = TokensPrompt(prompt_token_ids=list(request.prompt_ids))
            parameters = SamplingParams(**common, **request.parameters)
            engine.add_request(str(index), prompt, parameters, lora_request=lora)
    except BaseException as error:
        engine.abort_request(queued)
        if isinstance(error, VLLMClientError):
            raise RolloutError(f"rollout: vllm rejected the request. {error}") from error
        raise


def _step(engine: Any) -> list[Any]:
    """The outputs that one step of vLLM finishes. Raises: EngineFailed if vLLM breaks down."""
    try:
        return engine.step()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise EngineFailed(f"rollout: vllm failed. {reason}") from error


def _completion(output: Any) -> Completion:
    [sample] = output.outputs
    reason: FinishReason = "stop" if sample.finish_reason == "stop" else "length"
    logprobs = _token_logprobs(sample.token_ids, sample.logprobs)
    return Completion(tuple(sample.token_ids), tuple(logprobs), reason)


def _token_logprobs(
    token_ids: Sequence[int], candidates: Sequence[Mapping[int, Any]]
) -> list[float]:
    """The log-prob of each token among the candidates that vLLM returns for its position."""
    return [found[t].logprob for t, found in zip(token_ids, candidates, strict=True)]


@contextlib.contextmanager
def _keep_process_group() -> Iterator[None]:
    """Keep vLLM's shutdown from destroying the process group of the distributed run."""
    destroy = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda *_: None
    try:
        yield
    finally:
        torch.distributed.destroy_process_group = destroy
