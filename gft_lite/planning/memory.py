"""Peak memory of training and of rollouts, by formulas.

test_memory_measured.py compares them with measured peaks. What is marked "estimate" is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from gft_lite.objective.methods import METHODS
from gft_lite.planning import cpu_process
from gft_lite.planning.kv_cache import cpu_kv_cache, kv_bytes_per_token, smallest_kv_cache
from gft_lite.planning.model_shape import ModelShape
from gft_lite.recipe.schema import Recipe
from gft_lite.utils.cpu import has_bf16_instructions
from gft_lite.utils.memory import GIB, HEAD_TILE_WORDS, LOGIT_CHUNK_BYTES, head_tile_bytes

CUDA_CONTEXT_BYTES = int(0.6 * GIB)  # Estimate: CUDA context and workspaces of its libraries.
# Estimate: memory that torch's CUDA allocator holds beyond the memory in use, as a share of it.
FRAGMENTATION = 0.08
VLLM_PROFILE_TOKENS = 8192  # Estimate: tokens of the forward that vLLM profiles at its start.
CUDA_GRAPH_BYTES = int(0.6 * GIB)  # Estimate: vLLM's CUDA graphs with LoRA, kept during sleep.
VLLM_SLEEP_BYTES = int(0.3 * GIB)  # Estimate: what else vLLM keeps on the card during sleep.
Device = Literal["cuda", "cpu"]
Components = dict[str, int]  # Bytes by component.


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch: all its tokens, its response tokens, and the keys that attention gathers.

    `mask_cells` are the cells of the attention masks that each layer saves for the backward pass
    (CPU only).
    """

    tokens: int
    targets: int
    keys: int
    mask_cells: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """A value for every setting that the plan decides.

    `gradient_checkpointing` is a number of layers, `gpu_memory` vLLM's share of the card, 0
    without vLLM.
    """

    micro_batch_tokens: int
    gradient_checkpointing: int
    offload_checkpoints: bool
    offload_embedding: bool
    engine: str
    batch_size: int
    gpu_memory: float = 0.0


