"""What training and rollouts take of the memory, by formulas.

No torch here, so that `gft-lite plan` answers at once. tests/integration/test_memory_measured.py
holds the formulas against measured peaks; what is marked as an estimate was not measured.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from gft_lite.objective.methods import METHODS
from gft_lite.planning.model_shape import ModelShape
from gft_lite.recipe.schema import Recipe
from gft_lite.utils.errors import RecipeError, nearest
from gft_lite.utils.memory import GIB, LOGIT_CHUNK_BYTES

CONTEXT = int(0.6 * GIB)  # Estimate: CUDA's context and its libraries' workspaces.
FRAGMENTATION = 0.08  # Estimate: what torch's allocator on CUDA holds beyond what is in use.
# glibc keeps freed blocks of up to 32 MiB: the most that we measured, of what a micro-batch takes.
# With MALLOC_MMAP_THRESHOLD_=65536 there is none of it, and steps take half as long again.
HEAP = 2.5
ENGINE_TOKENS = 8192  # Estimate: vLLM tries a forward of so many tokens when it starts.
GRAPHS = int(0.6 * GIB)  # Estimate: vLLM's CUDA graphs with LoRA, which stay while it sleeps.
ASLEEP = int(0.3 * GIB)  # Estimate: what else it keeps on the card then.
# Estimates: GiB that the driver leaves of the nominal size, rounded down.
GPUS = {
    "rtx3060": 12, "rtx3090": 24, "rtx4060": 8, "rtx4070": 12, "rtx4080": 16, "rtx4090": 24,
    "rtx5080": 16, "rtx5090": 32, "t4": 15, "l4": 22, "a10": 22, "l40s": 44, "a6000": 48,
    "a100-40": 39, "a100": 79, "h100": 79, "h200": 139,
}  # fmt: skip

Device = Literal["cuda", "cpu"]
Components = dict[str, int]


def parse_size(text: str, field: str = "--gpu") -> int:
    """Bytes of a size such as 8GiB or 24GB, or of a GPU's memory by its name."""
    if found := re.fullmatch(r"(\d+(?:\.\d+)?) ?([GM])(i?)B", text, re.IGNORECASE):
        unit = 1024 if found[3] else 1000
        return int(float(found[1]) * unit ** (3 if found[2] in "gG" else 2))
    name = text.lower().replace(" ", "")
    if name in GPUS:
        return GPUS[name] * GIB
    close = nearest(name, GPUS)
    hint = f"Did you mean {close}?" if close else f"Known names: {', '.join(GPUS)}."
    rule = "must be a size such as 24GiB or a GPU's name"
    raise RecipeError([f"{field}: {rule}, got {text!r}. {hint}"])


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch: its tokens, those of responses, and the keys that attention gathers.

    `mask_cells` are cells of the masks that each layer keeps for its backward (CPU only).
    """

    tokens: int
    targets: int
    keys: int
    mask_cells: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """The settings that the plan is about; `gradient_checkpointing` is a number of layers,
    `gpu_memory` is vLLM's share of the card, 0 where it has none."""

    micro_batch_tokens: int
    gradient_checkpointing: int
    offload_checkpoints: bool
    offload_embedding: bool
    engine: str
    batch_size: int
    gpu_memory: float = 0.0


