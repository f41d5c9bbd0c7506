"""What a training process on a CPU takes beside weights, activations and caches.

Measured as resident memory (Python 3.11, torch 2.13, transformers 5.17, vLLM 0.32, glibc 2.36) with
SmolLM2-135M in bfloat16 and Qwen2.5-Coder-0.5B in float32, phase by phase.
"""

from __future__ import annotations

from gft_lite.planning.model_shape import ModelShape

MIB = 1 << 20
LIBRARIES_BYTES = 530 * MIB  # Python with torch, transformers, peft and bitsandbytes.
TOKENIZER_BYTES = 950  # Of the tokenizer, per token of the vocabulary.
VLLM_BYTES = 152 * MIB  # vLLM's modules.
VLLM_VOCABULARY_BYTES = 3000  # Of vLLM's own tokenizers, per token of the vocabulary.
STORED_BYTES = 2  # Models are published in bfloat16.
# Quantising leaves this multiple of the unquantised linears behind, until the heap is trimmed.
LOADING_FACTOR = 1.3
# glibc maps and unmaps larger blocks one by one; smaller ones come from a heap that keeps freed
# blocks. MALLOC_MMAP_THRESHOLD_=65536 avoids that and makes steps half as long again.
LARGEST_HEAP_BLOCK = 32 * MIB
# The heap's size beyond the blocks in use: this multiple of what all layers save in it. Layers that
# are recomputed leave as much, since their checkpoints stand between the freed blocks. Measured
# with 3 to 30 layers of SmolLM2 and Qwen2.5-0.5B and 400 to 4,100 tokens: 1.0 to 1.3 in float32,
# 0.5 to 1.3 in bfloat16.
HEAP_FACTOR = 1.1


def process(shape: ModelShape) -> int:
    """Bytes of the libraries and the tokenizer."""
    return LIBRARIES_BYTES + TOKENIZER_BYTES * shape.vocabulary


def mapped_file(shape: ModelShape, element: int, *, quantized: bool) -> int:
    """Bytes of the weight file that stay mapped: its linears, beside their quantised copies.

    Unquantised weights of the stored precision are not copied when loaded, so that the file stays.
    """
    return STORED_BYTES * shape.linear_parameters if quantized and element == STORED_BYTES else 0


def loading(shape: ModelShape, element: int, base: int, *, quantized: bool) -> dict[str, int]:
    """Bytes by component while the base is loaded and quantised."""
    left = int(LOADING_FACTOR * element * shape.linear_parameters) if quantized else 0
    stored = STORED_BYTES * (shape.linear_parameters + shape.plain_parameters)
    return {"process": process(shape), "base": base, "file": stored, "fragmentation": left}


def vllm(shape: ModelShape, element: int) -> int:
    """Bytes of vLLM beside its weights and KV cache.

    It keeps the embedding and the output head a second time, packed for oneDNN; all other linears
    only so.
    """
    packed = 2 * element * shape.embedding_parameters
    return VLLM_BYTES + VLLM_VOCABULARY_BYTES * shape.vocabulary + packed
