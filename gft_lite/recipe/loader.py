"""Recipe files: YAML and what it `extends`, `key=value` overrides, and where each value stands.

This module knows no schema: it ends at a nested dict. `recipe.py` checks it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from gft_lite.recipe.validation_errors import At, Place, Places
from gft_lite.utils.errors import RecipeError, dotted_path, nearest, short_repr
from gft_lite.utils.paths import PACKAGE
from gft_lite.utils.secrets import find_secret

MAX_BYTES, MAX_VALUES, MAX_DEPTH = 100_000, 10_000, 20

Tree = dict[str, Any]
COMMAND_LINE = "command line"


class Loader(yaml.SafeLoader):
    """Safe YAML in which `1e-5` is a number and `6:2` is none, as in YAML 1.2 and not in 1.1."""


_NUMBERS = {
    "float": r"[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+"
    r"|\.\d[\d_]*(?:[eE][-+]?\d+)?|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$",
    "int": r"[-+]?(?:0b[01_]+|0[0-7_]+|0|[1-9][\d_]*|0x[\da-fA-F_]+)$",
}
Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag.rpartition(":")[2] not in _NUMBERS]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _pattern in _NUMBERS.items():
    Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(_pattern), list("-+0123456789.")
    )


class Dumper(yaml.SafeDumper):
    """The loader's counterpart: quotes what the loader would read as a number."""


Dumper.yaml_implicit_resolvers = Loader.yaml_implicit_resolvers


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML writes some line breaks raw in single quotes and then reads them as spaces.
    style = None if text.replace("\n", "").isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Dumper.add_representer(str, _write_text)


def find_recipe(path: str | Path, beside: Path | None = None) -> Path:
    """The file at `path`, seen from `beside` or the working directory, or the shipped one.

    Shipped recipes lie beside the package in a checkout and inside it in a wheel.

    Raises: RecipeError with the nearest file name.
    """
    roots = [beside or Path(), PACKAGE.parent, PACKAGE / "shipped"]
    for root in roots:
        if os.path.isfile(root / path):
            tidy = Path(os.path.normpath(root / path))  # Differs where `..` follows a link.
            return tidy if tidy.exists() and tidy.samefile(root / path) else root / path
    files = [
        file if Path(path).is_absolute() else Path(os.path.relpath(file, root))
        for root in roots
        for folder in (Path(path).parent, "recipes")
        for file in (root / folder).glob("*.yaml")
    ]
    close = nearest(Path(path).stem, [f.stem for f in files])
    hint = next((f" Did you mean {f}?" for f in files if f.stem == close), "")
    raise RecipeError([f"must be a recipe file, got {str(path)!r}, which does not exist.{hint}"])


def read_tree(path: Path, overrides: Sequence[str] = ()) -> tuple[Tree, Places]:
    """The merged tree of a recipe file and where each of its values was written.

    Raises: RecipeError for unreadable files, wrong `extends` and malformed overrides.
    """
    tree, places, problems = gather(path, overrides)
    if problems:
        raise RecipeError(problems)
    return tree, places


def gather(path: Path, overrides: Sequence[str] = ()) -> tuple[Tree, Places, list[str]]:
    """What could be read, where it was written, and one text for each thing that could not."""
    reader = _Reader()
    layers = [reader.file(path), *map(reader.override, overrides)]
    return *reduce(_over, layers), reader.problems


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> Tree:
    """`high` over `low`: mappings are merged key by key, everything else is replaced."""
    merged = dict(low)
    for key, value in high.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(old or {}, value) if both else value
    return merged


Layer = tuple[Tree, Places]


def _over(low: Layer, high: Layer) -> Layer:
    """Layers merged; of a list that `high` replaces, no old lines are left."""

    def kept(at: At) -> bool:
        item = next((i for i, part in enumerate(at) if isinstance(part, int)), None)
        return item is None or at[:item] not in high[1]

    places = {at: place for at, place in low[1].items() if kept(at)}
    return merge(low[0], high[0]), places | high[1]


