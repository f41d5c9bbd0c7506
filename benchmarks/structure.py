"""The structure of the code in figures: import levels, arrows, cycles, long functions and files.

`python -m benchmarks.structure [FOLDER]` prints them for the package in FOLDER (default: this
checkout). `tests/unit/test_structure.py` holds the limits.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "gft_lite"
STEP_FILES = (
    "training/loop.py",
    "training/groups.py",
    "training/learner.py",
    "objective/losses.py",
    "objective/methods.py",
)

Graph = Mapping[str, frozenset[str]]


@dataclass(frozen=True, slots=True)
class Function:
    """A function or method; `lines` counts from `def` to its last line, docstring included."""

    file: str
    name: str
    lines: int
    parameters: int


@dataclass(frozen=True, slots=True)
class Structure:
    """What was measured. `eager` has the imports that run when a module is imported, `all` also
    those inside functions and under TYPE_CHECKING."""

    files: Mapping[str, int]
    functions: tuple[Function, ...]
    eager: Graph
    all: Graph


def measure(root: Path = ROOT) -> Structure:
    """Parse every file of the package in `root`."""
    paths = sorted((root / PACKAGE).rglob("*.py"))
    modules = {_module_name(path, root): path for path in paths}
    files, functions = {}, []
    eager, everything = {}, {}
    for name, path in modules.items():
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        relative = str(path.relative_to(root / PACKAGE))
        files[relative] = len(text.splitlines())
        functions += _functions(tree, relative)
        eager[name] = _imports(_eager_nodes(tree), modules, name)
        everything[name] = _imports(ast.walk(tree), modules, name)
    return Structure(files, tuple(functions), eager, everything)


def _module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _functions(tree: ast.Module, file: str) -> Iterator[Function]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            given = node.args
            count = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)
            yield Function(file, node.name, lines, count)


def _eager_nodes(tree: ast.Module) -> Iterator[ast.AST]:
    """The statements that run on import: neither function bodies nor `if TYPE_CHECKING`."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        pending += ast.iter_child_nodes(node)


def _imports(nodes: Iterator[ast.AST], modules: Mapping[str, Path], own: str) -> frozenset[str]:
    """The modules of the package that `nodes` import."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in modules}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules else node.module)
    return frozenset(name for name in found if name in modules and name != own)


def components(graph: Graph) -> list[frozenset[str]]:
    """The strongly connected components, importing ones after the imported (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[frozenset[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            at = stack.index(name)
            found.append(frozenset(stack[at:]))
            del stack[at:]

    for name in graph:
        if name not in index:
            visit(name)
    return found


def levels(graph: Graph) -> dict[str, int]:
    """Each module's level: 1 if it imports nothing, else one more than the highest imported.

    The modules of a cycle share a level.
    """
    found: dict[str, int] = {}
    for members in components(graph):
        below = [found[o] for name in members for o in graph[name] if o not in members]
        found |= dict.fromkeys(members, 1 + max(below, default=0))
    return found


def cycles(graph: Graph) -> list[frozenset[str]]:
    """Modules that import each other, directly or through others."""
    return [members for members in components(graph) if len(members) > 1]


def arrows_in_cycles(graph: Graph) -> int:
    """The imports between modules of one cycle: at least one arrow of each cycle goes up."""
    return sum(len(graph[name] & members) for members in cycles(graph) for name in members)


def packages(graph: Graph) -> Graph:
    """The graph of the packages and modules at the top."""

    def top(name: str) -> str:
        return ".".join(name.split(".")[:2])

    edges: dict[str, set[str]] = {top(name): set() for name in graph if name != PACKAGE}
    for name, imported in graph.items():
        if name != PACKAGE:
            edges[top(name)] |= {top(o) for o in imported if o != PACKAGE} - {top(name)}
    return {name: frozenset(imported) for name, imported in edges.items()}


def report(root: Path) -> Iterator[str]:
    """The figures as lines of text."""
    found = measure(root)
    tops = packages(found.all)
    yield f"files {len(found.files)}, lines {sum(found.files.values()):,}"
    yield f"files beside the packages {sum('/' not in file for file in found.files)}"
    for kind, graph in (
        ("modules", found.all),
        ("modules, eager", found.eager),
        ("packages", tops),
    ):
        names = ["+".join(sorted(c)).replace(f"{PACKAGE}.", "") for c in cycles(graph)]
        yield (
            f"import graph of {kind}: {max(levels(graph).values())} levels, "
            f"{sum(map(len, graph.values()))} arrows, {arrows_in_cycles(graph)} in cycles {names}"
        )
    for file in STEP_FILES:
        if file in found.files:
            yield f"step: {file} {found.files[file]} lines"
    for file, lines in sorted(found.files.items(), key=lambda item: -item[1])[:10]:
        yield f"longest files: {lines:4} {file}"
    for one in sorted(found.functions, key=lambda one: -one.lines)[:10]:
        yield f"longest functions: {one.lines:4} {one.file}:{one.name}"
    many = sum(one.parameters > 5 for one in found.functions)
    yield f"functions {len(found.functions)}, with more than five parameters {many}"


if __name__ == "__main__":
    print(*report(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT), sep="\n")
