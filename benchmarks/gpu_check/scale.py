"""What is checked, at full size or tiny: the models' shapes, and the sizes of a batch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from gft_lite.planning.model_shape import SHIPPED, ModelShape
from gft_lite.recipe.schema import Recipe
from gft_lite.utils.paths import PACKAGE

SMALL, MIDDLE, LARGE = MODELS = (
    "Qwen/Qwen2.5-Math-1.5B", "Qwen/Qwen2.5-Math-7B", "meta-llama/Llama-3.1-8B",
)  # fmt: skip
# Two layers of each model's kind, with grouped keys, for a machine without a GPU.
TINY = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 256, "vocab_size": 512,
    "max_position_embeddings": 256,
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Tokens of prompts, responses (their most, mean and 95th percentile) and micro-batches."""

    prompt: int = 1024
    response: int = 2048
    mean: float = 600.0
    p95: float = 1500.0
    micro_batch: int = 8192
    groups: int = 5
    members: int = 8


@dataclass(frozen=True)
class Setup:
    """Where, and how large."""

    device: Literal["cuda", "cpu"]
    tiny: bool

    @property
    def sizes(self) -> Sizes:
        """The batch."""
        return Sizes(24, 32, 12.0, 24.0, 256) if self.tiny else Sizes()

    def config(self, model: str) -> dict[str, Any]:
        """A model's config.json, with fewer and narrower layers when tiny."""
        shipped = json.loads(
            (PACKAGE.parent / SHIPPED / f"{model}.json").read_text(encoding="utf-8")
        )
        return shipped | (TINY if self.tiny else {})

    def shape(self, model: str) -> ModelShape:
        """The shape as the memory plan has it."""
        return ModelShape.from_config(self.config(model), model)

    def recipe(self, model: str, **sections: dict[str, Any]) -> Recipe:
        """GFT at the paper's lengths on a model; sections go over it, and weights don't move."""
        sizes = self.sizes
        own: dict[str, dict[str, Any]] = {
            "policy": {"model": model, "context": 256 if self.tiny else 4096,
                       "device": self.device},
            "data": {"max_prompt_tokens": sizes.prompt},
            "rollout": {"max_tokens": sizes.response, "engine": "transformers"},
            "train": {"micro_batch_tokens": sizes.micro_batch, "problems_per_step": sizes.groups},
            # So small that fp32 keeps the adapter as it is: all cases take the same step.
            "optim": {"lr": 1e-30, "schedule": "constant", "warmup": 0},
        }  # fmt: skip
        merged = {name: own.get(name, {}) | sections.get(name, {}) for name in own | sections}
        return Recipe.from_tree({"method": "gft"} | merged)
