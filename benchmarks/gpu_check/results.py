"""Which results have met a GPU: `benchmarks/results/README.md`, written from the results.

`python -m benchmarks.gpu_check.results` writes it anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.parts import is_answered
from benchmarks.gpu_check.table import is_wrong
from benchmarks.record import RESULTS

HEAD = """\
# Results

Written by `python -m benchmarks.gpu_check.results` from the files beside it, each of which names
its machine, its versions and its date. What was measured on a CPU says nothing about times and
memory on a GPU; tokens, bytes and gradients that are counted or compared hold on any device.
"""


def written(folder: Path = RESULTS) -> str:
    """The text for the results in a folder."""
    documents = {
        file.name: json.loads(file.read_text(encoding="utf-8"))
        for file in sorted(folder.glob("*.json"))
    }
    check = documents.get("gpu_check.json")
    lines = [HEAD, "| file | date | measured on | has met a GPU |", "| --- | --- | --- | --- |"]
    for name, document in documents.items():
        machine = document["machine"]
        where = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
        met = "yes" if machine["gpu"] else "no"
        lines.append(f"| `{name}` | {document['date']} | {where} | {met} |")
    if check:
        lines += ["", *_parts(check)]
    return "\n".join(lines) + "\n"


def _parts(check: dict[str, Any]) -> list[str]:
    """How each part of the check ended, and on what."""
    where = check["machine"]["gpu"] or "a CPU"
    size = ", with tiny models" if check["tiny"] else ""
    lines = [f"`gpu_check.json` in parts, run on {where}{size}:", "",
             "| part | ended | cases | failed | wrong | has met a GPU |",
             "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for name, entry in check["figures"].items():
        cases = entry["cases"].values()
        failed, wrong = sum("error" in c for c in cases), sum(map(is_wrong, cases))
        answered = any(map(is_answered, cases))
        met = "yes" if check["machine"]["gpu"] and answered else "no"
        status = entry["status"].splitlines()[0].replace("|", "/")
        lines.append(f"| {name} | {status} | {len(cases)} | {failed} | {wrong} | {met} |")
    return lines


def main() -> None:
    """Write it."""
    file = RESULTS / "README.md"
    file.write_text(written(), encoding="utf-8")
    print(f"written: {file}")


if __name__ == "__main__":
    main()
