"""Results as JSON under results/, with the machine, the versions and the date."""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def peak_rss_mib() -> float:
    """The largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def record(name: str, figures: dict[str, Any]) -> Path:
    """Write a benchmark's figures with what they were measured on."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    document = {
        "benchmark": name,
        "date": datetime.date.today().isoformat(),
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "gpu": gpu},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "figures": figures,
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps(document, indent=1) + "\n")
    return file


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()
