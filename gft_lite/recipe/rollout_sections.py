"""The sections `group` and `rollout`: the responses to a problem, and how they are sampled."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from gft_lite.recipe.base import (
    ONE_OR_MORE,
    Settings,
    Share,
    Temperature,
    at_most,
    matching,
    named_in,
)
from gft_lite.recipe.effects import EVALUATION, EVERYTHING, NO_RESULT, SAMPLING, TRAINING
from gft_lite.recipe.policy_section import DtypeName

# Names of `rollout.engine`; `rollout.registry.ENGINES` has their classes.
ENGINE_NAMES = ("auto", "transformers", "vllm", "vllm_server", "unsloth")


class GroupSettings(Settings):
    """The responses to a problem that are compared with each other.

    The defaults are those of `gft`. With other methods the numbers of responses are others, 0 of
    sources that a method does not train on, and `shortfall` is `drop` where no samples are drawn.
    """

    expert: Annotated[NonNegativeInt, at_most(10_000), SAMPLING] = 1
    """Number of expert demonstrations, from `data.columns.expert` or conversations; a problem that
    has more uses others in each epoch."""
    teacher: Annotated[NonNegativeInt, at_most(10_000), SAMPLING] = 3
    """Number of teacher demonstrations, from `data.columns.teacher`."""
    self: Annotated[NonNegativeInt, at_most(10_000), SAMPLING] = 4
    """Number of responses that are sampled from the policy; more cost rollout time."""
    shortfall: Annotated[Literal["self", "repeat", "drop"], SAMPLING] = "self"
    """Where a problem has too few demonstrations: sample more from the policy (`self`), `repeat`
    those there are, or `drop` the problem, as `repeat` does where there are none."""
    offline: Annotated[str | None, TRAINING] = None
    """Folder of `gft-lite groups`, whose groups were sampled before training from the base or
    `policy.adapter`. null: training samples."""

    @model_validator(mode="after")
    def _not_empty(self) -> GroupSettings:
        if self.size == 0:
            raise ValueError("self: must be at least 1 when expert and teacher are 0")
        return self

    @property
    def size(self) -> int:
        """K, the number of responses of a group."""
        return self.expert + self.teacher + self.self


def _none_is_auto(value: Any) -> Any:
    return "auto" if value is None else value  # Recipes of earlier runs have null.


class RolloutSettings(Settings):
    """The engine that samples the self responses, and its sampling parameters."""

    engine: Annotated[str, named_in(ENGINE_NAMES), EVALUATION] = "auto"
    """What samples: vLLM in this process (`vllm`) or on servers, `transformers` with the trainer's
    own model, vLLM on the weights of backend `unsloth`, or an engine of your own at a dotted path;
    `auto`: `vllm` on a GPU if it is installed, else `transformers`."""
    servers: Annotated[
        list[Annotated[str, matching(r"https?://\S+", "must be an http(s) address")]],
        ONE_OR_MORE,
        NO_RESULT,
    ] = []
    """Addresses of vLLM servers, used in turn, that read adapters under the same path as this
    machine. Empty, engine `vllm_server` starts one here."""
    temperature: Annotated[Temperature, SAMPLING] = 1.0
    """Sampling temperature of training. The loss takes log-probs at temperature 1 whatever this is.
    """
    top_p: Annotated[Share, SAMPLING] = 1.0
    """Sample from the likeliest tokens that together have this probability; 1: from all."""
    top_k: Annotated[NonNegativeInt, SAMPLING] = 0
    """Sample from this many of the likeliest tokens; 0: from all. Evaluations sample from all."""
    max_tokens: Annotated[PositiveInt, EVERYTHING] = 1024
    """Most tokens of a response; longer demonstrations are left out. Raise it where many responses
    are truncated."""
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], ONE_OR_MORE, EVERYTHING] = []
    """Texts that end a response, besides the model's end tokens."""
    batch_size: Annotated[
        Literal["auto"] | Annotated[PositiveInt, at_most(1_000_000)], NO_RESULT
    ] = 128
    """Number of responses sampled at once; lower it where sampling runs out of memory. `auto`: the
    memory plan decides, 128 without one."""
    resample: Annotated[NonNegativeInt, at_most(1000), TRAINING] = 0
    """Most times that a step replaces flat groups, whose rewards are all equal so that they teach
    nothing, by groups of other problems (dynamic sampling); each takes further rollouts."""
    base: Annotated[Literal["nf4_dequantised", "original", "plugin"], EVALUATION] = (
        "nf4_dequantised"
    )
    """Base that vLLM serves: the trainer's weights dequantised from NF4 or int8, the published
    weights, or these in 4 bits by vLLM's bitsandbytes `plugin`, which takes the least memory."""
    dtype: Annotated[Literal["auto", DtypeName], EVALUATION] = "auto"
    """Precision in which a vLLM of this run computes; `auto`: `policy.dtype`, but bfloat16 on a CPU
    with instructions for it."""
    gpu_memory: Annotated[Literal["auto"] | Annotated[float, Field(gt=0, lt=1)], NO_RESULT] = "auto"
    """vLLM's share of the card. `auto`: the memory plan decides, without one 80% of what is free.
    """
    kv_cache_mib: Annotated[
        Literal["auto"] | PositiveInt, BeforeValidator(_none_is_auto), NO_RESULT
    ] = "auto"
    """Size of vLLM's KV cache in MiB. `auto`: what `gpu_memory` leaves, on a CPU room for
    `batch_size` responses of the context's length within a quarter of the free RAM."""
    eager: Annotated[bool, NO_RESULT] = False
    """Do without CUDA graphs in vLLM: less memory and a faster start, slower tokens."""
    sleep: Annotated[bool, NO_RESULT] = True
    """Free vLLM's memory on the card during training; false keeps it, which saves time where both
    fit."""
    probe_limit: Annotated[PositiveFloat, NO_RESULT] = 0.2
    """Greatest accepted mean difference between the log-probs of engine and trainer, in nats per
    token; a larger one, at a sync or over a step's samples, ends the run."""

    @model_validator(mode="after")
    def _servers_are_used(self) -> RolloutSettings:
        if self.servers and self.engine != "vllm_server":
            raise ValueError("servers: must be empty unless rollout.engine is vllm_server")
        return self

    @model_validator(mode="after")
    def _dtype_is_used(self) -> RolloutSettings:
        if self.dtype != "auto" and (self.servers or self.engine in ("transformers", "unsloth")):
            raise ValueError(
                "dtype: must be auto where the run starts no vLLM; other engines compute in "
                "policy.dtype"
            )
        return self

    def resolved_dtype(
        self, policy_dtype: DtypeName, device: str, *, cpu_has_bf16: bool
    ) -> DtypeName:
        """The dtype of a vLLM that the run starts beside a policy of `policy_dtype`."""
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if device == "cpu" and cpu_has_bf16 else policy_dtype

    @property
    def is_greedy(self) -> bool:
        """True if the samples of a prompt are the same, for `top_p` below 0.01 nearly always."""
        return self.temperature == 0 or self.top_k == 1 or self.top_p < 0.01

    @property
    def rows(self) -> int:
        """The number of responses that are sampled at once."""
        return 128 if isinstance(self.batch_size, str) else self.batch_size
