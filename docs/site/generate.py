"""The pages of the site that follow from the code: commands, recipe fields, methods, metrics."""

from __future__ import annotations

from collections.abc import Callable

PAGES: dict[str, Callable[[], str]] = {
    f"reference/{name}.md": (lambda name=name: f"# {name}\n")
    for name in ("cli", "recipe", "methods", "metrics")
}
