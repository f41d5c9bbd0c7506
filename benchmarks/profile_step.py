"""Where the time of one optimiser step goes: kinds of work by pass, for gft-lite and for TRL.

The step of `against_trl.py` on a real model (`--model`), with every operator timed, on one
thread. A pass is TRL's forward of the old policy, the forward, the recomputation of gradient
checkpointing, the backward, or the rest, such as the optimiser. Seconds are the
process's CPU time; that of Python includes what the timing itself takes. The second step of full
size counts: the first one also takes the memory from the system that later ones use again.

What `against_trl.py` calls the law of positions counts every pass as one. `corrected_law` counts a
pass as what it takes here at TRL per forwarded position, in place of it.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.against_trl import LENGTHS, REAL_PROMPT, SIDES, Figures, real_shape
from benchmarks.record import fresh_processes, record
from benchmarks.recorded import RANK, Clock, make_groups, make_model, make_reference
from gft_lite.policy.scoring import OutputHead
from gft_lite.utils.errors import UserError

PASSES = ("old", "forward", "recomputation", "backward", "rest")
KINDS = ("head", "products", "lora", "attention", "gathering", "elementwise", "python")
COMPARED = ("trl", "gft_lite", "gft_lite_no_checkpointing")
_PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm")
_GATHERING = ("aten.index", "aten._index_put", "aten.gather", "aten.embedding", "aten.cat")
LAYER, OLD, HEAD = "layer", "old log-probs", "head"
LABELS: list[str] = []  # Of the functions that run.
Parts = dict[str, dict[str, float]]  # {pass: {kind: seconds}}


class Timer(TorchDispatchMode):
    """Sums the CPU-seconds of every operator by pass and kind.

    Not torch's profiler, which keeps all tensors alive when it records shapes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Parts = {name: defaultdict(float) for name in PASSES}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        start = time.process_time()
        result = func(*args, **(kwargs or {}))
        seconds = time.process_time() - start
        shapes = [each.shape for each in args if isinstance(each, Tensor) and each.dim() > 1]
        self.found[current_pass()][kind_of(str(func), shapes)] += seconds
        return result


class ProfilingClock(Clock):
    """Times the operators of every step; those after the warm-up count."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Figures] = []

    def start(self, model: Any) -> None:
        """Label the layers of the model, and start the timer unless it is the warm-up."""
        if not self.seconds:
            for module in model.modules():
                if type(module).__name__.endswith("DecoderLayer"):
                    module.forward = labelled(LAYER, module.forward)
        self._timer = Timer()
        self._timer.__enter__()
        self._usage = resource.getrusage(resource.RUSAGE_SELF)
        super().start(model)

    def stop(self) -> None:
        """Sum what was timed; what no operator accounts for is Python, of the rest."""
        super().stop()
        used, seconds = resource.getrusage(resource.RUSAGE_SELF), self.seconds[-1]
        self._timer.__exit__(None, None, None)
        parts = {name: dict(kinds) for name, kinds in self._timer.found.items()}
        parts["rest"]["python"] = seconds - sum(sum(kinds.values()) for kinds in parts.values())
        found = {
            "seconds": seconds,
            "system_cpu_seconds": used.ru_stime - self._usage.ru_stime,
            "page_faults": used.ru_minflt - self._usage.ru_minflt,
            "parts": parts,
        }
        self.steps.append(found)


def labelled(label: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, in which operators count under the label."""

    def call(*args: Any, **kwargs: Any) -> Any:
        LABELS.append(label)
        try:
            return function(*args, **kwargs)
        finally:
            LABELS.pop()

    return call


def current_pass() -> str:
    """The pass of an operator that runs now."""
    backward = torch._C._current_graph_task_id() != -1
    if OLD in LABELS:
        return "old"
    if LAYER in LABELS:
        return "recomputation" if backward else "forward"
    if backward:
        return "backward"
    return "forward" if HEAD in LABELS else "rest"


def kind_of(name: str, shapes: Sequence[Sequence[int]]) -> str:
    """The kind of work of an operator, given the shapes of its matrices."""
    if HEAD in LABELS:
        return "head"
    if "scaled_dot_product" in name:
        return "attention"
    if name.startswith(_PRODUCTS):
        return "lora" if any(RANK in shape for shape in shapes) else "products"
    return "gathering" if name.startswith(_GATHERING) else "elementwise"