class _Reader:
    """One reading of a recipe: what is wrong so far, and the layers of files already read."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.layers: dict[Path, Layer] = {}

    def file(self, path: Path, parents: tuple[Path, ...] = ()) -> Layer:
        """A file over everything that it extends; an unreadable one counts as empty."""
        resolved = path.resolve()
        if resolved not in self.layers:
            tree, places = self._parse_file(path)
            bases = self._bases(path, tree.pop("extends", None), places, (*parents, resolved))
            self.layers[resolved] = reduce(_over, [*bases, (tree, places)])
        return self.layers[resolved]

    def override(self, text: str) -> Layer:
        """One `key=value`; a malformed one counts as empty."""
        key, equals, raw = (part.strip() for part in text.partition("="))
        names = tuple(key.split("."))
        if not equals or not all(names):
            self.problems.append(f"{COMMAND_LINE}: must be key=value, got {text!r}.")
        elif names[0] == "extends":
            rule = "extends: must be written in a file"
            self.problems.append(f"{COMMAND_LINE}: {rule}, got {text!r}.")
        else:
            try:
                value, places = _parse(raw, COMMAND_LINE, names)
                for name in reversed(names):
                    value = {name: value}
                return value, places
            except yaml.YAMLError as error:
                self.problems.append(_in_words(error, raw, COMMAND_LINE, f"{key}: "))
        return {}, {}

    def _bases(
        self, path: Path, written: Any, places: Places, parents: tuple[Path, ...]
    ) -> list[Layer]:
        bases = [written] if isinstance(written, str) else written or []
        if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
            where = places[("extends",)]
            rule = f"must be a list of files, got {short_repr(written)}"
            self.problems.append(f"{where}: extends: {rule}.")
            return []
        layers = []
        for i, base in enumerate(bases):
            where = places.get(("extends", i), places[("extends",)])
            try:
                file = find_recipe(base, path.parent)
            except RecipeError as error:
                self.problems.append(f"{where}: extends: {error}")
                continue
            if file.resolve() in parents:
                circle = [*parents[parents.index(file.resolve()) :], file]
                chain = " -> ".join(p.name for p in circle)
                self.problems.append(f"{where}: extends: must not be circular, got {chain}.")
            else:
                layers.append(self.file(file, parents))
        return layers

    def _parse_file(self, path: Path) -> Layer:
        nothing: Layer = {}, {(): Place(str(path)), ("extends",): Place(str(path))}
        try:
            size = path.stat().st_size
            if size > MAX_BYTES:
                rule = f"must be smaller than {MAX_BYTES // 1000} kB, got {size // 1000} kB"
                self.problems.append(f"{path}: {rule}.")
                return nothing
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            self.problems.append(f"{path}: must be a text file in UTF-8, got {error.reason}.")
            return nothing
        except OSError as error:
            self.problems.append(f"{path}: must be a readable file, got {error.strerror}.")
            return nothing
        try:
            tree, places = _parse(text, str(path))
        except yaml.YAMLError as error:
            self.problems.append(_in_words(error, text, str(path)))
            return nothing
        if isinstance(tree, dict):
            return tree, nothing[1] | places
        got = "an empty file" if tree is None else f"a {type(tree).__name__}"
        rule = f"must hold fields such as `method: gft`, got {got}"
        self.problems.append(f"{path}: {rule}.")
        return nothing


# --- YAML ------------------------------------------------------------------------------------


class _Broken(yaml.MarkedYAMLError):
    """YAML that PyYAML would take and that a recipe must not hold."""

    def __init__(self, problem: str, node: yaml.Node) -> None:
        super().__init__(problem=problem, problem_mark=node.start_mark)


def _parse(text: str, file: str, at: At = ()) -> tuple[Any, Places]:
    """The value of a YAML text, and where its keys and items stand. Raises: yaml.YAMLError."""
    loader = Loader(text)
    places: Places = {at[: i + 1]: Place(file) for i in range(len(at))}
    try:
        node = loader.get_single_node()
    except RecursionError:
        raise yaml.YAMLError(f"values nested more than {MAX_DEPTH} deep") from None
    if node is None:
        return None, places
    # Aliases make a graph of it, which may stand for billions of values, or for no end of them.
    for count, (where, part) in enumerate(_walk(loader, node, at)):
        if where in places:
            raise _Broken(f"{dotted_path(where)}: must be written once, got a second one", part)
        if count >= MAX_VALUES:
            raise _Broken(f"must hold at most {MAX_VALUES} values, got more (aliases count)", part)
        line = None if file == COMMAND_LINE else part.start_mark.line + 1
        places[where] = Place(file, line)
    return loader.construct_document(node), places


def _walk(loader: Loader, node: yaml.Node, at: At) -> Iterator[tuple[At, yaml.Node]]:
    """Every key and item under a node, with its path."""
    if len(at) > MAX_DEPTH:
        raise _Broken(f"must not be nested more than {MAX_DEPTH} deep, got more", node)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                got = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a list or section"
                where = dotted_path(at) or "recipe"
                raise _Broken(f"{where}: must have text as keys, got {got}. Put it in quotes", key)
            yield (*at, key.value), key
            yield from _walk(loader, value, (*at, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            yield (*at, i), item
            yield from _walk(loader, item, (*at, i))
    else:
        if find_secret(node.value):
            rule = f"{dotted_path(at)}: must not hold a token or a password, got one"
            raise _Broken(f"{rule}. Put it into the environment, such as HF_TOKEN", node)
        try:
            value = loader.construct_object(node)
            if isinstance(value, int) and value.bit_length() > 64:
                raise ValueError("no count and no seed is that large")
        # PyYAML's own conversions raise these for values such as 2024-13-45 and `!!bool maybe`.
        except (ValueError, KeyError, IndexError, AttributeError):
            kind = node.tag.rpartition(":")[2]
            rule = f"{dotted_path(at)}: must be a valid {kind}, got {short_repr(node.value)}"
            raise _Broken(f"{rule}. For text, put it in quotes", node) from None


def _in_words(error: yaml.YAMLError, text: str, file: str, field: str = "") -> str:
    """The text of an error in the YAML itself."""

    def at(line: int) -> str:
        return file if file == COMMAND_LINE else f"{file}:{line + 1}"

    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position)
        return f"{at(line)}: {field}must be text, got the character {chr(error.character)!r}."
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"{file}: {field}must be valid YAML, got {error}."
    if isinstance(error, _Broken):
        return f"{at(mark.line)}: {error.problem}."
    lines = [*text.splitlines(), ""]
    got = short_repr(lines[min(mark.line, len(lines) - 1)])
    problem = str(getattr(error, "problem", error))
    hint = " Indent with spaces, not tabs." if "\\t" in problem else ""
    return f"{at(mark.line)}: {field}must be valid YAML, got {got} ({problem}).{hint}"
