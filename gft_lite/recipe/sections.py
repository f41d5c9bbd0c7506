"""Sections of a recipe about the model, the data, the loss, the reward and the rollout."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from gft_lite.recipe.base import Fraction, Settings, Share, matching, named_in
from gft_lite.recipe.effects import EVALUATION, EVERYTHING, NO_RESULT, SAMPLING, TRAINING
from gft_lite.rewards.registry import REWARDS
from gft_lite.utils.errors import short_repr

# What `rollout.engine` accepts beside a dotted path; `rollout.registry.ENGINES` has the classes.
ENGINE_NAMES = ("auto", "transformers", "vllm", "vllm_server", "unsloth")


class LoraSettings(Settings):
    """The adapter. Source: LoRA, arXiv 2106.09685."""

    rank: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: Fraction = 0.0
    target_modules: Literal["all-linear"] | list[str] = "all-linear"


class PolicySettings(Settings):
    """The model that is trained: a frozen, quantised base and an adapter.

    `gradient_checkpointing` may be a number: that many layers, from the first. Checkpoints and
    the input embedding can wait in the CPU's memory; with fewer layers than all, what the others
    keep goes along. `auto` leaves it to the memory plan.
    `layout` is how rows share a micro-batch: `shared` sends a prompt through the model once for
    all its responses, `packed` rows one after another, `padded` rows side by side; `auto` takes
    the first of them that the model can do. `fused_head` takes log-probs and their gradient in
    one pass. With backend `unsloth` attention and recomputation are Unsloth's own.
    """

    backend: Annotated[Literal["transformers", "unsloth"], EVALUATION] = "transformers"
    model: Annotated[str, EVERYTHING] = "lab"
    revision: Annotated[str | None, EVERYTHING] = None
    adapter: Annotated[str | None, EVERYTHING] = None
    reference: Annotated[Literal["base", "adapter"], EVALUATION] = "base"
    quantization: Annotated[Literal["nf4", "int8", "none"], EVERYTHING] = "nf4"
    double_quantization: Annotated[bool, EVERYTHING] = True
    dtype: Annotated[Literal["auto", "bfloat16", "float16", "float32"], EVALUATION] = "auto"
    device: Annotated[
        str, matching(r"auto|cpu|cuda(:\d+)?", "must be auto, cpu, cuda or cuda:N"), EVALUATION
    ] = "auto"
    context: Annotated[Annotated[int, Field(ge=8)] | None, EVERYTHING] = None
    threads: Annotated[PositiveInt | None, EVALUATION] = None  # CPU threads of torch
    attention: Annotated[Literal["sdpa", "eager", "flash_attention_2"], EVALUATION] = "sdpa"
    gradient_checkpointing: Annotated[Literal["auto"] | bool | NonNegativeInt, NO_RESULT] = True
    offload_checkpoints: Annotated[Literal["auto"] | bool, NO_RESULT] = False
    offload_embedding: Annotated[Literal["auto"] | bool, NO_RESULT] = False
    layout: Annotated[Literal["auto", "shared", "packed", "padded"], TRAINING] = "auto"
    fused_head: Annotated[bool, TRAINING] = True
    trust_remote_code: Annotated[bool, EVALUATION] = False
    lora: Annotated[LoraSettings, TRAINING] = LoraSettings()

    def resolved_device(self, *, cuda_available: bool) -> str:
        """The device to load the policy on: `auto` is the GPU where there is one."""
        if self.device != "auto":
            return self.device
        return "cuda" if cuda_available else "cpu"

    def resolved_dtype(self, device: str) -> Literal["bfloat16", "float16", "float32"]:
        """The dtype of activations and unquantised weights; `auto` is float32 on the CPU only."""
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if device.startswith("cuda") else "float32"

    @model_validator(mode="after")
    def _reference_needs_adapter(self) -> PolicySettings:
        if self.reference == "adapter" and self.adapter is None:
            raise ValueError("reference: needs policy.adapter, the adapter to start from")
        return self

    @model_validator(mode="after")
    def _backend_can(self) -> PolicySettings:
        if self.backend == "transformers":
            return self
        can: dict[str, list[Any]] = {
            "quantization": ["nf4", "none"],
            "double_quantization": [True],
            "attention": ["sdpa"],
            "gradient_checkpointing": [True, False],
            "offload_checkpoints": [True, False],
            "offload_embedding": [False],
            "layout": ["auto", "packed", "padded"],
        }
        # By their texts: 1 equals True, and is a number of layers.
        rules = [f"{name}: must be {' or '.join(map(short_repr, values))} "
                 f"with backend {self.backend}"
                 for name, values in can.items()
                 if short_repr(getattr(self, name)) not in map(short_repr, values)]  # fmt: skip
        if rules:
            raise ValueError("\n".join(rules))
        return self


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class ColumnsSettings(Settings):
    """Which column of the data set holds what; solutions may be spread over several columns.

    `a.b` is field `b` of a nested column `a`. Several columns of a problem are written one below
    the other, a list in one of them as options without letters. `choices` are written under the
    problem as (A), (B), ...; an answer that is the number of a choice, from 0, becomes its letter.
    `answer: null` says that there are no answers.
    `answer_from` takes the last box of that column (boxed) or what follows `####` (hash).
    `clean: gsm8k` drops `<<48/2=24>>` from demonstrations and boxes their `#### 24` line.
    """

    problem: str | list[str] = "problem"
    choices: str | None = None
    answer: str | None = "answer"
    answer_from: Literal["plain", "boxed", "hash"] = "plain"
    expert: Annotated[list[str], BeforeValidator(_as_list)] = []
    teacher: Annotated[list[str], BeforeValidator(_as_list)] = []
    id: str | None = None
    clean: Literal["gsm8k"] | None = None


class PromptSettings(Settings):
    """How a problem becomes a prompt: plain text, or a user turn of the chat template."""

    style: Literal["plain", "chat"] = "plain"
    template: str = "{problem}"
    system: str | None = None

    @model_validator(mode="after")
    def _template_has_problem(self) -> PromptSettings:
        if "{problem}" not in self.template:
            raise ValueError("template: must contain {problem}")
        if self.system is not None and self.style == "plain":
            raise ValueError("system: needs prompt.style: chat")
        return self


class DataSettings(Settings):
    """Rows to problems: the built-in `lab`, a JSONL/parquet/CSV file, or a hub data set id.

    `file` is one file of a hub data set, for those that don't say which is which split.
    """

    source: str = "lab"
    file: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    columns: ColumnsSettings = ColumnsSettings()
    prompt: PromptSettings = PromptSettings()
    max_prompt_tokens: PositiveInt | None = None
    problems: PositiveInt | None = None
    shuffle: bool = True
    seed: int = 0


class TrainingDataSettings(DataSettings):
    """The training data and how many problems of it are held out for monitoring."""

    holdout: NonNegativeInt = 64


class GroupSettings(Settings):
    """How many of the K responses of a group come from each source.

    `offline` is a folder that `gft-lite groups` filled: training takes its groups, whose self
    responses were sampled before it, by the base or `policy.adapter`, and samples none.
    """

    expert: Annotated[NonNegativeInt, SAMPLING] = 1
    teacher: Annotated[NonNegativeInt, SAMPLING] = 3
    self: Annotated[NonNegativeInt, SAMPLING] = 4
    shortfall: Annotated[Literal["self", "repeat", "drop"], SAMPLING] = "self"
    offline: Annotated[str | None, TRAINING] = None

    @model_validator(mode="after")
    def _not_empty(self) -> GroupSettings:
        if self.size == 0:
            raise ValueError("self: must be at least 1 when expert and teacher are 0")
        return self

    @property
    def size(self) -> int:
        """K, the number of responses of a group."""
        return self.expert + self.teacher + self.self


class ObjectiveSettings(Settings):
    """The loss; a method reads the fields that it has a use for.

    `kl` weighs the k3 estimate of KL(policy || reference) in any method's per-token loss (TRL's
    `beta`, without the correction by rho that TRL may apply); `lam` is asft's own.
    `mask_truncated` leaves out rows that the length limit cut off, and what they would add to
    the reduction's denominator. A method's own parameters are extra fields, checked by
    `method_parameters.py`.
    """

    model_config = ConfigDict(extra="allow")

    tau: NonNegativeFloat = 0.7
    std: Literal["sample", "population", "none"] = "sample"
    eps: PositiveFloat = 1e-6
    reduction: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    clip_low: Fraction = 0.2
    clip_high: NonNegativeFloat = 0.2
    lam: NonNegativeFloat = 0.1
    kl: NonNegativeFloat = 0.0
    mask_truncated: bool = False


class RewardFunctionSettings(Settings):
    """One reward function and its weight in the sum.

    `correct_above`: a response with a score above this is correct, which pass@k counts; by default
    0.5 for math, choice and exact, and none for other functions. The first function with such a
    threshold decides; without any, evaluations have the mean reward instead of pass@k.
    """

    name: Annotated[str, named_in(REWARDS)]
    weight: float = 1.0
    parameters: dict[str, Any] = {}
    correct_above: float | None = None


def _reward_shorthand(value: Any) -> Any:
    items = [value] if isinstance(value, (str, dict)) else value
    if not isinstance(items, list):
        return items
    return [{"name": item} if isinstance(item, str) else item for item in items]


class RewardSettings(Settings):
    """The reward rule: a weighted sum of functions, graded in worker processes."""

    functions: Annotated[
        list[RewardFunctionSettings],
        BeforeValidator(_reward_shorthand),
        Field(min_length=1),
        EVERYTHING,
    ] = Field(default_factory=lambda: [RewardFunctionSettings(name="math")])
    workers: Annotated[PositiveInt, NO_RESULT] = 2
    timeout: Annotated[PositiveFloat, EVALUATION] = 3.0


class RolloutSettings(Settings):
    """Who samples the self responses, and how.

    `base` is what vLLM serves: a copy with the trainer's own numbers, the model as published, or
    that, quantised by vLLM's `plugin` for bitsandbytes. `gpu_memory` is its share of the card;
    `auto` leaves it to the memory plan. It gives it back while the trainer trains (`sleep`).
    `batch_size` is how many responses are sampled side by side; `auto` is what the plan finds to
    fit, 128 where there is no plan.
    `resample` is how often flat groups are replaced by those of other problems.
    `eager` goes without CUDA graphs, which take memory and time at the start, for faster tokens.
    `servers` are the addresses of vLLM servers for engine `vllm_server`, which take requests in
    turn and read adapters under the same path; without any, one is started on this machine.
    """

    engine: Annotated[str, named_in(ENGINE_NAMES), EVALUATION] = "auto"
    servers: Annotated[
        list[Annotated[str, matching(r"https?://\S+", "must be an http(s) address")]],
        BeforeValidator(_as_list),
        NO_RESULT,
    ] = []
    temperature: Annotated[NonNegativeFloat, SAMPLING] = 1.0
    top_p: Annotated[Share, SAMPLING] = 1.0
    top_k: Annotated[NonNegativeInt, SAMPLING] = 0
    max_tokens: Annotated[PositiveInt, EVERYTHING] = 1024
    stop: Annotated[list[str], BeforeValidator(_as_list), EVERYTHING] = []
    batch_size: Annotated[Literal["auto"] | PositiveInt, NO_RESULT] = 128
    resample: Annotated[NonNegativeInt, TRAINING] = 0
    base: Annotated[Literal["nf4_dequantised", "original", "plugin"], EVALUATION] = (
        "nf4_dequantised"
    )
    gpu_memory: Annotated[Literal["auto"] | Annotated[float, Field(gt=0, lt=1)], NO_RESULT] = "auto"
    kv_cache_mib: Annotated[PositiveInt | None, NO_RESULT] = None
    eager: Annotated[bool, NO_RESULT] = False
    sleep: Annotated[bool, NO_RESULT] = True
    probe_limit: Annotated[PositiveFloat, NO_RESULT] = 0.2

    @model_validator(mode="after")
    def _servers_are_used(self) -> RolloutSettings:
        if self.servers and self.engine != "vllm_server":
            raise ValueError("servers: must be empty unless rollout.engine is vllm_server")
        return self

    @property
    def rows(self) -> int:
        """How many responses are sampled side by side."""
        return 128 if isinstance(self.batch_size, str) else self.batch_size
