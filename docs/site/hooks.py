"""Hooks of mkdocs: generated pages, Markdown from outside of docs/, and equations as MathML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import generate
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
# Shown where they lie, under the same path, so that links between them hold.
INCLUDED = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/gpu_check/README.md",
    "benchmarks/results/README.md",
    "recipes/README.md",
    "examples/lab_study.md",
    "examples/referee_lab.md",
    "examples/referee_lab/referee.html",
    "examples/referee_real.md",
    "examples/referee_real/referee.html",
    "examples/real/report.html",
    "examples/real/README.md",
    *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("examples/lab_study/*.svg"))),
    *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("benchmarks/results/*.png"))),
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Render fences ```math as MathML, which needs no script in the page."""
    fence = {"name": "math", "class": "math", "format": _math}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the files that lie elsewhere, and the pages that follow from the code."""
    for path in INCLUDED:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for path, make in generate.PAGES.items():
        files.append(File.generated(config, path, content=make()))
    return files


def _math(source: str, *_: Any, **__: Any) -> str:
    return f'<div class="math">{convert(source, display="block")}</div>'
