"""Seconds from `gft-lite train` to the end of its first step, by part, on real models.

Each start is a process of its own that runs the command with functions of the package timed from
outside; time inside a nested part counts for that part alone. A model is started twice with one
cache: the first start fills it. CPU seconds, children included, matter more than the clock where
other programs run.
"""

from __future__ import annotations

import argparse
import builtins
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

IMPORTS, ENGINE_IMPORTS, OTHER = "imports", "imports of vLLM", "everything else"
LAST = "first update"
MODULES = (
    "gft_lite.cli.entry_point", "gft_lite.training.run", "gft_lite.policy.qlora",
    "gft_lite.rollout.vllm_engine",
)  # fmt: skip
# The functions of a part, where they are looked up when they are called.
PARTS = {
    "recipe": "gft_lite.recipe.schema:Recipe.load",
    "learning rate": "gft_lite.training.run:settle_rate",
    "memory plan": "gft_lite.training.setup:_plan",
    "tokenizer and checks": "gft_lite.policy.qlora:check_model",
    "load and quantise": "gft_lite.policy.qlora:_load_base",
    "adapter": "gft_lite.policy.qlora:add_adapter",
    "layout": "gft_lite.policy.lora:LoraPolicy._choose_layout",
    "data": "gft_lite.training.setup:load_run_data",
    "dequantised base": "gft_lite.policy.lora:serving_base",
    "engine start": "gft_lite.rollout.vllm_engine:VllmEngine.__init__",
    "KL set": "gft_lite.training.setup:_sample_kl_set",
    "engine check": "gft_lite.rollout.policy_engine:PolicyEngine.start_checks",
    "base evaluation": "gft_lite.training.setup:TrainingRun.evaluate_base",
    "dry step": "gft_lite.training.single_run:dry_step",
    "sync": "gft_lite.rollout.policy_engine:PolicyEngine.sync",
    "first rollouts": "gft_lite.training.groups:GroupBuilder.build",
    LAST: "gft_lite.training.learner:Learner.update",
}
Seconds = dict[str, float]
# In the form of GSM8K.
PROBLEMS = [
    {"question": f"What is {a} + {b}?", "answer": f"{a} + {b} = {a + b}.\n#### {a + b}"}
    for a in range(10, 60)
    for b in (3, 7)
]


class Clock:
    """Wall-clock and CPU seconds by part, each without the parts inside it."""

    def __init__(self, started: float) -> None:
        self.wall: Seconds = {}
        self.cpu: Seconds = {}
        self._parts = [OTHER]
        self._ended = False
        self._wall, self._cpu = started, 0.0

    def _count(self) -> None:
        if self._ended:
            return
        now, used = time.time(), sum(os.times()[:4])
        part = self._parts[-1]
        self.wall[part] = self.wall.get(part, 0.0) + now - self._wall
        self.cpu[part] = self.cpu.get(part, 0.0) + used - self._cpu
        self._wall, self._cpu = now, used

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self._count()
        self._parts.append(part)
        try:
            yield
        finally:
            self._count()
            self._parts.pop()
            self._ended |= part == LAST

    def read(self) -> dict[str, Seconds]:
        """The seconds until now."""
        self._count()
        return {"wall": self.wall, "cpu": self.cpu}


def timed(clock: Clock, part: str, path: str) -> None:
    """Count the time of the function at "module:name" for a part."""
    module, _, names = path.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = names.split(".")
    for each in outer:
        owner = getattr(owner, each)
    plain = vars(owner)[name]
    function: Callable[..., Any] = getattr(plain, "__func__", plain)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with clock(part):
            return function(*args, **kwargs)

    setattr(owner, name, classmethod(wrapper) if isinstance(plain, classmethod) else wrapper)


def time_imports_of(clock: Clock, part: str, root: str) -> None:
    """Count the imports of a package for a part."""
    plain = builtins.__import__

    def wrapper(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] != root or name in sys.modules:
            return plain(name, *args, **kwargs)
        with clock(part):
            return plain(name, *args, **kwargs)

    builtins.__import__ = wrapper


def start(started: float, out: Path, command: Sequence[str]) -> None:
    """Run `gft-lite` with `command` in this process, and write its parts to `out`."""
    clock = Clock(started)
    with clock(IMPORTS):
        from gft_lite.utils.imports import uncompiled_functions

        with uncompiled_functions():  # As `load_policy` imports it.
            importlib.import_module("bitsandbytes")
        for module in MODULES:
            importlib.import_module(module)
        from gft_lite.cli.entry_point import main as run
    for part, path in PARTS.items():
        timed(clock, part, path)
    time_imports_of(clock, ENGINE_IMPORTS, "vllm")
    code = run(command)
    out.write_text(json.dumps(clock.read()), encoding="utf-8")
    sys.exit(code)


def measure(model: str, engine: str, overrides: Sequence[str]) -> dict[str, dict[str, Seconds]]:
    """The parts of the first and of the second start of a model with an empty cache."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = folder / "rows.jsonl"
        rows.write_text("".join(f"{json.dumps(row)}\n" for row in PROBLEMS), encoding="utf-8")
        command = [
            "train", "recipes/real/smollm2_135m_gsm8k.yaml", f"policy.model={model}",
            f"data.source={rows}", "data.config=null", "eval.sets={}", "train.steps=1",
            "train.problems_per_step=1", "monitor.problems=2", "rollout.max_tokens=128",
            f"rollout.engine={engine}", *overrides,
        ]  # fmt: skip
        return {
            which: _start_process([*command, f"--out={folder / which}"], folder)
            for which in ("first", "second")
        }


def _start_process(command: Sequence[str], folder: Path) -> dict[str, Seconds]:
    out, code = folder / "parts.json", "from benchmarks.startup import start; import sys, pathlib; "
    code += "start(float(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3:])"
    environment = os.environ | {"GFT_LITE_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, "-c", code, str(time.time()), str(out), *command]
    log = folder / "log"
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(arguments, env=environment, stdout=file, stderr=file, check=False)
    if done.returncode:
        raise SystemExit(log.read_text(encoding="utf-8"))
    found: dict[str, Seconds] = json.loads(out.read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Measure, print and record."""
    from benchmarks.real_model import find_real_model
    from benchmarks.record import RESULTS, record
    from gft_lite.utils.errors import UserError

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="the folder of a model (default: SmolLM2-135M)")
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="vllm")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        folder = options.model or find_real_model()
    except UserError as error:
        print(f"skipped: {error}")
        return
    found = measure(str(folder), options.engine, options.overrides)
    table = Table(
        "part", *(f"{which} start, {kind} s" for which in found for kind in ("CPU", "wall"))
    )
    starts = list(found.values())
    parts = [part for part in (IMPORTS, *PARTS, ENGINE_IMPORTS, OTHER) if part in starts[0]["cpu"]]
    for part in parts:
        cells = (s[kind].get(part, 0.0) for s in starts for kind in ("cpu", "wall"))
        table.add_row(part, *(f"{seconds:.1f}" for seconds in cells))
    sums = (sum(s[kind].values()) for s in starts for kind in ("cpu", "wall"))
    table.add_row("sum", *(f"{seconds:.1f}" for seconds in sums))
    Console().print(table)
    before = RESULTS / "startup.json"
    kept = json.loads(before.read_text("utf-8"))["figures"] if before.is_file() else {}
    key = f"{folder.name}, {options.engine}"
    figures = {"overrides": options.overrides, **found}
    print(f"written: {record('startup', {**kept, key: figures})}")


if __name__ == "__main__":
    main()
