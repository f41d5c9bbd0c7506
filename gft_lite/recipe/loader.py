"""Recipe files as nested dicts: YAML, `extends`, `key=value` overrides, and line numbers.

The dict is checked against the schema in `base.read_settings`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from gft_lite.recipe.validation_errors import At, Place, Places
from gft_lite.utils.errors import RecipeError, dotted_path, nearest, short_repr
from gft_lite.utils.paths import PACKAGE
from gft_lite.utils.secrets import find_secret

MAX_BYTES, MAX_VALUES, MAX_DEPTH, MAX_BITS = 100_000, 10_000, 20, 64

Tree = dict[str, Any]
COMMAND_LINE = "command line"


class Loader(yaml.SafeLoader):
    """Safe YAML with the numbers of YAML 1.2: `1e-5` is one, `6:2` is text."""


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
    """Writes YAML that `Loader` reads back as the same values."""


Dumper.yaml_implicit_resolvers = Loader.yaml_implicit_resolvers


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML writes some line breaks unescaped in single quotes and reads them as spaces.
    style = None if text.replace("\n", "").isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Dumper.add_representer(str, _write_text)


def find_recipe(path: str | Path, folder: Path | None = None) -> Path:
    """The file at `path` relative to `folder` (default: working directory), or a shipped one.

    Shipped recipes are next to the package in a checkout and inside it in a wheel.

    Raises: RecipeError with the nearest file name.
    """
    roots = [folder or Path(), PACKAGE.parent, PACKAGE / "shipped"]
    for root in roots:
        if os.path.isfile(root / path):
            short = Path(os.path.normpath(root / path))  # Another file if `..` follows a link.
            return short if short.exists() and short.samefile(root / path) else root / path
    files = [
        file if Path(path).is_absolute() else Path(os.path.relpath(file, root))
        for root in roots
        for subfolder in (Path(path).parent, "recipes")
        for file in (root / subfolder).glob("*.yaml")
    ]
    close = nearest(Path(path).stem, [f.stem for f in files])
    hint = next((f" Did you mean {f}?" for f in files if f.stem == close), "")
    raise RecipeError([f"must be a recipe file, got {str(path)!r}, which does not exist.{hint}"])


def read_tree(path: Path, overrides: Sequence[str] = ()) -> tuple[Tree, Places]:
    """The merged tree of a recipe file, and the place of each value.

    Raises: RecipeError for unreadable files, wrong `extends` and malformed overrides.
    """
    tree, places, problems = gather(path, overrides)
    if problems:
        raise RecipeError(problems)
    return tree, places


def read_overrides(overrides: Sequence[str]) -> Tree:
    """The tree of `key=value` overrides alone. Raises: RecipeError for malformed ones."""
    reader = _Reader()
    nothing: Layer = ({}, {})
    tree, _ = reduce(_merge_layers, map(reader.override, overrides), nothing)
    if reader.problems:
        raise RecipeError(reader.problems)
    return tree


def gather(path: Path, overrides: Sequence[str] = ()) -> tuple[Tree, Places, list[str]]:
    """The merged tree as far as it is readable, the place of each value, and the errors."""
    reader = _Reader()
    layers = [reader.file(path), *map(reader.override, overrides)]
    return *reduce(_merge_layers, layers), reader.problems


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> Tree:
    """The values of `high` over those of `low`: mappings are merged, other values replaced."""
    merged = dict(low)
    for key, value in high.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(old or {}, value) if both else value
    return merged


def without_fields(tree: Mapping[str, Any], fields: Iterable[str]) -> Tree:
    """The tree without the fields of these dotted names."""
    rest = dict(tree)
    for field in fields:
        name, _, below = field.partition(".")
        if not below:
            rest.pop(name, None)
        elif isinstance(rest.get(name), Mapping):
            rest[name] = without_fields(rest[name], [below])
    return rest


def only_fields(tree: Mapping[str, Any], fields: Iterable[str]) -> Tree:
    """The fields of these dotted names that the tree has."""
    kept: Tree = {}
    for field in fields:
        name, _, below = field.partition(".")
        if name in tree and not below:
            kept[name] = tree[name]
        elif isinstance(tree.get(name), Mapping) and (part := only_fields(tree[name], [below])):
            kept = merge(kept, {name: part})
    return kept


def nested(field: str, value: Any) -> Tree:
    """The tree with one field, by its dotted name."""
    for name in reversed(field.split(".")):
        value = {name: value}
    return value


Layer = tuple[Tree, Places]


def _merge_layers(low: Layer, high: Layer) -> Layer:
    """Merge two layers; places inside of a list that `high` replaces are dropped."""

    def is_kept(at: At) -> bool:
        item = next((i for i, part in enumerate(at) if isinstance(part, int)), None)
        return item is None or at[:item] not in high[1]

    places = {at: place for at, place in low[1].items() if is_kept(at)}
    return merge(low[0], high[0]), places | high[1]


class _Reader:
    """Reads one recipe; collects its errors and caches the layer of each file."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.layers: dict[Path, Layer] = {}

    def file(self, path: Path, parents: tuple[Path, ...] = ()) -> Layer:
        """The layer of a file and its bases; that of an unreadable file is empty."""
        resolved = path.resolve()
        if resolved not in self.layers:
            tree, places = self._parse_file(path)
            bases = self._bases(path, tree.pop("extends", None), places, (*parents, resolved))
            self.layers[resolved] = reduce(_merge_layers, [*bases, (tree, places)])
        return self.layers[resolved]

    def override(self, text: str) -> Layer:
        """The layer of one `key=value`; that of a malformed one is empty."""
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
                self.problems.append(_error_text(error, raw, COMMAND_LINE, f"{key}: "))
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
            self.problems.append(_error_text(error, text, str(path)))
            return nothing
        if isinstance(tree, dict):
            return tree, nothing[1] | places
        got = "an empty file" if tree is None else f"a {type(tree).__name__}"
        rule = f"must hold fields such as `method: gft`, got {got}"
        self.problems.append(f"{path}: {rule}.")
        return nothing


