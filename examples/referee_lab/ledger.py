"""Where the learning signal of runs on the lab went, from their token ledgers and evaluations.

    python examples/referee_lab/ledger.py RUN [RUN ...]

The runs need `log.tokens: true`. The push of a token is the gradient of the loss by its logit,
c (1 - p), where c is the loss's coefficient (A C(p) for GFT) and p the policy's probability. Of
each run: the share of the absolute pushes by source and sign; those of right demonstrations' tokens
by p; and pass@1 by skill: problems of `gap` have the operator that the base does not know.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from gft_lite.evaluation.metrics import by_problem
from gft_lite.lab.task import rows

BANDS = (0.01, 0.1, 0.5, 0.9, 1.0)


def responses(run: Path) -> Iterator[dict[str, Any]]:
    """The record of each response that was trained on."""
    for file in sorted((run / "tokens").glob("step-*.json")):
        for group in json.loads(file.read_bytes())["groups"]:
            yield from (response for response in group["responses"] if response)


def pushes(response: dict[str, Any]) -> Iterator[tuple[float, float, float]]:
    """The probability, the coefficient and the push of each token."""
    for logprob, value in zip(response["logprob"], response["coefficient"], strict=True):
        p = math.exp(logprob)
        yield p, value, value * (1 - p)


def shares(run: Path) -> dict[str, float]:
    """The share of the absolute pushes by source and sign."""
    sums: dict[str, float] = defaultdict(float)
    for response in responses(run):
        for _, value, push in pushes(response):
            sums[f"{response['source']} {'+' if value > 0 else '-'}"] += abs(push)
    total = sum(sums.values())
    return {name: value / total for name, value in sorted(sums.items())}


def by_probability(run: Path) -> Iterator[tuple[float, int, float, float]]:
    """Of right demonstrations' tokens, by band of p: its upper bound, tokens, mean c, share.

    The share is that of the band in the sum of all absolute pushes of the run.
    """
    found: dict[float, list[tuple[float, float]]] = {band: [] for band in BANDS}
    total = 0.0
    for response in responses(run):
        for p, value, push in pushes(response):
            total += abs(push)
            if response["source"] != "self" and response["advantage"] > 0:
                found[next(b for b in BANDS if p <= b)].append((value, push))
    for band, tokens in found.items():
        if tokens:
            yield band, len(tokens), fmean(c for c, _ in tokens), sum(p for _, p in tokens) / total


def pass_by_skill(run: Path, split: str) -> dict[str, tuple[int, float, float]]:
    """Of each skill of a split: problems, pass@1 of the base, pass@1 of the trained policy."""
    before, after = (
        by_problem(json.loads((run / "eval" / f"{name}.json").read_bytes())[split])
        for name in ("base", "trained")
    )
    found: dict[str, list[str]] = defaultdict(list)
    for row in rows(split):
        if row["id"] in after:
            found[row["skill"]].append(row["id"])
    return {
        skill: (len(ids), fmean(before[i] for i in ids), fmean(after[i] for i in ids))
        for skill, ids in found.items()
    }


def main() -> None:
    """Print the figures of each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    for run in parser.parse_args().runs:
        print(f"\n{run.name}")
        print("  " + "  ".join(f"{name} {share:.0%}" for name, share in shares(run).items()))
        for band, count, mean, share in by_probability(run):
            print(f"  p <= {band:<4}  {count:6,} tokens  mean c {mean:.3f}  share {share:.1%}")
        for split in ("test", "retention"):
            for skill, (count, base, trained) in pass_by_skill(run, split).items():
                print(f"  {split} {skill}: {count} problems, pass@1 {base:.3f} -> {trained:.3f}")


if __name__ == "__main__":
    main()
