"""Bases of the laboratory that are pretrained with other seeds than the shipped one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console


def lab_seed(base: str) -> int | None:
    """The pretraining seed of a base `lab:SEED`; None for every other model."""
    found = re.fullmatch(r"lab:(\d{1,9})", base)
    return int(found[1]) if found else None


def lab_base(seed: int, folder: Path) -> str:
    """The model of the laboratory with a pretraining seed: the shipped one for 0."""
    return "lab" if seed == 0 else str(folder / str(seed))


def make_lab_bases(seeds: Iterable[int], folder: Path, jobs: int, console: Console) -> None:
    """Pretrain those that are not in the folder yet, `jobs` at a time; minutes each."""
    missing = [s for s in seeds if s and not Path(lab_base(s, folder)).exists()]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda seed: _pretrain(seed, folder, console), missing))


def _pretrain(seed: int, folder: Path, console: Console) -> None:
    console.print(f"pretraining the base of seed {seed}")
    final = Path(lab_base(seed, folder))
    partial = final.with_suffix(".new")
    command = [sys.executable, "-P", "-m", "gft_lite.lab.pretrain",
               "--seed", str(seed), "--out", str(partial)]  # fmt: skip
    done = subprocess.run(  # Its output is that of libraries, and of no use unless it fails.
        command, capture_output=True, text=True, encoding="utf-8", errors="replace",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"pretraining the base lab:{seed} failed: {last}")
    partial.rename(final)