@dataclass(frozen=True, slots=True)
class Job:
    """A recipe's training of a model on a kind of device: all bytes follow from it.

    T are the tokens of a micro-batch, L the model's layers, e the bytes of an element; `card` is
    the GPU's whole memory, of which vLLM takes a share.
    """

    shape: ModelShape
    recipe: Recipe
    device: Device
    card: int = 0

    @property
    def element(self) -> int:
        """Bytes of an activation, and of a weight that isn't quantised."""
        return 4 if self.recipe.policy.resolved_dtype(self.device) == "float32" else 2

    @property
    def context(self) -> int:
        """The most tokens of prompt and response together."""
        return min(self.recipe.policy.context or self.shape.context, self.shape.context)

    @property
    def prompt(self) -> int:
        """The most tokens of a prompt."""
        room = max(1, self.context - self.recipe.rollout.max_tokens - 1)
        return min(self.recipe.data.max_prompt_tokens or room, room)

    @property
    def longest_row(self) -> int:
        """The most tokens of a prompt with one response."""
        return min(self.context, self.prompt + self.recipe.rollout.max_tokens)

    @property
    def lora_parameters(self) -> int:
        """Parameters of the adapter."""
        lora = self.recipe.policy.lora
        sizes = [i + o for name, (i, o) in self.shape.linears.items() if self._adapted(name)]
        return lora.rank * self.shape.layers * sum(sizes)

    def _adapted(self, name: str) -> bool:
        targets = self.recipe.policy.lora.target_modules
        return targets == "all-linear" or any(name == t.rpartition(".")[2] for t in targets)

    # --- what stays ------------------------------------------------------------------------

    def base(self, offload_embedding: bool) -> int:
        """The frozen base. NF4: half a byte, and a scale for each 64 weights: in fp32, or a
        byte and an fp32 scale of scales for each 256."""
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

    def optimiser(self, *, gradients: bool) -> int:
        """AdamW's two states in fp32, or in 8 bits; and the gradients while there are any."""
        paged = self.recipe.optim.is_paged(self.device)
        return self.lora_parameters * ((2 if paged else 8) + 4 * gradients)

    # --- training --------------------------------------------------------------------------

    def batch(self, budget: int) -> Batch:
        """The largest micro-batch that a token budget makes, taken to be all responses.

        Responses half as long as they may be, with a prompt before each: that many keys does
        attention gather where a prompt's responses share it.
        """
        recipe, half = self.recipe, max(1, self.recipe.rollout.max_tokens // 2)
        size = recipe.group.size
        whole = self.prompt + size * recipe.rollout.max_tokens
        problems = math.ceil(recipe.train.problems_per_step / recipe.train.updates_per_rollout)
        tokens = max(self.longest_row, min(budget, problems * whole))
        keys, cells = 1.0, 0.0
        if recipe.policy.layout in ("auto", "shared") and size > 1:
            group = self.prompt + size * half
            keys = (group + size * self.prompt) / group
            cells = half * (self.prompt + half) / group
        return Batch(tokens, tokens, int(keys * tokens), int(cells * tokens))

    def saved(self, batch: Batch) -> int:
        """What one layer keeps for its backward when it isn't recomputed."""
        s, e = self.shape, self.element
        query, key = s.heads * s.head_size, s.kv_heads * s.head_size
        rank = self.recipe.policy.lora.rank * sum(map(self._adapted, s.linears))
        norms = 2 * (4 * s.hidden + 4)  # Each keeps its input and a factor, in fp32.
        if s.qk_norm:
            norms += 4 * (query + key) + 4 * (s.heads + s.kv_heads)
        # Norm outputs, query, attention output and its log-sums, four tensors of the MLP, LoRA.
        per_token = norms + e * (2 * s.hidden + 2 * query + 4 * s.mlp + rank) + 4 * s.heads
        dropout = self.recipe.policy.lora.dropout
        if self.device == "cpu" and self.recipe.policy.layout != "padded" and not dropout:
            per_token += e * query  # The output in tiles, beside the one in order.
        if dropout:
            # Each linear keeps its own input after dropout, and a mask, in place of a shared one.
            inputs = sum(i for name, (i, _) in s.linears.items() if self._adapted(name))
            mask = e if self.device == "cpu" else 1
            per_token += (e + mask) * inputs - e * (2 * s.hidden + s.mlp)
        masks = e * batch.mask_cells if self.device == "cpu" else 0
        return per_token * batch.tokens + 2 * e * key * batch.keys + masks

    def moments(self, choice: Choice, batch: Batch) -> dict[str, Components]:
        """What a micro-batch takes beside what stays, when the head runs, when the last norm's
        backward runs, and when that of the last layer does; one of them is the peak."""
        s, e, t = self.shape, self.element, batch.tokens
        recomputed = min(choice.gradient_checkpointing, s.layers)
        kept = s.layers - recomputed
        waiting = min(recomputed, 2) if choice.offload_checkpoints else recomputed
        checkpoints = waiting * e * s.hidden * t
        saved = self.saved(batch)
        norm = (4 * s.hidden + 4) * t
        # The embedding has no gradient, and so the first layer's first norm keeps nothing.
        trunk = kept * saved - (0 if recomputed else norm)
        # What the head reads, its gradient, and the reference's.
        states = (3 if self._exact_kl else 2) * e * s.hidden * batch.targets
        in_layer = (2 * e * s.mlp + (2 * s.hidden if e == 2 else 0)) * t
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
                "activations": (trunk or saved) + in_layer,
                "head": states,
            },
        }

    @property
    def _exact_kl(self) -> bool:
        method = METHODS.get(self.recipe.method)
        return method is not None and "reference_kl" in method.needs

    def head(self, batch: Batch) -> int:
        """The logits of a chunk of tokens, with what is computed from them in fp32."""
        row, targets = 4 * self.shape.vocabulary, batch.targets
        chunk = max(1, LOGIT_CHUNK_BYTES // row)
        if self._exact_kl or not self.recipe.policy.fused_head:
            return (6 if self._exact_kl else 5) * row * min(targets, chunk)
        return 3 * row * min(targets, chunk)

    def training(self, choice: Choice, batch: Batch | None = None) -> Components:
        """Bytes by component at the peak of training, with what vLLM keeps on the card."""
        worst = max(
            self.moments(choice, batch or self.batch(choice.micro_batch_tokens)).values(),
            key=lambda moment: sum(moment.values()),
        )
        parameters = self.lora_parameters
        # Autocast's copies of the adapter, of the layers that are in use.
        copied = max(self.shape.layers - choice.gradient_checkpointing, 1) / self.shape.layers
        own = {
            "base": self.base(choice.offload_embedding),
            "lora": 4 * parameters + (int(2 * parameters * copied) if self.element == 2 else 0),
            "optimiser": self.optimiser(gradients=True),
            **worst,
        }
        engine: Components = {}
        if self.beside(choice):
            kept = ASLEEP + (0 if self.recipe.rollout.eager else GRAPHS)
            engine = {"engine": kept} if self.sleeps else self.engine(choice)
        return own | engine | self._overhead(own)

    def _overhead(self, own: Components) -> Components:
        if self.device == "cpu":
            passing = sum(own.get(name, 0) for name in ("checkpoints", "activations", "head"))
            return {"fragmentation": int(HEAP * passing)}
        return {"context": CONTEXT, "fragmentation": int(FRAGMENTATION * sum(own.values()))}

    # --- rollouts --------------------------------------------------------------------------

    @property
    def kv_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.shape.layers * self.shape.kv_heads * self.shape.head_size * self.element

    def rollout(self, choice: Choice) -> Components:
        """Bytes by component at the peak of a rollout; what the trainer keeps stays meanwhile."""
        own = {
            "base": self.base(choice.offload_embedding),
            "lora": 4 * self.lora_parameters,
            "optimiser": self.optimiser(gradients=False),
        }
        if self.beside(choice) and self.device == "cuda":
            # Estimate: a forward of one row without gradient, which the probe takes.
            s, e = self.shape, self.element
            own["activations"] = self.longest_row * (3 * e * (s.mlp + s.hidden) + 8 * s.hidden)
            own["head"] = 3 * LOGIT_CHUNK_BYTES
        engine = self.engine(choice)
        inside = own | engine if choice.engine == "transformers" else own
        return own | engine | self._overhead(inside)

    def beside(self, choice: Choice) -> bool:
        """Whether a vLLM of ours shares the device with the trainer."""
        server = choice.engine == "vllm_server" and not self.recipe.rollout.servers
        return choice.engine in ("vllm", "unsloth") or server

    @property
    def sleeps(self) -> bool:
        """Whether vLLM gives the card's memory back while the trainer trains."""
        rollout = self.recipe.rollout
        return self.device == "cuda" and rollout.sleep and rollout.engine != "unsloth"

    @property
    def engine_weights(self) -> int:
        """vLLM's copy of the base; while it sleeps, it is in RAM."""
        if self.recipe.rollout.engine == "unsloth":
            return 0  # The trainer's own.
        if self.recipe.rollout.base == "plugin":
            return self.base(False)
        return (self.shape.linear_parameters + self.shape.plain_parameters) * self.element

    def engine(self, choice: Choice) -> Components:
        """What the engine itself takes; vLLM on CUDA takes its share of the card."""
        if choice.engine == "transformers":
            return self._own_engine(choice.batch_size)
        if not self.beside(choice):
            return {}
        s, e, settings = self.shape, self.element, self.recipe.rollout
        workspace = 0
        if self.device == "cuda":
            workspace = ENGINE_TOKENS * e * 3 * (s.mlp + s.hidden)
            workspace += choice.batch_size * s.vocabulary * 4 * 3
            workspace += 0 if settings.eager else GRAPHS
            workspace += CONTEXT if choice.engine == "vllm_server" else 0
        taken = self.engine_weights + workspace
        if settings.kv_cache_mib is not None:
            kv = settings.kv_cache_mib << 20
        elif self.device == "cuda":
            kv = max(0, int(choice.gpu_memory * self.card) - taken)
        else:
            kv = max(64 << 20, self.least_cache)
        return {"engine": taken, "kv_cache": kv}

    @property
    def least_cache(self) -> int:
        """One sequence as long as the context allows, which vLLM needs to start."""
        return self.kv_per_token * self.context

    def full_cache(self, rows: int) -> int:
        """So many sequences as long as they can get; more is of no use."""
        longest = max(self.recipe.rollout.max_tokens, self.recipe.eval.max_tokens or 0)
        return self.kv_per_token * rows * min(self.context, self.prompt + longest)

    def _own_engine(self, rows: int) -> Components:
        """Generation with the trainer's model: at the first forward, over the prompts, or at the
        last token's, when the keys and values are all there."""
        s, e = self.shape, self.element
        whole = self.full_cache(rows)
        # Logits in the model's precision and in fp32; on the CPU, what is drawn from, in fp64.
        drawing = rows * s.vocabulary * (e + 4 if self.device == "cuda" else 4 + 2 * 8 + 1)
        moments: list[Components] = [
            {
                "engine": rows * self.prompt * 4 * e * (s.mlp + s.hidden),
                "kv_cache": self.kv_per_token * rows * self.prompt,
            },
            # A layer's cache grows by copying it.
            {"engine": drawing, "kv_cache": whole + whole // (2 * s.layers)},
        ]
        return max(moments, key=lambda moment: sum(moment.values()))