def profiled(label: str, folder: Path, prompt: int) -> Figures:
    """One side's step."""
    side, clock = SIDES[label], ProfilingClock()
    OutputHead.loss_gradient = labelled(HEAD, OutputHead.loss_gradient)  # type: ignore[method-assign]
    if label.startswith("trl"):
        import trl
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction as Head

        for method in ("forward", "backward"):
            setattr(Head, method, staticmethod(labelled(HEAD, getattr(Head, method))))
        name = "_get_per_token_logps_and_entropies"
        plain = getattr(trl.GRPOTrainer, name)

        def marked(*args: Any, **kwargs: Any) -> Any:
            old = not torch.is_grad_enabled()
            return (labelled(OLD, plain) if old else plain)(*args, **kwargs)

        setattr(trl.GRPOTrainer, name, marked)
    figures = side.replay(folder, prompt, "0", side.options, 2, clock)
    _, first, second = clock.steps
    return second | {
        "positions": figures["forwarded"]["with_gradient"],
        "first": {name: first[name] for name in first if name != "parts"},
    }


def corrected_law(found: dict[str, Figures]) -> dict[str, dict[str, float]]:
    """How much less each side should take than TRL if a position cost what it costs TRL by pass.

    And what it takes less by the clock.
    """
    trl = found["trl"]
    cost = {name: sum(kinds.values()) / trl["positions"] for name, kinds in trl["parts"].items()}
    laws = {}
    for label, side in found.items():
        used = [name for name in PASSES if name != "rest" and sum(side["parts"][name].values())]
        equal = trl["positions"] * (len(PASSES) - 1) / (side["positions"] * len(used))
        all_passes = sum(cost[name] for name in PASSES[:-1])
        own = sum(cost[name] for name in used)
        laws[label] = {
            "law": equal,
            "corrected_law": trl["positions"] * all_passes / (side["positions"] * own),
            "speed_ratio": trl["seconds"] / side["seconds"],
        }
    return laws


def show(found: dict[str, Figures]) -> None:
    """Print a table of seconds for each side."""
    for label, side in found.items():
        table = Table("kind", *PASSES, "sum", "share", title=f"{label}, seconds")
        for kind in KINDS:
            line = [side["parts"][name].get(kind, 0.0) for name in PASSES]
            table.add_row(kind, *(f"{x:.2f}" for x in (*line, sum(line))),
                          f"{sum(line) / side['seconds']:.0%}")  # fmt: skip
        sums = [sum(side["parts"][name].values()) for name in PASSES]
        table.add_row("sum", *(f"{x:.2f}" for x in (*sums, side["seconds"])), "")
        Console(width=110).print(table)
        for name, step in (("first", side["first"]), ("second", side)):
            print(f"{name} step of {side['positions']} positions: {step['seconds']:.2f} s, "
                  f"{step['system_cpu_seconds']:.2f} of them the kernel's, "
                  f"{step['page_faults']} page faults")  # fmt: skip


def main() -> None:
    """Profile, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2 or a folder")
    parser.add_argument("--lengths", choices=LENGTHS, default="gsm8k")
    parser.add_argument("--groups", type=int, default=1, help="of 8 responses")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(COMPARED))
    asked = parser.parse_args()
    try:
        shape = real_shape(asked.model, asked.lengths, asked.groups)
    except UserError as error:
        print(f"skipped: {error}")
        return
    with fresh_processes() as pool, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder, shape)
        make_groups(folder, shape, REAL_PROMPT)
        pool.submit(make_reference, folder, REAL_PROMPT).result()
        found = {label: pool.submit(profiled, label, folder, REAL_PROMPT).result()
                 for label in asked.sides}  # fmt: skip
    show(found)
    figures: Figures = {"shape": asdict(shape) | {"model": Path(shape.model).name}, "sides": found}
    if "trl" in found:
        figures["laws"] = corrected_law(found)
        print(figures["laws"])
    print(f"written: {record('profile_step', figures)}")


if __name__ == "__main__":
    main()
