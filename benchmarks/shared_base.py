"""What a small sweep pays for loading and starting: its runs one by one, and with shared parts.

The same sweep runs twice, each time in one process of its own: every run loads the base and starts
the engine, or all share them (`gft_lite.training.shared_parts`). CPU seconds are those of the
process, so that other load on the machine matters little; the adapters of both must be equal.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.real_model import find_real_model
from benchmarks.record import RESULTS, record
from gft_lite.experiments.launchers import LOG
from gft_lite.experiments.sweep_config import Sweep
from gft_lite.experiments.sweep_runner import sweep
from gft_lite.utils.errors import UserError

RATES = (1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3)
SMALL: dict[str, Any] = {
    "train": {"steps": 4, "problems_per_step": 4},
    "data": {"problems": 64, "holdout": 8},
    "monitor": {"every": 2, "problems": 4},
    "eval": {
        "samples": 2,
        "k": [1],
        "sets": {name: {"source": "lab", "split": name, "problems": 8}
                 for name in ("test", "retention")},
    },
}  # fmt: skip


def compare(model: str, engine: str, rates: Sequence[float]) -> dict[str, Any]:
    """Cost of a sweep over learning rates with separate and with shared parts, and their ratio."""
    overrides = SMALL | {
        "policy": {"model": model, "context": 256},
        "rollout": {"engine": engine},
    }
    if model != "lab":
        overrides["train"] = {"steps": 2, "problems_per_step": 1}
    plan = Sweep.from_tree(
        {"recipe": "recipes/lab.yaml", "overrides": overrides, "grid": {"optim.lr": [*rates]}}
    )
    with tempfile.TemporaryDirectory() as folder:
        found = {
            name: _run(plan, Path(folder) / name, share)
            for name, share in (("separate", False), ("shared", True))
        }
    separate, shared = found["separate"], found["shared"]
    return {
        "runs": len(rates),
        **{name: figures for name, (figures, _) in found.items()},
        "ratio": {name: separate[0][name] / shared[0][name] for name in ("wall", "cpu")},
        "adapters_equal": separate[1] == shared[1],
    }


def _run(plan: Sweep, out: Path, share: bool) -> tuple[dict[str, float], list[bytes]]:
    """Seconds, loads and starts of a sweep, and the adapters of its runs."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    folder = sweep(plan, out, share=share, console=Console(quiet=True))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    runs = [folder.run(trial.name) for trial in plan.trials()]
    logs = [(run.path / LOG).read_text(encoding="utf-8") for run in runs]
    figures = {
        "wall": time.perf_counter() - started,
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "loads": sum("base: of the run before" not in log for log in logs),
        "starts": sum("engine: of the run before" not in log for log in logs),
    }
    return figures, [(run.adapter / "adapter_model.safetensors").read_bytes() for run in runs]


def main() -> None:
    """Measure, print and record; says what is left out and why."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", nargs="*", help="such as 'lab, vllm'; figures of others are kept")
    wanted = parser.parse_args().case
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    cases: dict[str, tuple[str, str, int]] = {"lab, transformers": ("lab", "transformers", 6)}
    if importlib.util.find_spec("vllm") is None:
        print("lab, vllm: skipped: vllm is not installed")
    else:
        cases["lab, vllm"] = "lab", "vllm", 6
        try:
            cases["SmolLM2-135M, vllm"] = str(find_real_model()), "vllm", 3
        except UserError as error:
            print(f"SmolLM2-135M, vllm: skipped: {error}")
    file = RESULTS / "shared_base.json"
    figures = json.loads(file.read_text(encoding="utf-8"))["figures"] if wanted else {}
    for name, (model, engine, runs) in cases.items():
        if wanted and name not in wanted:
            continue
        figures[name] = compare(model, engine, RATES[:runs])
        print(f"{name}: {figures[name]}", flush=True)
    print(f"written: {record('shared_base', figures)}")


if __name__ == "__main__":
    main()
