"""The cost of a step by K, response length, prompt length, vocabulary and width of the model.

One group, gradients of the GFT loss, in the `shared` and the `padded` layout; the other sizes are
fixed. CPU-seconds of one thread, the lowest of several turns, alternating the layouts. The plot is
results/scaling.png. With `--model FOLDER`, or `--model smollm2`, on the weights of a real model, by
the response length alone; the plot is then results/scaling_MODEL.png.
"""

from __future__ import annotations

import argparse
import logging
import random
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.real_model import find_model
from benchmarks.record import RESULTS, record
from benchmarks.recorded import Forwarded, Shape, make_model
from gft_lite.policy.batching import Row
from gft_lite.policy.registry import load_policy
from gft_lite.recipe.schema import Recipe
from gft_lite.training.learner import Learner
from gft_lite.utils.errors import UserError

LAYOUTS = ("shared", "padded")
MICRO_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Point:
    """One group on one model; responses are half to one and a half times `response` long."""

    members: int = 8
    response: int = 128
    prompt: int = 256
    vocab: int = 4096
    hidden: int = 256
    model: str = ""

    def rows(self) -> list[Row]:
        """The group as rows of random tokens, none with advantage 0."""
        draw = random.Random(0)

        def tokens(count: int) -> tuple[int, ...]:
            return tuple(draw.randrange(2, self.vocab) for _ in range(count))

        prompt, spread = tokens(self.prompt), max(1, self.members - 1)
        lengths = [self.response // 2 + self.response * i // spread for i in range(self.members)]
        weight = 1 / sum(lengths)
        return [Row(prompt, tokens(n), (-1.0) ** i, weight) for i, n in enumerate(lengths)]


SWEEPS: dict[str, tuple[int, ...]] = {
    "members": (2, 4, 8, 16),
    "response": (32, 128, 512),
    "prompt": (64, 256, 1024),
    "vocab": (4096, 16384, 65536),
    "hidden": (128, 256, 512),
}
REAL_SWEEPS = {"response": (16, 64, 256)}


def measure(point: Point, turns: int) -> dict[str, dict[str, float]]:
    """CPU-seconds and forwarded tokens, each per trained token, of both layouts."""
    rows = point.rows()
    tokens = sum(len(row.response_ids) for row in rows)
    shape = Shape(hidden=point.hidden, layers=2, ffn=11 * point.hidden // 4, vocab=point.vocab,
                  model=point.model)  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name), shape)
        sides = {layout: _side(Path(name), layout) for layout in LAYOUTS}
        counters = {layout: Forwarded(side.policy.model) for layout, side in sides.items()}
        seconds: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
        for _ in range(1 + turns):
            for layout, learner in sides.items():
                counters[layout].reset()
                start = time.process_time()
                learner.gradient(rows)
                seconds[layout].append(time.process_time() - start)
    return {
        layout: {
            "cpu_seconds_per_1000": 1000 * min(seconds[layout][1:]) / tokens,
            "forwarded_per_trained": counters[layout].counts["with_gradient"] / tokens,
        }
        for layout in LAYOUTS
    }


def _side(folder: Path, layout: str) -> Learner:
    recipe = Recipe.from_tree(
        {"method": "gft", "policy": {"model": str(folder), "quantization": "none",
                                     "adapter": str(folder / "adapter"), "layout": layout},
         "train": {"micro_batch_tokens": MICRO_BATCH_TOKENS}}
    )  # fmt: skip
    policy = load_policy(recipe.policy)
    policy.model.train()
    return Learner(policy, recipe)


def sweep(sweeps: dict[str, tuple[int, ...]], middle: Point, turns: int) -> dict[str, Any]:
    """{what grows: {value: figures}}."""
    known: dict[Point, Any] = {}
    found: dict[str, Any] = {}
    for name, values in sweeps.items():
        for value in values:
            point = replace(middle, **{name: value})
            if point not in known:
                known[point] = measure(point, turns)
            found.setdefault(name, {})[value] = known[point]
            print(f"{name} {value}: {known[point]}", flush=True)
    return found


def plot(found: dict[str, Any], file: Path) -> None:
    """Both costs against each thing that grows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * max(len(found), 2), 5.5), layout="constrained")
    kinds = {"cpu_seconds_per_1000": "CPU-s per 1,000 trained tokens",
             "forwarded_per_trained": "forwarded per trained token"}  # fmt: skip
    axes = figure.subplots(len(kinds), len(found), sharey="row", squeeze=False)
    for line, (kind, label) in zip(axes, kinds.items(), strict=True):
        for place, (name, points) in zip(line, found.items(), strict=True):
            for layout in LAYOUTS:
                costs = [figures[layout][kind] for figures in points.values()]
                place.plot(list(points), costs, marker="o", label=layout)
            place.set(xscale="log", xlabel=name)
            place.set_xticks(list(points), [str(value) for value in points])
            place.minorticks_off()
            place.grid(alpha=0.3)
        line[0].set(ylabel=label, ylim=(0, None))
    axes[0][0].legend()
    figure.savefig(file, dpi=90)


def main() -> None:
    """Measure, print, plot and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--model", default="", help="smollm2 or the folder of a real model")
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    sweeps, middle, name = SWEEPS, Point(), "scaling"
    if asked.model:
        try:
            folder = find_model(asked.model)
        except UserError as error:
            print(f"skipped: {error}")
            return
        middle = Point(members=4, prompt=64, model=str(folder))
        sweeps, name = REAL_SWEEPS, f"scaling_{folder.name}"
    found = sweep(sweeps, middle, asked.turns)
    about = asdict(middle) | {"model": Path(middle.model).name}
    written = record(name, {"middle": about, "sweeps": found})
    plot(found, RESULTS / f"{name}.png")
    print(f"written: {written}")


if __name__ == "__main__":
    main()
