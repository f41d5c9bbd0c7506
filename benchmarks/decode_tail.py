"""What a step gains if sampling and training overlap on one device: a simulation.

Towards the end of a rollout only the longest responses are left, and each decoding step reads all
weights for a few rows. Three schedules of a step are simulated on log-normal lengths:

- `alternate`: sample all groups, then train them, as gft-lite does.
- `overlap`: sample the next step's groups with the previous adapter during training. Responses
  are one step stale.
- `train_finished`: train each group as soon as its last response has ended. Nothing is stale,
  since the optimiser steps after the last group.

A decoding step of `b` rows takes `step + row * b` seconds, fitted to rates measured here with vLLM
and an adapter; training takes `token` seconds for each position, measured here as well. A second
device has times calculated from a data sheet, for the ratio that a large model has on a GPU.

The device is shared. `rate` is the speed of each of two phases that run at once: 1 for two
devices, 0.5 where they take turns. Decoding and training are matrix products, each of which is
spread over the whole device, so that 0.5 is assumed for one device; what lies above shows how much
more it would have to do at once. Idle memory for both phases is taken for granted.

`fill_slots` is a bound on what else could be had at rate 0.5: the next step's responses start in
the rows that the tail leaves free, so that a decoding step always has all rows. It makes responses
stale, and those in progress at an optimiser step would continue with another adapter.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.real_model import find_real_model
from benchmarks.record import record
from benchmarks.recorded import Shape
from gft_lite.utils.errors import UserError

BATCHES = (1, 2, 4, 8, 16, 32)
RATES = (0.5, 0.6, 0.75, 1.0)
GAIN = 1.2  # From here on a schedule is worth its complexity.
# Mean and 95% quantile of the response lengths, and the most tokens of a response.
LENGTHS = {
    "short answers": (80, 200, 512),
    "long reasoning": (300, 900, 4096),
    "heavy tail": (300, 1100, 8192),
}
GROUPS, MEMBERS, PROMPT = 8, 8, 90


@dataclass(frozen=True, slots=True)
class Device:
    """Seconds of a decoding step: `step + row * rows`; of training: `token` for a position."""

    step: float
    row: float
    token: float


# 7.6B parameters in bf16, 1.0 TB/s at 60%, 165 TFLOP/s at 40%; training takes 4 FLOP for each
# parameter and position, decoding 2; 57 kB of KV cache a token at 500 tokens.
CARD = Device(
    step=15.2e9 / 0.6e12,
    row=2 * 7.6e9 / 66e12 + 57e3 * 500 / 0.6e12,
    token=4 * 7.6e9 / 66e12,
)


@dataclass(frozen=True, slots=True)
class Step:
    """The response lengths of each group, and how many responses are decoded at once."""

    groups: tuple[tuple[int, ...], ...]
    slots: int
    prompt: int = PROMPT

    def training_seconds(self, device: Device) -> list[float]:
        """Of each group, whose prompt is forwarded once."""
        return [device.token * (self.prompt + sum(group)) for group in self.groups]


def decode(step: Step, device: Device) -> list[float]:
    """When the last response of each group ends; rows start in order as others leave a slot."""
    waiting = deque((number, n) for number, group in enumerate(step.groups) for n in group)
    active: list[tuple[int, int]] = []  # Group and tokens left.
    ends, clock = [0.0] * len(step.groups), 0.0
    while waiting or active:
        while waiting and len(active) < step.slots:
            active.append(waiting.popleft())
        count = min(left for _, left in active)
        clock += count * (device.step + device.row * len(active))
        for number, left in active:
            if left == count:
                ends[number] = clock
        active = [(number, left - count) for number, left in active if left > count]
    return ends


def alternate(step: Step, device: Device, rate: float = 1.0) -> float:
    """Seconds of a step whose phases follow one another; `rate` has no meaning."""
    return max(decode(step, device)) + sum(step.training_seconds(device))


def overlap(step: Step, device: Device, rate: float) -> float:
    """Seconds of a step in the long run; the shorter phase is hidden at the given rate."""
    phases = max(decode(step, device)), sum(step.training_seconds(device))
    return max(phases) + min(phases) * (1 / rate - 1)


def train_finished(step: Step, device: Device, rate: float) -> float:
    """Seconds of a step that trains each group from its end on, beside the rest of decoding."""
    clock = decoded = ready = 0.0  # `ready`: training seconds of groups that have ended.
    for end, cost in sorted(zip(decode(step, device), step.training_seconds(device), strict=True)):
        both = min(ready, end - decoded)
        clock += both / rate + (end - decoded - both)
        ready += cost - both
        decoded = end
    return clock + ready


def fill_slots(step: Step, device: Device, rate: float = 1.0) -> float:
    """A lower bound of a step's seconds if every decoding step has all rows."""
    tokens = sum(map(sum, step.groups))
    decoding = tokens * (device.step / step.slots + device.row)
    return decoding + sum(step.training_seconds(device))


SCHEDULES: dict[str, Callable[[Step, Device, float], float]] = {
    "overlap": overlap,
    "train_finished": train_finished,
}


def gain(step: Step, device: Device, schedule: str, rate: float) -> float:
    """How many times as fast as `alternate`."""
    return alternate(step, device) / SCHEDULES[schedule](step, device, rate)


