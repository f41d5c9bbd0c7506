"""The section `policy`: the model that is trained, and how it is computed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from gft_lite.recipe.base import Settings, at_most, matching
from gft_lite.recipe.effects import EVALUATION, EVERYTHING, NO_RESULT, TRAINING
from gft_lite.recipe.lora_section import LoraSettings
from gft_lite.utils.errors import short_repr

DtypeName = Literal["bfloat16", "float16", "float32"]


class PolicySettings(Settings):
    """The model that is trained: a frozen, quantised base and an adapter."""

    backend: Annotated[Literal["transformers", "unsloth"], EVALUATION] = "transformers"
    """Library that computes the policy; `unsloth` needs a CUDA GPU, and has its own attention and
    recomputation."""
    model: Annotated[str, EVERYTHING] = "lab"
    """The base: a hub id, the folder of a model, or `lab`, the tiny base in the package."""
    revision: Annotated[str | None, EVERYTHING] = None
    """Branch, tag or commit of a hub model; null: its default branch."""
    adapter: Annotated[Annotated[str, Field(min_length=1)] | None, EVERYTHING] = None
    """PEFT adapter to continue, a folder or a hub id; its settings must be those of `policy.lora`.
    null: a new adapter."""
    reference: Annotated[Literal["base", "adapter"], EVALUATION] = "base"
    """What KL is measured to: the base, or the base with `policy.adapter` as it was given."""
    quantization: Annotated[Literal["nf4", "int8", "none"], EVERYTHING] = "nf4"
    """Storage of the base's linear weights: 4 bits (NF4), 8 bits, or unquantised in `policy.dtype`.
    A model that is published quantised needs its own kind."""
    double_quantization: Annotated[bool, EVERYTHING] = True
    """Quantise NF4's scales too, which saves 0.37 bits per weight."""
    dtype: Annotated[Literal["auto", DtypeName], EVALUATION] = "auto"
    """Precision of activations and unquantised weights; `auto`: float32 on a CPU, bfloat16 on a
    GPU. The adapter is trained in float32."""
    device: Annotated[
        str, matching(r"auto|cpu|cuda(:\d+)?", "must be auto, cpu, cuda or cuda:N"), EVALUATION
    ] = "auto"
    """Where the policy is trained: `cpu`, `cuda` or `cuda:N`; `auto`: the GPU if there is one."""
    context: Annotated[Annotated[int, Field(ge=8)] | None, EVERYTHING] = None
    """Most tokens of prompt and response together; null: the model's own limit. A lower value
    saves memory, mostly of the engine's KV cache."""
    threads: Annotated[Annotated[PositiveInt, at_most(1024)] | None, EVALUATION] = None
    """CPU threads of torch; null: OMP_NUM_THREADS, or else the physical cores that affinity and
    cgroup leave to this process, at most 16."""
    attention: Annotated[Literal["sdpa", "eager", "flash_attention_2"], EVALUATION] = "sdpa"
    """Attention implementation of transformers. Only `sdpa` allows layout `shared`; `eager` is for
    models that lack `sdpa`."""
    gradient_checkpointing: Annotated[Literal["auto"] | bool | NonNegativeInt, NO_RESULT] = True
    """Recompute all layers (true), the first N or none (false) in the backward pass: less memory,
    more time. `auto`: the memory plan decides."""
    offload_checkpoints: Annotated[Literal["auto"] | bool, NO_RESULT] = False
    """Keep what the backward pass needs of the layers in RAM instead of on the GPU. `auto`: the
    memory plan decides."""
    offload_embedding: Annotated[Literal["auto"] | bool, NO_RESULT] = False
    """Keep the input embedding in RAM, which needs an output head with weights of its own. `auto`:
    the memory plan decides."""
    layout: Annotated[Literal["auto", "shared", "packed", "padded"], TRAINING] = "auto"
    """Rows of a micro-batch: `shared` computes a prompt once for all its responses, `packed`
    concatenates rows, `padded` stacks them; `auto`: the first that the model supports."""
    fused_head: Annotated[bool, TRAINING] = True
    """Compute log-probs and their gradient together in chunks of the output head, which takes less
    memory than autograd. Losses with an exact KL (asft), and heads with a bias, do without it."""
    trust_remote_code: Annotated[bool, EVALUATION] = False
    """Run Python code from the model's repository. Set it only for a repository that you trust."""
    lora: Annotated[LoraSettings, TRAINING] = LoraSettings()
    """The adapter: its rank, its scale and the modules it adapts."""

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
