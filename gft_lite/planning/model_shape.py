"""The sizes of a model that the memory plan needs, from its config.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gft_lite.planning.hub_config import read_hub_file
from gft_lite.planning.model_estimate import estimate
from gft_lite.recipe.base import is_hub_id
from gft_lite.recipe.lora_section import LoraSettings
from gft_lite.utils.errors import RecipeError, short_repr
from gft_lite.utils.paths import PACKAGE

SHIPPED = "configs/models/shapes"
# Dense decoders with a gated MLP, for which the formulas were compared with measurements.
KNOWN_TYPES = ("gemma3", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
_REQUIRED = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size",
)  # fmt: skip
_OPTIONAL = ("num_key_value_heads", "head_dim", "max_position_embeddings",
             "original_max_position_embeddings")  # fmt: skip
_TOWER = ("hidden_size", "intermediate_size", "num_hidden_layers", "image_size", "patch_size")
# What the published config.json of multimodal Gemma 3 leaves to transformers' Gemma3TextConfig.
_GEMMA3_DEFAULTS = {
    "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "max_position_embeddings": 131_072,
}  # fmt: skip
_MAX_SIZE, _MAX_LAYERS = 10**9, 256  # Larger than any model's.


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a dense decoder; `mlp` is the width between gate and down projection.

    `fused` models have one linear for query, key and value and one for gate and up projection
    (phi3). `sandwich` models normalise the outputs of attention and MLP too, with norms that
    compute in fp32 throughout (gemma3). `vision` are the parameters of an image tower, which
    training on text never runs: linears, and all others. `assumptions` are what an estimate for a
    model of another type takes for granted.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    vocabulary: int
    tied: bool
    context: int
    qkv_bias: bool = False
    qk_norm: bool = False
    fused: bool = False
    sandwich: bool = False
    vision: tuple[int, int] = (0, 0)
    assumptions: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str = "config.json") -> ModelShape:
        """The shape that a config.json describes.

        A model type without formulas gets an estimate. Raises: RecipeError for missing or
        impossible sizes.
        """
        kind = config.get("model_type")
        if kind not in KNOWN_TYPES:
            known, experts, assumptions = estimate(config)
            shape = cls.from_config(known, f"{name} of type {short_repr(kind)}")
            return replace(shape, vision=(0, experts), assumptions=assumptions)
        if kind == "gemma3":
            return cls._from_multimodal(config, name)
        _check_sizes(
            config, (*_REQUIRED, *(k for k in _OPTIONAL if config.get(k) is not None)), name
        )
        heads = config["num_attention_heads"]
        return cls(
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or config["hidden_size"] // heads,
            mlp=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", kind == "gemma3_text")),
            # LongRoPE has other frequencies beyond the original context: see policy.model_checks.
            context=config.get("original_max_position_embeddings")
            or config.get("max_position_embeddings")
            or 1 << 30,
            qkv_bias=bool(config.get("attention_bias", kind == "qwen2")),
            qk_norm=kind in ("qwen3", "gemma3_text"),
            fused=kind == "phi3",
            sandwich=kind == "gemma3_text",
        )

    @classmethod
    def _from_multimodal(cls, config: Mapping[str, Any], name: str) -> ModelShape:
        """The shape of the text decoder, and the size of the SigLIP tower beside it."""
        parts = [config.get(part) for part in ("text_config", "vision_config")]
        text, tower = (part if isinstance(part, Mapping) else {} for part in parts)
        shape = cls.from_config({**_GEMMA3_DEFAULTS, **text, "model_type": "gemma3_text"}, name)
        _check_sizes(tower, _TOWER, f"{name}, vision_config")
        width, mlp, layers = (tower[key] for key in _TOWER[:3])
        image, patch = tower["image_size"], tower["patch_size"]
        linear = layers * (4 * width**2 + 2 * width * mlp)
        plain = layers * (4 * width + mlp + width + 4 * width)  # Biases, and two norms.
        plain += (3 * patch**2 + 1 + (image // patch) ** 2 + 2) * width  # Patches, places, a norm.
        plain += width * shape.hidden + width  # The projection to the decoder's width.
        return replace(shape, vision=(linear, plain))

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each linear of a layer, which are quantised and adapted."""
        query, key = self.heads * self.head_size, self.kv_heads * self.head_size
        if self.fused:
            return {
                "qkv_proj": (self.hidden, query + 2 * key),
                "o_proj": (query, self.hidden),
                "gate_up_proj": (self.hidden, 2 * self.mlp),
                "down_proj": (self.mlp, self.hidden),
            }
        return {
            "q_proj": (self.hidden, query),
            "k_proj": (self.hidden, key),
            "v_proj": (self.hidden, key),
            "o_proj": (query, self.hidden),
            "gate_proj": (self.hidden, self.mlp),
            "up_proj": (self.hidden, self.mlp),
            "down_proj": (self.mlp, self.hidden),
        }

    def adapter_ranks(self, lora: LoraSettings) -> dict[str, list[int]]:
        """The ranks of the trained adapter: of each linear in the layers where it is adapted."""
        trained, found = lora.trained, {}
        for name in self.linears:
            block = "mlp" if name.startswith(("gate", "up", "down")) else "self_attn"
            paths = [f"model.layers.{layer}.{block}.{name}" for layer in range(self.layers)]
            found[name] = [rank for path in paths if (rank := trained.rank_of(path))]
        return found

    @property
    def linear_parameters(self) -> int:
        """Parameters in the linears of all layers."""
        return self.layers * sum(i * o for i, o in self.linears.values()) + self.vision[0]

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the input embedding."""
        return self.vocabulary * self.hidden

    @property
    def plain_parameters(self) -> int:
        """Parameters that are never quantised: embeddings, output head, norms and biases."""
        embeddings = self.embedding_parameters * (1 if self.tied else 2)
        layer = (4 if self.sandwich else 2) * self.hidden + 2 * self.head_size * self.qk_norm
        layer += self.qkv_bias * (self.heads + 2 * self.kv_heads) * self.head_size
        return embeddings + self.layers * layer + self.hidden + self.vision[1]


def find_shape(model: str, revision: str | None = None) -> ModelShape:
    """The shape of a recipe's `policy.model`.

    The model is `lab`, a folder, a config.json, or a hub id, whose shape is shipped, in the hub's
    cache, or fetched.

    Raises: RecipeError for any other model, and for one whose config.json has no sizes.
    """
    path = PACKAGE / "lab" / "base" if model == "lab" else Path(model)
    shipped = [root / SHIPPED / f"{model}.json" for root in (PACKAGE.parent, PACKAGE / "shipped")]
    for file in (path / "config.json", path, *shipped):
        if os.path.isfile(file):
            return ModelShape.from_config(_read_config(file), str(file))
    if not is_hub_id(model):
        raise RecipeError(
            [f"policy.model: must be lab, a folder with a config.json, or a hub id to be planned, "
             f"got {short_repr(model)}. Check the path."]
        )  # fmt: skip
    content = read_hub_file(model, "config.json", revision)
    if content is None:
        raise _unplannable("a model with a config.json", short_repr(model))
    return ModelShape.from_config(_parse_config(content, model), model)


def _check_sizes(config: Mapping[str, Any], keys: Sequence[str], name: str) -> None:
    """Require possible sizes for these keys. Raises: RecipeError."""
    sizes = {key: config.get(key) for key in keys}
    wrong = [key for key, size in sizes.items() if not _is_size(size)]
    layers = "num_hidden_layers"
    if layers not in wrong and sizes[layers] not in range(_MAX_LAYERS + 1):
        wrong.append(layers)
    if wrong:
        raise _unplannable(
            "a config.json with its sizes",
            f"{name} with {', '.join(f'{key}: {short_repr(sizes[key])}' for key in wrong)}",
        )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MAX_SIZE


def _read_config(file: Path) -> Mapping[str, Any]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise _unplannable("a readable config.json", f"{file} ({error})") from None
    return _parse_config(content, str(file))


def _parse_config(content: bytes, name: str) -> Mapping[str, Any]:
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _unplannable("a readable config.json", f"{name} ({error})") from None
    if not isinstance(config, Mapping):
        raise _unplannable("a config.json with an object", name)
    return config


def _unplannable(rule: str, got: str) -> RecipeError:
    return RecipeError(
        [f"policy.model: must be {rule} to be planned, got {got}. "
         "Choose the values that are auto in policy yourself."]
    )  # fmt: skip
