"""Rollouts with vLLM in this process: adapters are loaded beside the base, never merged into it."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import math
import os
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from gft_lite.rollout import Completion, Request, RolloutError, Sampling
from gft_lite.rollout.restart import EngineFailed
from gft_lite.types import FinishReason

if TYPE_CHECKING:
    from gft_lite.policy import Policy
    from gft_lite.recipe import RolloutSettings

CPU_KV_CACHE = 64 << 20
CPU_BLOCK = 32  # vLLM's 128 would leave shorter prompts out of the prefix cache.

# What vLLM replaces in torch on a CPU, once for the process. The trainer gets its own back after
# every call and vLLM finds its own in the next one; the same holds for environment variables.
_REPLACED: list[tuple[Any, str]] = [
    (torch, "set_num_threads"),
    (torch, "Event"),
    *((torch.accelerator, n) for n in ("synchronize", "empty_cache", "get_memory_info")),
    *((torch.cuda, n) for n in ("Event", "Stream", "set_stream", "current_stream", "stream")),
    *((torch.Tensor, n) for n in ("pin_memory", "record_stream")),
]
_vllm_functions: dict[tuple[Any, str], Any] = {}
_vllm_environment: dict[str, str] = {}


class VllmEngine:
    """Serves a copy of the base and at most one adapter; shares the process with the trainer."""

    name = "vllm"

    def __init__(self, settings: RolloutSettings, policy: Policy, scratch: Path) -> None:
        """Start vLLM. Raises: RolloutError when a setting doesn't fit."""
        self._context = policy.context
        self._dtype = policy.dtype
        self._eos_ids = sorted(policy.eos_ids)
        self._shapes = _adapter_shapes(policy.model)
        self._numbers = itertools.count(1)
        self._lora: Any = None
        self._environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
            "VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1"),
            # Else the ports of its process group are open to the network.
            "VLLM_HOST_IP": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        if policy.device.type == "cpu":
            # Compiling one helper of the sampler would take longer than the rest of the start.
            self._environment["TORCHDYNAMO_DISABLE"] = "1"
        self._llm = self._start(settings, policy, scratch)

    def _start(self, settings: RolloutSettings, policy: Policy, scratch: Path) -> Any:
        options = _options(settings, policy)
        logging.getLogger("vllm").setLevel(self._environment["VLLM_LOGGING_LEVEL"])
        with _vllm_in_charge(self._environment), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            from vllm import LLM
            from vllm.distributed import cleanup_dist_env_and_memory, model_parallel_is_initialized
            from vllm.exceptions import VLLMError

            rank = _served_rank(policy.settings.lora.rank)
            if model_parallel_is_initialized():
                # The one that closes first would take down what both stand on.
                raise RolloutError("rollout.engine: close the other vllm engine of this process.")
            base = policy.serving_base(settings.base, scratch)
            try:
                return LLM(
                    model=str(base),
                    revision=policy.settings.revision,
                    trust_remote_code=policy.settings.trust_remote_code,
                    max_model_len=policy.context,
                    max_num_seqs=settings.batch_size,
                    enable_lora=True,
                    max_loras=1,
                    max_lora_rank=rank,
                    generation_config="vllm",
                    logprobs_mode="raw_logprobs",
                    use_tqdm_on_load=False,
                    **options,
                )
            except (VLLMError, ValueError, RuntimeError, OSError) as error:
                cleanup_dist_env_and_memory()
                raise RolloutError(f"rollout.engine: vllm could not start. {error}") from error

    def sync(self, adapter: Path | None, version: int) -> None:
        """Serve the adapter saved at `adapter`, which must stay there until the next sync.

        Raises: RolloutError for an adapter that isn't the policy's; the old one stays served.
        """
        request = None
        with self._running() as llm:
            if adapter is not None:
                _check_adapter(adapter, self._shapes, self._dtype)
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

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Sample each request once per seed.

        Raises: RolloutError for a prompt without room, before anything is sampled.
        """
        rooms = [self._room(len(request.prompt_ids)) for request in requests]
        # One prompt per seed: with n > 1 vLLM would count up from the first one.
        jobs = [
            (r.prompt_ids, {"max_tokens": min(sampling.max_tokens, room), "seed": _folded(seed)})
            for r, room in zip(requests, rooms, strict=True)
            for seed in r.seeds
        ]
        outputs = iter(
            self._run(
                jobs,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                stop=list(sampling.stop),
                stop_token_ids=self._eos_ids,
                ignore_eos=True,  # The policy's ids count, not those that vLLM finds on disk.
                detokenize=bool(sampling.stop),
                skip_special_tokens=False,
                logprobs=0,
            )
        )
        return [[_completion(next(outputs)) for _ in request.seeds] for request in requests]

    def score(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        """Log-probs [T] of `token_ids` after the prompt, under what is served.

        Raises: RolloutError when both together leave no room for one more token.
        """
        ids = [*prompt_ids, *token_ids]
        self._room(len(prompt_ids))
        self._room(len(ids))
        # vLLM must generate one token, and reads no prefix cache when it scores a prompt.
        job = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
        [output] = self._run([(ids, job)])
        return _chosen(token_ids, output.prompt_logprobs[len(prompt_ids) :])

    def close(self) -> None:
        """Free the engine's memory and its rendezvous file; the second call does nothing."""
        if self._llm is None:
            return
        with self._running() as llm:
            worker = llm.llm_engine.model_executor.driver_worker.worker
            rendezvous = worker.distributed_init_method.removeprefix("file://")
            llm.llm_engine.engine_core.shutdown()
            self._llm = self._lora = None
        del llm, worker
        gc.collect()
        Path(rendezvous).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _running(self) -> Iterator[Any]:
        if self._llm is None:
            raise RolloutError("rollout: the engine has been closed.")
        with _vllm_in_charge(self._environment):
            yield self._llm

    def _room(self, length: int) -> int:
        if not 1 <= length < self._context:
            raise RolloutError(
                f"prompt: must have 1 to {self._context - 1} tokens, got {length}. "
                "Raise policy.context or shorten the prompt."
            )
        return self._context - length

    def _run(self, jobs: Sequence[tuple[Sequence[int], dict[str, Any]]], **common: Any) -> Any:
        """One finished vLLM request per job, a job being a prompt and its own parameters."""
        with self._running() as llm:
            from vllm import SamplingParams, TokensPrompt
            from vllm.exceptions import VLLMClientError

            prompts = [TokensPrompt(prompt_token_ids=list(ids)) for ids, _ in jobs]
            try:
                parameters = [SamplingParams(**common, **own) for _, own in jobs]
                return llm.generate(prompts, parameters, use_tqdm=False, lora_request=self._lora)
            except VLLMClientError as error:
                raise RolloutError(f"rollout: vllm refused the request. {error}") from error
            except BaseException as error:
                # A step that was interrupted or failed can make the next one hang.
                self.close()
                if isinstance(error, Exception):
                    reason = f"{type(error).__name__}: {error}"
                    raise EngineFailed(f"rollout: vllm failed. {reason}") from error
                raise


