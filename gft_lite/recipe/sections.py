"""Sections of a recipe about the model, the data, the loss, the reward and the rollout."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    JsonValue,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    create_model,
    model_validator,
)

from gft_lite.recipe.base import (
    Settings,
    Share,
    Temperature,
    at_most,
    matching,
    named_in,
)
from gft_lite.recipe.effects import EVALUATION, EVERYTHING, NO_RESULT, SAMPLING, TRAINING
from gft_lite.recipe.lora_section import LoraSettings
from gft_lite.utils.errors import short_repr

# Names of `rollout.engine`; `rollout.registry.ENGINES` has their classes.
ENGINE_NAMES = ("auto", "transformers", "vllm", "vllm_server", "unsloth")

DtypeName = Literal["bfloat16", "float16", "float32"]


class PolicySettings(Settings):
    """The model that is trained: a frozen, quantised base and an adapter.

    `gradient_checkpointing` recomputes all layers, or the first N. `offload_checkpoints` keeps
    the inputs of recomputed layers, and the saved activations of the others, in RAM;
    `offload_embedding` the input embedding. `auto`: the memory plan decides.
    `layout` of a micro-batch: `shared` computes a prompt once for all its responses, `packed`
    concatenates rows, `padded` stacks them; `auto` is the first that the model supports.
    `fused_head` computes log-probs and their gradient in one pass. `threads` are torch's CPU
    threads, by default OMP_NUM_THREADS or else the physical cores that affinity and cgroup leave
    to this process, at most 16. With backend `unsloth`, attention and recomputation are Unsloth's.
    """

    backend: Annotated[Literal["transformers", "unsloth"], EVALUATION] = "transformers"
    model: Annotated[str, EVERYTHING] = "lab"
    revision: Annotated[str | None, EVERYTHING] = None
    adapter: Annotated[Annotated[str, Field(min_length=1)] | None, EVERYTHING] = None
    reference: Annotated[Literal["base", "adapter"], EVALUATION] = "base"
    quantization: Annotated[Literal["nf4", "int8", "none"], EVERYTHING] = "nf4"
    double_quantization: Annotated[bool, EVERYTHING] = True
    dtype: Annotated[Literal["auto", DtypeName], EVALUATION] = "auto"
    device: Annotated[
        str, matching(r"auto|cpu|cuda(:\d+)?", "must be auto, cpu, cuda or cuda:N"), EVALUATION
    ] = "auto"
    context: Annotated[Annotated[int, Field(ge=8)] | None, EVERYTHING] = None
    threads: Annotated[Annotated[PositiveInt, at_most(1024)] | None, EVALUATION] = None
    attention: Annotated[Literal["sdpa", "eager", "flash_attention_2"], EVALUATION] = "sdpa"
    gradient_checkpointing: Annotated[Literal["auto"] | bool | NonNegativeInt, NO_RESULT] = True
    offload_checkpoints: Annotated[Literal["auto"] | bool, NO_RESULT] = False
    offload_embedding: Annotated[Literal["auto"] | bool, NO_RESULT] = False
    layout: Annotated[Literal["auto", "shared", "packed", "padded"], TRAINING] = "auto"
    fused_head: Annotated[bool, TRAINING] = True
    trust_remote_code: Annotated[bool, EVALUATION] = False
    lora: Annotated[LoraSettings, TRAINING] = LoraSettings()

    @property
    def loading_inputs(self) -> dict[str, Any]:
        """The settings that a loaded base depends on; the others apply to each policy anew."""
        anew = {
            "adapter", "reference", "context", "gradient_checkpointing", "offload_checkpoints",
            "layout", "fused_head", "lora",
        }  # fmt: skip
        return self.model_dump(exclude=anew)

    def resolved_device(self, *, cuda_available: bool) -> str:
        """The device to load the policy on: `auto` is the GPU where there is one."""
        if self.device != "auto":
            return self.device
        return "cuda" if cuda_available else "cpu"

    def resolved_dtype(self, device: str) -> DtypeName:
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
    def _backend_supports(self) -> PolicySettings:
        if self.backend == "transformers":
            return self
        supported: dict[str, list[Any]] = {
            "quantization": ["nf4", "none"],
            "double_quantization": [True],
            "attention": ["sdpa"],
            "gradient_checkpointing": [True, False],
            "offload_checkpoints": [True, False],
            "offload_embedding": [False],
            "layout": ["auto", "packed", "padded"],
        }
        # Compared as text: 1 equals True but is a number of layers.
        rules = [f"{name}: must be {' or '.join(map(short_repr, values))} "
                 f"with backend {self.backend}"
                 for name, values in supported.items()
                 if short_repr(getattr(self, name)) not in map(short_repr, values)]  # fmt: skip
        changed = {name for name, value in self.lora if value != getattr(LoraSettings(), name)}
        known = {"rank", "alpha", "dropout", "target_modules", "use_rslora"}
        rules += [f"lora.{name}: must be left out with backend {self.backend}"
                  for name in sorted(changed - known)]  # fmt: skip
        if rules:
            raise ValueError("\n".join(rules))
        return self


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class ColumnsSettings(Settings):
    """The columns of the data set; demonstrations may come from several columns.

    `a.b` is field `b` of a nested column `a`. Several columns of a problem are joined by line
    breaks, a list in one of them as options without letters. A list that is written as text (JSON
    or Python notation, as in CSV files) is read as a list. `choices` are appended to the problem as
    (A), (B), ...; the answer is, in this order, a label of the data set (field `label` beside
    `choices: x.text`, as in ARC), the number of a choice from 0, a letter, or a choice's text;
    other rows are skipped. `answer: null`: there are no answers. `answer_from`: the last box of
    the column (boxed), or the text after `####` (hash). `clean: gsm8k` removes `<<48/2=24>>` from
    demonstrations and boxes their `#### 24` line.
    `messages` holds conversations, as lists of {role, content} or ShareGPT's {from, value}: their
    system message and all turns up to the last user turn are the prompt, an assistant turn after
    it is an expert demonstration. A list of messages in `problem` is a prompt too. Where no column
    is named, and the data have no column `problem`, columns `messages`, `conversations`, or TRL's
    `prompt` and `completion` or `chosen`, are found by their names; the answers are then in
    `answer` if that exists.
    """

    problem: str | list[str] = "problem"
    messages: str | None = None
    choices: str | None = None
    answer: str | None = "answer"
    answer_from: Literal["plain", "boxed", "hash"] = "plain"
    expert: Annotated[list[str], BeforeValidator(_as_list)] = []
    teacher: Annotated[list[str], BeforeValidator(_as_list)] = []
    id: str | None = None
    clean: Literal["gsm8k"] | None = None

    @model_validator(mode="after")
    def _one_source_of_problems(self) -> ColumnsSettings:
        if self.messages is not None and (self.choices or self.problem != "problem"):
            raise ValueError("messages: must be null with columns.problem or columns.choices")
        return self

    @property
    def found_by_name(self) -> bool:
        """True if no column of problems or demonstrations is named."""
        return self.messages is None and not (
            self.choices or self.expert or self.teacher or self.problem != "problem"
        )

    @property
    def may_demonstrate(self) -> bool:
        """True if rows may have demonstrations: in named columns, or in conversations."""
        return bool(self.expert or self.teacher or self.messages or self.found_by_name)


# Arguments of transformers' apply_chat_template, and what it passes to the template itself.
_TEMPLATE_ARGUMENTS = {
    "conversation", "conversations", "messages", "tools", "documents", "chat_template",
    "add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation",
    "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs", "self",
}  # fmt: skip


class PromptSettings(Settings):
    """The prompt of a problem: plain text, or a user turn in the chat template.

    `template` is applied to every user turn. A conversation's own system message takes the place
    of `system`. `chat_template_kwargs` are variables of the chat template, such as
    `enable_thinking: false`.
    """

    style: Literal["plain", "chat"] = "plain"
    template: str = "{problem}"
    system: str | None = None
    chat_template_kwargs: dict[str, JsonValue] = {}

    @model_validator(mode="after")
    def _template_has_problem(self) -> PromptSettings:
        if "{problem}" not in self.template:
            raise ValueError("template: must contain {problem}")
        if self.system is not None and self.style == "plain":
            raise ValueError("system: needs prompt.style: chat")
        if self.chat_template_kwargs and self.style == "plain":
            raise ValueError("chat_template_kwargs: needs prompt.style: chat")
        if own := sorted(_TEMPLATE_ARGUMENTS & self.chat_template_kwargs.keys()):
            rule = "must be a variable of the chat template, not an argument of its rendering"
            raise ValueError(f"chat_template_kwargs.{own[0]}: {rule}")
        return self


class DataSettings(Settings):
    """The source of problems: the built-in `lab`, a JSONL/parquet/CSV file, or a hub data set.

    `file` is one file of a hub data set whose files are not assigned to splits. `skip` leaves out
    the first usable rows, in the order of the seed, and copies of their problems.
    """

    source: Annotated[str, EVERYTHING] = "lab"
    file: Annotated[str | None, EVERYTHING] = None
    config: Annotated[str | None, EVERYTHING] = None
    split: Annotated[str, EVERYTHING] = "train"
    revision: Annotated[str | None, EVERYTHING] = None
    columns: Annotated[ColumnsSettings, EVERYTHING] = ColumnsSettings()
    prompt: Annotated[PromptSettings, EVERYTHING] = PromptSettings()
    max_prompt_tokens: Annotated[PositiveInt | None, EVERYTHING] = None
    problems: Annotated[PositiveInt | None, EVERYTHING] = None
    skip: Annotated[NonNegativeInt, EVERYTHING] = 0
    shuffle: Annotated[bool, EVERYTHING] = True
    seed: Annotated[int, EVERYTHING] = 0


# A class body can't have a field named `from`.
_FROM: dict[str, Any] = {"from": (str, Field(min_length=1))}
_Answers = create_model("_Answers", __base__=Settings, **_FROM)


class DifficultySettings(_Answers):  # type: ignore[valid-type, misc]
    """The problems to train on, by the success share of answers that were sampled before.

    `from` is a folder of `gft-lite groups`, or one of `gft-lite eval` with answers to the training
    problems. Problems with a success share from `low` to `high` are kept, and those without
    sampled answers are left out.
    """

    low: Annotated[float, Field(ge=0, le=1)] = 0.1
    high: Annotated[float, Field(ge=0, le=1)] = 0.9

    @model_validator(mode="after")
    def _low_is_low(self) -> DifficultySettings:
        if self.low > self.high:
            raise ValueError(f"low: must be at most high, {self.high:g}")
        return self

    @property
    def folder(self) -> str:
        """The value of `from`."""
        return str(getattr(self, "from"))


class TrainingDataSettings(DataSettings):
    """The training data; `holdout` problems of it are used for monitoring only.

    `difficulty` selects problems by the success share of sampled answers, and `curriculum` orders
    each epoch by it: `easy_first`, or `mixed`, where each step has problems of all success shares.
    Held-out problems are not selected.
    """

    holdout: Annotated[NonNegativeInt, EVERYTHING] = 64
    difficulty: Annotated[DifficultySettings | None, TRAINING] = None
    curriculum: Annotated[Literal["easy_first", "mixed"] | None, TRAINING] = None

    @model_validator(mode="after")
    def _curriculum_knows_difficulty(self) -> TrainingDataSettings:
        if self.curriculum and self.difficulty is None:
            raise ValueError("curriculum: needs data.difficulty, by which problems are ordered")
        return self


class GroupSettings(Settings):
    """The number of responses of a group from each source.

    `shortfall` replaces missing demonstrations by self samples or by repetition, or drops the
    problem. `offline` is a folder of `gft-lite groups`, whose groups were sampled before training
    from the base or `policy.adapter`; training samples none then.
    """

    expert: Annotated[NonNegativeInt, at_most(10_000), SAMPLING] = 1
    teacher: Annotated[NonNegativeInt, at_most(10_000), SAMPLING] = 3
    self: Annotated[NonNegativeInt, at_most(10_000), SAMPLING] = 4
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


def _none_is_auto(value: Any) -> Any:
    return "auto" if value is None else value  # Recipes of earlier runs have null.


class RolloutSettings(Settings):
    """The engine that samples the self responses, and its sampling parameters.

    `base` is the model that vLLM serves: a copy with the trainer's dequantised weights, the
    published weights, or these quantised by vLLM's `plugin` for bitsandbytes. `gpu_memory` is
    vLLM's share of the card, by default decided by the memory plan; with `sleep`, vLLM frees it
    during training. `kv_cache_mib` is the size of vLLM's KV cache: `auto` is what the share leaves
    of a card, and on a CPU room for `batch_size` responses of the context's length within a quarter
    of the free RAM. `batch_size` is the number of responses that are sampled at once; `auto` is
    decided by the memory plan, 128 without one. `resample` is how many times flat groups are
    replaced by groups of other problems. `eager` does without CUDA graphs, which make tokens
    faster and take memory and time at the start. `dtype` is the precision in which vLLM computes:
    `auto` is the policy's, but bfloat16 on a CPU with instructions for it. `servers` are addresses
    of vLLM servers for engine `vllm_server`, used in turn, which read adapters under the same path;
    without addresses, a server is started on this machine. `probe_limit`, in nats per token, is the
    largest accepted difference between the log-probs of engine and trainer.
    """

    engine: Annotated[str, named_in(ENGINE_NAMES), EVALUATION] = "auto"
    servers: Annotated[
        list[Annotated[str, matching(r"https?://\S+", "must be an http(s) address")]],
        BeforeValidator(_as_list),
        NO_RESULT,
    ] = []
    temperature: Annotated[Temperature, SAMPLING] = 1.0
    top_p: Annotated[Share, SAMPLING] = 1.0
    top_k: Annotated[NonNegativeInt, SAMPLING] = 0
    max_tokens: Annotated[PositiveInt, EVERYTHING] = 1024
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]], BeforeValidator(_as_list), EVERYTHING
    ] = []
    batch_size: Annotated[
        Literal["auto"] | Annotated[PositiveInt, at_most(1_000_000)], NO_RESULT
    ] = 128
    resample: Annotated[NonNegativeInt, at_most(1000), TRAINING] = 0
    base: Annotated[Literal["nf4_dequantised", "original", "plugin"], EVALUATION] = (
        "nf4_dequantised"
    )
    dtype: Annotated[Literal["auto", DtypeName], EVALUATION] = "auto"
    gpu_memory: Annotated[Literal["auto"] | Annotated[float, Field(gt=0, lt=1)], NO_RESULT] = "auto"
    kv_cache_mib: Annotated[
        Literal["auto"] | PositiveInt, BeforeValidator(_none_is_auto), NO_RESULT
    ] = "auto"
    eager: Annotated[bool, NO_RESULT] = False
    sleep: Annotated[bool, NO_RESULT] = True
    probe_limit: Annotated[PositiveFloat, NO_RESULT] = 0.2

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