# --- YAML ------------------------------------------------------------------------------------


class _InvalidYaml(yaml.MarkedYAMLError):
    """YAML that PyYAML accepts and a recipe must not hold."""

    def __init__(self, problem: str, node: yaml.Node) -> None:
        super().__init__(problem=problem, problem_mark=node.start_mark)


def _parse(text: str, file: str, at: At = ()) -> tuple[Any, Places]:
    """The value of a YAML text, and the places of its keys and items.

    Raises: yaml.YAMLError.
    """
    loader = Loader(text)
    places: Places = {at[: i + 1]: Place(file) for i in range(len(at))}
    try:
        node = loader.get_single_node()
    except RecursionError:
        raise yaml.YAMLError(f"values nested more than {MAX_DEPTH} deep") from None
    if node is None:
        return None, places
    # With aliases, a short text may expand to billions of values, or to infinitely many.
    for count, (where, part) in enumerate(_walk(loader, node, at)):
        if where in places:
            raise _InvalidYaml(
                f"{dotted_path(where)}: must be written once, got a second one", part
            )
        if count >= MAX_VALUES:
            raise _InvalidYaml(
                f"must hold at most {MAX_VALUES} values, got more (aliases count)", part
            )
        line = None if file == COMMAND_LINE else part.start_mark.line + 1
        places[where] = Place(file, line)
    return loader.construct_document(node), places


def _walk(loader: Loader, node: yaml.Node, at: At) -> Iterator[tuple[At, yaml.Node]]:
    """Every key and item below a node, with its path. Raises: _InvalidYaml."""
    if len(at) > MAX_DEPTH:
        rule = f"{at[0]}: must not be nested more than {MAX_DEPTH} deep, got more"
        raise _InvalidYaml(rule, node)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                got = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a list or section"
                where = dotted_path(at) or "recipe"
                raise _InvalidYaml(
                    f"{where}: must have text as keys, got {got}. Put it in quotes", key
                )
            yield (*at, key.value), key
            yield from _walk(loader, value, (*at, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            yield (*at, i), item
            yield from _walk(loader, item, (*at, i))
    else:
        if find_secret(node.value):
            rule = f"{dotted_path(at)}: must not hold a token or a password, got one"
            raise _InvalidYaml(f"{rule}. Put it into the environment, such as HF_TOKEN", node)
        try:
            value = loader.construct_object(node)
            if isinstance(value, int) and value.bit_length() > MAX_BITS:
                raise ValueError("no count and no seed is that large")
        # PyYAML's conversions raise these for values such as 2024-13-45 and `!!bool maybe`.
        except (ValueError, KeyError, IndexError, AttributeError):
            kind = node.tag.rpartition(":")[2]
            rule = f"{dotted_path(at)}: must be a valid {kind}, got {short_repr(node.value)}"
            raise _InvalidYaml(f"{rule}. For text, put it in quotes", node) from None


def _error_text(error: yaml.YAMLError, text: str, file: str, field: str = "") -> str:
    """One line about an error in the YAML itself."""

    def at(line: int) -> str:
        return file if file == COMMAND_LINE else f"{file}:{line + 1}"

    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position)
        return f"{at(line)}: {field}must be text, got the character {chr(error.character)!r}."
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"{file}: {field}must be valid YAML, got {error}."
    if isinstance(error, _InvalidYaml):
        named = str(error.problem).startswith(field.removesuffix(": "))
        return f"{at(mark.line)}: {'' if named else field}{error.problem}."
    lines = [*text.splitlines(), ""]
    got = short_repr(lines[min(mark.line, len(lines) - 1)])
    problem = str(getattr(error, "problem", error))
    hint = " Indent with spaces, not tabs." if "\\t" in problem else ""
    return f"{at(mark.line)}: {field}must be valid YAML, got {got} ({problem}).{hint}"