def _folded(seed: int) -> int:
    """A seed that vLLM takes (63 bits; -1 would mean none) and whose low 32 bits hold it all."""
    # torch's CPU generator reads no more than those; smaller seeds stay what they are.
    seed %= 2**63
    return seed ^ seed >> 32


def _completion(output: Any) -> Completion:
    [sample] = output.outputs
    reason: FinishReason = "stop" if sample.finish_reason == "stop" else "length"
    logprobs = _chosen(sample.token_ids, sample.logprobs)
    return Completion(tuple(sample.token_ids), tuple(logprobs), reason)


def _chosen(token_ids: Sequence[int], candidates: Sequence[Mapping[int, Any]]) -> list[float]:
    """The log-prob of each token among the candidates that vLLM lists for its place."""
    return [found[t].logprob for t, found in zip(token_ids, candidates, strict=True)]


def _served_rank(rank: int) -> int:
    """The smallest rank that vLLM can be started with and that holds the policy's."""
    from vllm.config.lora import MaxLoRARanks

    ranks = get_args(MaxLoRARanks)
    if rank > max(ranks):
        raise RolloutError(
            f"policy.lora.rank: must be at most {max(ranks)} with rollout.engine vllm, got {rank}. "
            "Lower it or set rollout.engine=transformers."
        )
    return min(r for r in ranks if r >= rank)