def needed_rate(step: Step, device: Device, schedule: str) -> float | None:
    """The lowest rate with a gain of GAIN, in hundredths; None if two devices don't reach it."""
    rates = (hundredths / 100 for hundredths in range(50, 101))
    return next((r for r in rates if gain(step, device, schedule, r) >= GAIN), None)


def make_step(mean: float, p95: float, most: int, slots: int) -> Step:
    """A step with the quantiles of the log-normal distribution, shuffled into groups."""
    lengths = Shape(groups=GROUPS, members=MEMBERS, mean=mean, p95=p95).lengths()
    random.Random(0).shuffle(lengths)
    cut = [min(length, most) for length in lengths]
    return Step(tuple(tuple(cut[i::GROUPS]) for i in range(GROUPS)), slots)


def simulate(device: Device) -> list[dict[str, Any]]:
    """Every distribution, with all responses at once and with half of them."""
    cases = []
    for name, lengths in LENGTHS.items():
        for slots in (GROUPS * MEMBERS, GROUPS * MEMBERS // 2):
            step = make_step(*lengths, slots)
            whole = alternate(step, device)
            cases.append(
                {
                    "lengths": name,
                    "slots": slots,
                    "decoding_share": max(decode(step, device)) / whole,
                    "gain": {s: {str(r): gain(step, device, s, r) for r in RATES}
                             for s in SCHEDULES},
                    "needed_rate": {s: needed_rate(step, device, s) for s in SCHEDULES},
                    "bound_of_filled_slots": whole / fill_slots(step, device),
                }
            )  # fmt: skip
    return cases


# --- the measured device -----------------------------------------------------------------------


def fit(rates: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """`step` and `row` from pairs of rows and seconds, by the relative error."""
    rows, seconds = np.array(rates).T
    row, step = np.polyfit(rows, seconds, 1, w=1 / seconds)
    return float(step), float(row)


def measure(model: str) -> dict[str, Any]:
    """Seconds of a decoding step by number of rows, and of training by position; one thread."""
    import torch

    from benchmarks.rollout_cpu import fastest
    from gft_lite.policy.batching import Row
    from gft_lite.policy.registry import load_policy
    from gft_lite.recipe.sections import PolicySettings, RolloutSettings
    from gft_lite.rollout.base import Request, Sampling
    from gft_lite.rollout.vllm_engine import VllmEngine

    torch.set_num_threads(1)
    policy = load_policy(PolicySettings(model=model, device="cpu", quantization="none"))
    policy.eos_ids = frozenset()  # All responses then have the same length.
    draws = torch.randint(100, 1000, (BATCHES[-1] // MEMBERS, PROMPT)).tolist()
    rows = [Row(tuple(draws[0]), tuple(draws[1][:60]), 1.0) for _ in range(MEMBERS)]
    [batch] = policy.batches(rows, 10**6)
    training = fastest(lambda: policy.backward(batch, lambda s, _: s.logprobs.mean()), 2)
    positions = PROMPT + MEMBERS * 60
    with tempfile.TemporaryDirectory() as name:
        settings = RolloutSettings(engine="vllm", batch_size=BATCHES[-1], kv_cache_mib=512)
        engine = VllmEngine(settings, policy, Path(name))
        engine.sync(policy.save_adapter(Path(name) / "adapter"), 1)

        def seconds(count: int, tokens: int) -> float:
            seeds = [tuple(range(i, min(i + MEMBERS, count))) for i in range(0, count, MEMBERS)]
            requests = [Request(tuple(ids), s) for ids, s in zip(draws, seeds, strict=False)]
            return fastest(lambda: engine.generate(requests, Sampling(max_tokens=tokens)), 2)

        seconds(2, 2)
        steps = [(count, (seconds(count, 10) - seconds(count, 2)) / 8) for count in BATCHES]
        engine.close()
    step, row = fit(steps)
    device = Device(step, row, training / positions)
    return {"decoding_steps": steps, "device": asdict(device)}


def main() -> None:
    """Measure, simulate, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="a folder; by default that of real_model.py")
    arguments = parser.parse_args()
    devices, figures = {"card, calculated": CARD}, {}
    if importlib.util.find_spec("vllm") is None:
        print("skipped: vllm is not installed; the calculated device only")
    else:
        try:
            figures["measured"] = measure(arguments.model or str(find_real_model()))
            devices["CPU, measured"] = Device(**figures["measured"]["device"])
        except UserError as error:
            print(f"skipped: {error}; the calculated device only")
    figures["cases"] = {name: simulate(device) for name, device in devices.items()}
    for name, cases in figures["cases"].items():
        print(f"{name}: {devices[name]}")
        for case in cases:
            gains = {s: {r: round(x, 2) for r, x in g.items()} for s, g in case["gain"].items()}
            print(f"  {case['lengths']}, {case['slots']} at once, decoding "
                  f"{case['decoding_share']:.0%}: {gains}, rate for {GAIN}: "
                  f"{case['needed_rate']}, filled {case['bound_of_filled_slots']:.2f}")  # fmt: skip
    print(f"written: {record('decode_tail', figures)}")


if __name__ == "__main__":
    main()