@dataclass(frozen=True)
class MemoryModel:
    """Bytes that the training of a model by a recipe takes on a kind of device.

    `card` is the GPU's whole memory in bytes, of which vLLM takes a share; on a CPU it is the RAM
    that may be used. What all the choices of a plan share is computed once.
    """

    shape: ModelShape
    recipe: Recipe
    device: Device
    card: int = 0

    @cached_property
    def element(self) -> int:
        """Bytes of an activation and of an unquantised weight."""
        return 4 if self.recipe.policy.resolved_dtype(self.device) == "float32" else 2

    @cached_property
    def engine_element(self) -> int:
        """Bytes of an unquantised weight of vLLM."""
        dtype = self.recipe.rollout.resolved_dtype(
            self.recipe.policy.resolved_dtype(self.device), self.device,
            cpu_has_bf16=has_bf16_instructions(),
        )  # fmt: skip
        return 4 if dtype == "float32" else 2

    @property
    def quantized(self) -> bool:
        """True if the trainer's linears are quantised."""
        return self.recipe.policy.quantization != "none"

    @property
    def context(self) -> int:
        """Tokens of the longest sequence that the model accepts."""
        return min(self.recipe.policy.context or self.shape.context, self.shape.context)

    @cached_property
    def prompt(self) -> int:
        """Tokens of the longest prompt."""
        available = max(1, self.context - self.recipe.rollout.max_tokens - 1)
        return min(self.recipe.data.max_prompt_tokens or available, available)

    @property
    def longest_row(self) -> int:
        """Tokens of the longest prompt with its longest response."""
        return min(self.context, self.prompt + self.recipe.rollout.max_tokens)

    @cached_property
    def adapter_ranks(self) -> dict[str, list[int]]:
        """The ranks of the adapter: of each linear in the layers where it is adapted."""
        return self.shape.adapter_ranks(self.recipe.policy.lora)

    @cached_property
    def lora_parameters(self) -> int:
        """Parameters of the adapter."""
        dora, linears = self.recipe.policy.lora.use_dora, self.shape.linears
        ranks = ((linears[n], r) for n, found in self.adapter_ranks.items() for r in found)
        return sum(rank * sum(sizes) + dora * sizes[1] for sizes, rank in ranks)

    # --- permanent memory ------------------------------------------------------------------

    def base(self, offload_embedding: bool) -> int:
        """Bytes of the frozen base.

        NF4 takes half a byte a weight and a scale per 64 weights: fp32, or with double
        quantisation a byte, and an fp32 scale per 256 scales (arXiv 2305.14314).
        """
        policy, n = self.recipe.policy, self.shape.linear_parameters
        plain = self.shape.plain_parameters
        if offload_embedding and not self.shape.tied:
            plain -= self.shape.embedding_parameters
        if policy.quantization == "nf4":
            scales = 1 / 64 + 4 / (64 * 256) if policy.double_quantization else 4 / 64
            return int(n * (0.5 + scales)) + plain * self.element
        if policy.quantization == "int8":
            rows = self.shape.layers * sum(o for _, o in self.shape.linears.values())
            return n + 4 * rows + plain * self.element
        return (n + plain) * self.element

    def optimizer(self, *, gradients: bool) -> int:
        """Bytes of AdamW's two states in fp32 or 8 bits, and of the gradients on request."""
        paged = self.recipe.optim.is_paged(self.device)
        return self.lora_parameters * ((2 if paged else 8) + 4 * gradients)

    # --- training --------------------------------------------------------------------------

    def batch(self, budget: int) -> Batch:
        """The largest micro-batch under a token budget, of response tokens only.

        The keys are those of responses of half the maximum length, each after its prompt, where
        attention gathers the keys of a prompt for every response that shares it.
        """
        recipe, half = self.recipe, max(1, self.recipe.rollout.max_tokens // 2)
        size = recipe.group.size
        group_tokens = self.prompt + size * recipe.rollout.max_tokens
        problems = math.ceil(recipe.train.problems_per_step / recipe.train.updates_per_rollout)
        tokens = max(self.longest_row, min(budget, problems * group_tokens))
        keys, cells = 1.0, 0.0
        if recipe.policy.layout in ("auto", "shared") and size > 1:
            group = self.prompt + size * half
            keys = (group + size * self.prompt) / group
            cells = half * (self.prompt + half) / group
        return Batch(tokens, tokens, int(keys * tokens), int(cells * tokens))

    def saved_activations(self, batch: Batch) -> int:
        """Bytes that a layer without recomputation saves for its backward pass."""
        s, e = self.shape, self.element
        query, key = s.heads * s.head_size, s.kv_heads * s.head_size
        ranks = self.adapter_ranks
        rank = sum(map(sum, ranks.values())) // s.layers  # The mean of the layers.
        norms = (4 if s.sandwich else 2) * (4 * s.hidden + 4)  # fp32 inputs, and a factor each.
        if s.qk_norm:
            norms += 4 * (query + key) + 4 * (s.heads + s.kv_heads)
        # Norm outputs, query, attention output and its log-sums, four tensors of the MLP, LoRA.
        per_token = norms + e * (2 * s.hidden + 2 * query + 4 * s.mlp + rank) + 4 * s.heads
        mask = e if self.device == "cpu" else 1
        if s.fused:
            per_token += 2 * mask * s.hidden  # Masks of two dropouts, at a probability of 0 too.
        dropout = self.recipe.policy.lora.dropout
        if self.device == "cpu" and self.recipe.policy.layout != "padded" and not dropout:
            per_token += e * query  # The attention output in tiles and in order.
        if dropout:
            # Each linear saves its own input after dropout and a mask, not a shared input.
            inputs = sum(i * len(ranks[name]) for name, (i, _) in s.linears.items()) // s.layers
            per_token += (e + mask) * inputs - e * (2 * s.hidden + s.mlp)
        masks = e * batch.mask_cells if self.device == "cpu" else 0
        return per_token * batch.tokens + 2 * e * key * batch.keys + masks

    def peak_candidates(self, choice: Choice, batch: Batch) -> dict[str, Components]:
        """Bytes of a micro-batch at the three moments one of which is the peak.

        They are the output head, the backward pass of the last norm, and that of the last layer.
        Permanent memory is not included.
        """
        s, e, t = self.shape, self.element, batch.tokens
        recomputed = min(choice.gradient_checkpointing, s.layers)
        kept = s.layers - recomputed
        on_device = min(recomputed, 2) if choice.offload_checkpoints else recomputed
        checkpoints = on_device * e * s.hidden * t
        saved = self.saved_activations(batch)
        norm = (4 * s.hidden + 4) * t
        # The embedding has no gradient, so the first norm of the first layer saves nothing.
        trunk = kept * saved - (0 if recomputed else norm)
        # The input of the head and its gradient, and the reference's input for an exact KL.
        states = (3 if self._exact_kl else 2) * e * s.hidden * batch.targets
        in_layer = 2 * e * s.mlp + (2 * s.hidden if e == 2 else 0)
        # Gradients through two dropouts; the input of the last norm, which is done with by then.
        in_layer += 2 * e * s.hidden * s.fused - (4 * s.hidden + 4) * s.sandwich
        return {
            "head": {
                "checkpoints": checkpoints,
                "activations": trunk + norm,
                "head": states + self.head(batch),
            },
            "norm": {
                "checkpoints": checkpoints,
                "activations": trunk + 24 * s.hidden * t,
                "head": states,
            },
            "layer": {
                "checkpoints": checkpoints,
                "activations": (trunk or saved) + in_layer * t,
                "head": states,
            },
        }

    @cached_property
    def _exact_kl(self) -> bool:
        method = METHODS.get(self.recipe.method)
        return method is not None and "reference_kl" in method.needs

    def head(self, batch: Batch) -> int:
        """Bytes of the logits of a chunk of tokens, and of what is computed from them in fp32."""
        words = self.shape.vocabulary
        copies = 6 if self._exact_kl else 3 if self.recipe.policy.fused_head else 5
        if copies == 3 and words > HEAD_TILE_WORDS and not self.recipe.objective.entropy:
            return head_tile_bytes(self.device, self.element, batch.targets, self.shape.hidden)
        return copies * 4 * words * min(batch.targets, max(1, LOGIT_CHUNK_BYTES // (4 * words)))

    def training(self, choice: Choice, batch: Batch | None = None) -> Components:
        """Bytes by component at the peak of training, with what vLLM keeps on the card."""
        batch = batch or self.batch(choice.micro_batch_tokens)
        candidates = self.peak_candidates(choice, batch)
        peak = max(candidates.values(), key=lambda parts: sum(parts.values()))
        parameters = self.lora_parameters
        # Autocast's copies of the adapter, in the layers that are not recomputed.
        copied = max(self.shape.layers - choice.gradient_checkpointing, 1) / self.shape.layers
        own = {
            "base": self.base(choice.offload_embedding),
            "lora": 4 * parameters + (int(2 * parameters * copied) if self.element == 2 else 0),
            "optimiser": self.optimizer(gradients=True),
            **peak,
        }
        engine: Components = {}
        if self.shares_device(choice):
            asleep = VLLM_SLEEP_BYTES + (0 if self.recipe.rollout.eager else CUDA_GRAPH_BYTES)
            engine = {"engine": asleep} if self.sleeps else self.engine(choice)
        return own | engine | self._overhead(own, self._fragmentation(batch))

    def _fragmentation(self, batch: Batch) -> int:
        """Bytes that glibc's heap holds beyond the blocks of a micro-batch in use (CPU only).

        For many tokens the MLP's activations don't come from the heap, for still more none do.
        """
        limit, token = cpu_process.LARGEST_HEAP_BLOCK, self.element * batch.tokens
        mapped = 4 * token * self.shape.mlp if token * self.shape.mlp > limit else 0
        blocks = 0 if token * self.shape.hidden > limit else self.saved_activations(batch) - mapped
        return int(cpu_process.HEAP_FACTOR * self.shape.layers * blocks)

    def _overhead(self, own: Components, fragmentation: int = 0) -> Components:
        """Bytes that libraries and the allocator take beyond `own`."""
        if self.device == "cpu":
            return {
                "process": cpu_process.process(self.shape),
                "file": cpu_process.mapped_file(self.shape, self.element, quantized=self.quantized),
                "fragmentation": fragmentation,
            }
        return {
            "context": CUDA_CONTEXT_BYTES,
            "fragmentation": int(FRAGMENTATION * sum(own.values())),
        }

    def loading(self, choice: Choice) -> Components:
        """Bytes by component while the base is loaded; on a GPU never the peak."""
        if self.device != "cpu":
            return {}
        base = self.base(choice.offload_embedding)
        return cpu_process.loading(self.shape, self.element, base, quantized=self.quantized)

    # --- rollouts --------------------------------------------------------------------------

    @property
    def kv_per_token(self) -> int:
        """Bytes of the keys and values of one token in all layers, in the trainer's precision."""
        return self._kv_per_token(self.element)

    def _kv_per_token(self, element: int) -> int:
        s = self.shape
        return kv_bytes_per_token(s.layers, s.kv_heads, s.head_size, element)

    def rollout(self, choice: Choice) -> Components:
        """Bytes by component at the peak of a rollout, with the trainer's permanent memory."""
        own = {
            "base": self.base(choice.offload_embedding),
            "lora": 4 * self.lora_parameters,
            "optimiser": self.optimizer(gradients=False),
        }
        if self.shares_device(choice) and self.device == "cuda":
            # Estimate: the forward pass without gradient of one row, for the check of a sync.
            s, e = self.shape, self.element
            own["activations"] = self.longest_row * (3 * e * (s.mlp + s.hidden) + 8 * s.hidden)
            own["head"] = 3 * LOGIT_CHUNK_BYTES
        engine = self.engine(choice)
        allocated_by_torch = own | engine if choice.engine == "transformers" else own
        return own | engine | self._overhead(allocated_by_torch)

    def shares_device(self, choice: Choice) -> bool:
        """True if the run starts a vLLM on the trainer's device."""
        own_server = choice.engine == "vllm_server" and not self.recipe.rollout.servers
        return choice.engine in ("vllm", "unsloth") or own_server

    @property
    def sleeps(self) -> bool:
        """True if vLLM frees the card's memory during training."""
        rollout = self.recipe.rollout
        return self.device == "cuda" and rollout.sleep and rollout.engine != "unsloth"

    @property
    def engine_weights(self) -> int:
        """Bytes of vLLM's copy of the base, which is in RAM during sleep."""
        if self.recipe.rollout.engine == "unsloth":
            return 0  # It shares the trainer's weights.
        if self.recipe.rollout.base == "plugin":
            return self.base(False)
        return (self.shape.linear_parameters + self.shape.plain_parameters) * self.engine_element

    def engine(self, choice: Choice) -> Components:
        """Bytes of the engine by component; vLLM on CUDA takes its share of the card."""
        if choice.engine == "transformers":
            return self._transformers_engine(choice.batch_size)
        if not self.shares_device(choice):
            return {}
        s, e, settings = self.shape, self.engine_element, self.recipe.rollout
        if self.device == "cpu":
            workspace = cpu_process.vllm(s, e)
            workspace += cpu_process.process(s) if choice.engine == "vllm_server" else 0
        else:
            workspace = VLLM_PROFILE_TOKENS * e * 3 * (s.mlp + s.hidden)
            workspace += choice.batch_size * s.vocabulary * 4 * 3
            workspace += 0 if settings.eager else CUDA_GRAPH_BYTES
            workspace += CUDA_CONTEXT_BYTES if choice.engine == "vllm_server" else 0
        taken = self.engine_weights + workspace
        if settings.kv_cache_mib != "auto":
            kv = settings.kv_cache_mib << 20
        elif self.device == "cuda":
            kv = max(0, int(choice.gpu_memory * self.card) - taken)
        else:
            per_token = self._kv_per_token(e)
            wanted = cpu_kv_cache(per_token, self.longest_sample, choice.batch_size, self.card)
            kv = max(wanted, smallest_kv_cache(per_token, self.context))
        return {"engine": taken, "kv_cache": kv}

    @property
    def smallest_cache(self) -> int:
        """Bytes of one sequence of the context's length, without which vLLM does not start."""
        return self._kv_per_token(self.engine_element) * self.context

    @property
    def longest_sample(self) -> int:
        """Tokens of the longest prompt with the longest response of rollouts and evaluations."""
        longest = max(self.recipe.rollout.max_tokens, self.recipe.eval.max_tokens or 0)
        return min(self.context, self.prompt + longest)

    def largest_cache(self, rows: int) -> int:
        """Bytes of `rows` sequences of the greatest length; a larger cache has no use."""
        return self.kv_per_token * rows * self.longest_sample

    def _transformers_engine(self, rows: int) -> Components:
        """Bytes of generation with the trainer's model: at its first or at its last forward.

        The first one computes the prompts, the last one has all keys and values.
        """
        s, e = self.shape, self.element
        cache = self.largest_cache(rows)
        # Logits in the model's dtype and in fp32; on the CPU, probabilities in fp64.
        drawing = rows * s.vocabulary * (e + 4 if self.device == "cuda" else 4 + 2 * 8 + 1)
        candidates: list[Components] = [
            {
                "engine": rows * self.prompt * 4 * e * (s.mlp + s.hidden),
                "kv_cache": self.kv_per_token * rows * self.prompt,
            },
            # The cache of a layer grows by copying it.
            {"engine": drawing, "kv_cache": cache + cache // (2 * s.layers)},
        ]
        return max(candidates, key=lambda parts: sum(parts.values()))