def _options(settings: RolloutSettings, policy: Policy) -> dict[str, Any]:
    """vLLM's arguments for dtype, device and memory. Raises: RolloutError for too little of it."""
    config = policy.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * size * policy.dtype.itemsize
    # vLLM keeps one block for itself.
    least = per_token * (math.ceil(policy.context / CPU_BLOCK) + 1) * CPU_BLOCK
    asked = None if settings.kv_cache_mib is None else settings.kv_cache_mib << 20
    if asked is not None and asked < least:
        raise RolloutError(
            f"rollout.kv_cache_mib: must be at least {math.ceil(least / 2**20)} to hold one "
            f"sequence of policy.context {policy.context}, got {settings.kv_cache_mib}."
        )
    options: dict[str, Any] = {"dtype": str(policy.dtype).removeprefix("torch.")}
    if policy.device.type == "cpu":
        cache = asked or max(CPU_KV_CACHE, least)
        return options | {
            "enforce_eager": True,
            "kv_cache_memory_bytes": cache,
            "block_size": CPU_BLOCK,
        }
    return options | {
        "enforce_eager": settings.eager,
        "gpu_memory_utilization": settings.gpu_memory,
        "kv_cache_memory_bytes": asked,
    }


def _adapter_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the files that the model's adapter is saved to."""
    adapter = f".{model.active_adapter}"
    return {
        name.replace(adapter, ""): tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if ".lora_" in name and f"{adapter}." in f"{name}."
    }


def _check_adapter(
    adapter: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> None:
    """vLLM would serve the base for unknown names, and NaN or cut tensors as they are."""
    try:
        tensors = load_file(adapter / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise RolloutError(
            f"adapter: must be a folder with a PEFT adapter, got {adapter} ({error})."
        ) from error
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(n for n in shapes.keys() | found if shapes.get(n) != found.get(n))
    if wrong:
        raise RolloutError(
            f"adapter: must have the policy's modules and rank, got {adapter}, in which "
            f"{len(wrong)} tensors differ: {wrong[0]} is {found.get(wrong[0], 'missing')} "
            f"instead of {shapes.get(wrong[0], 'absent')}."
        )
    if bad := [n for n, tensor in tensors.items() if not tensor.to(dtype).isfinite().all()]:
        raise RolloutError(f"adapter: must be finite in {dtype}, got {adapter} with {bad[0]}.")


@contextlib.contextmanager
def _vllm_in_charge(environment: Mapping[str, str]) -> Iterator[None]:
    """Let vLLM change the process inside, and leave no trace of it for the trainer outside.

    Kept: the random states of Python, numpy and torch, the number of threads, the environment,
    and the functions of torch that vLLM replaces.
    """
    threads, variables = torch.get_num_threads(), dict(os.environ)
    functions = {place: getattr(*place) for place in _REPLACED}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    os.environ.update(_vllm_environment | dict(environment))
    for place, function in _vllm_functions.items():
        setattr(*place, function)
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for place, function in functions.items():
            _vllm_functions[place] = getattr(*place)
            setattr(*place, function)
        torch.set_num_threads(threads)
        changed = {k: v for k, v in os.environ.items() if variables.get(k) != v}
        _vllm_environment.update(changed)
        os.environ.update(variables)
        for name in changed.keys() - variables.keys():
            del os.environ[name]
        random.setstate(python_state)
        np.random.set_state(numpy_state)
