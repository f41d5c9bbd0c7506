"""The pages of the site that follow from the code: commands, recipe fields, methods, metrics."""

from __future__ import annotations

import argparse
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gft_lite.cli.entry_point import make_parser
from gft_lite.objective.methods import METHODS
from gft_lite.recipe import Recipe
from gft_lite.recipe.annotations import section_class, union_members
from gft_lite.recipe.effects import Affects
from gft_lite.recipe.objective_sections import ObjectiveSettings, RewardFunctionSettings
from gft_lite.recipe.sections import DataSettings
from gft_lite.recipe.training_sections import StageSettings
from gft_lite.rewards.judge import JudgeSettings
from gft_lite.rewards.registry import JUDGE, REWARDS
from gft_lite.utils.imports import load_dotted

METRICS = Path(__file__).with_name("metrics.yaml")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell or ' ' for cell in row)} |\n" for row in lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _code(text: str) -> str:
    # A backslash before a bar would be shown in a code span of a table.
    return f"<code>{escape(text).replace('|', '&#124;')}</code>" if "|" in text else f"`{text}`"


# --- commands --------------------------------------------------------------------------------


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command, `lab compare` among them, in the order of the help."""
    return dict(_leaves(make_parser(), ""))


def _leaves(
    parser: argparse.ArgumentParser, above: str
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not below:
        yield above.strip(), parser
    for action in below:
        for name, child in action.choices.items():
            yield from _leaves(child, f"{above} {name}")


def _help_lines() -> dict[str, str]:
    """The line of each command in the list of its parent."""
    lines: dict[str, str] = {}
    waiting: list[tuple[str, argparse.ArgumentParser]] = [("", make_parser())]
    for above, parser in waiting:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for choice in action._choices_actions:
                    lines[f"{above} {choice.dest}".strip()] = choice.help or ""
                waiting += [(f"{above} {n}".strip(), p) for n, p in action.choices.items()]
    return lines


def commands_page() -> str:
    """Every command with its arguments."""
    lines = _help_lines()
    page = ["# Commands\n\nWritten from the parsers of the command line.\n"]
    parsers = commands()
    rows = [[f"[`gft-lite {n}`](#{_anchor(n)})", _cell(lines.get(n, ""))] for n in parsers]
    page.append(_table(["command", "what it does"], rows))
    for name, parser in parsers.items():
        page.append(f"## gft-lite {name} {{ #{_anchor(name)} }}\n")
        page.append((parser.description or lines.get(name, "")) + "\n")
        page.append(f"```\n{_usage(parser)}\n```\n")
        shown = [a for a in parser._actions if a.help != argparse.SUPPRESS]
        page.append(_table(["argument", "meaning"], [_argument(a) for a in shown]))
        if parser.epilog:
            examples = inspect.cleandoc(parser.epilog).removeprefix("examples:\n")
            page.append(f"Examples:\n\n```\n{inspect.cleandoc(examples)}\n```\n")
    return "\n".join(page)


def _usage(parser: argparse.ArgumentParser) -> str:
    """The usage in lines of at most 78 characters, which do not divide an option and its value."""
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    parts = re.findall(r"(?:\[(?:[^\[\]]|\[[^\]]*\])*\]|\S)+", usage)
    text = " ".join(part.replace(" ", "\0") for part in parts)
    lines = textwrap.wrap(
        text, 78, subsequent_indent=" " * 9, break_on_hyphens=False, break_long_words=False
    )
    return "\n".join(lines).replace("\0", " ")


def _anchor(name: str) -> str:
    return name.replace(" ", "-")


def _argument(action: argparse.Action) -> list[str]:
    value = action.metavar or (action.dest if not action.option_strings else action.dest.upper())
    if isinstance(value, tuple):
        value = " ".join(value)
    if not action.option_strings:
        return [_code(str(value)), _cell(action.help or "")]
    takes = action.nargs != 0
    if takes and action.choices and not action.metavar:
        value = "|".join(map(str, action.choices))
    names = ", ".join(action.option_strings)
    return [_code(f"{names} {value}" if takes else names), _cell(action.help or "")]


# --- recipe fields ---------------------------------------------------------------------------

_MEANING = {
    Affects.RUN | Affects.BASE | Affects.GROUPS: "all results",
    Affects.RUN | Affects.BASE: "training, evaluation",
    Affects.RUN | Affects.GROUPS: "training, presampled groups",
    Affects.RUN: "training",
    Affects(0): "speed, memory, output",
}
# Sections that occur in lists or by name, at their place.
_REPEATED: dict[str, type[BaseModel]] = {
    "eval.sets.NAME": DataSettings,
    "reward.functions[]": RewardFunctionSettings,
    "stages[]": StageSettings,
}


def sections() -> list[tuple[str, type[BaseModel]]]:
    """Every section of a recipe by its dotted name; the recipe itself has none."""
    found: list[tuple[str, type[BaseModel]]] = [("", Recipe)]
    for above, schema in found:
        for name, field in schema.model_fields.items():
            below = section_class(field.annotation)
            if below and below is not schema:
                found.append((f"{above}.{name}".strip("."), below))
    return [*found, *_REPEATED.items()]


def recipe_page() -> str:
    """Every field of a recipe with its type, its default and what it affects."""
    page = [
        "# Recipe fields\n\nWritten from the schema. *affects* lists the results that change with "
        "the field; a run is [resumed](../guides/resume.md) only with the same values of fields "
        "that affect training. `gft-lite train RECIPE --dry-run` prints a recipe with every "
        "default. [Recipes](../guides/recipes.md) has an example.\n"
    ]
    inherited: dict[str, Affects] = {}
    for at, schema in sections():
        page.append(f"## {at or 'The recipe'} {{ #{_slug(at) or 'recipe'} }}\n")
        page.append(_prose(schema) + "\n")
        rows = [_field(at, name, field, inherited) for name, field in schema.model_fields.items()]
        page.append(_table(["field", "type", "default", "affects"], rows))
        if schema is ObjectiveSettings:
            page.append(_parameters())
    return "\n".join(page)


def _slug(at: str) -> str:
    return re.sub(r"[^a-z_]", "", at.lower())


def _prose(schema: type[BaseModel]) -> str:
    return inspect.cleandoc(schema.__doc__ or "")


def _field(at: str, name: str, field: FieldInfo, inherited: dict[str, Affects]) -> list[str]:
    path = f"{at}.{name}".strip(".")
    marks = [m for m in field.metadata if isinstance(m, Affects)]
    affects = marks[-1] if marks else inherited.get(at)
    if affects is not None:
        inherited[path] = affects
    below = section_class(field.annotation)
    if below:
        # An evaluation set has the sections of the training data.
        kind = f"[section](#{_slug(path.replace('eval.sets.NAME', 'data'))})"
        return [f"`{path}`", kind, "", _MEANING.get(affects, "") if affects is not None else ""]
    default = field.get_default(call_default_factory=True)
    text = "" if field.is_required() else _code(_value(default))
    return [
        f"`{path}`",
        _cell(_kind(field)),
        text,
        _MEANING.get(affects, "") if affects is not None else "",
    ]


def _value(value: Any) -> str:
    if isinstance(value, BaseModel):
        return _value(value.model_dump(exclude_defaults=True))
    if isinstance(value, list | tuple) and value and isinstance(value[0], BaseModel):
        value = [each.model_dump(exclude_defaults=True) for each in value]
    if isinstance(value, tuple):
        value = list(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
    return text.removesuffix("...").strip().replace("\n", " ")


def _kind(field: FieldInfo) -> str:
    """The type of a field in words, with its limits."""
    parts = []
    for kind in union_members(field.annotation):
        if get_origin(kind) is Literal:
            parts += [str(value) for value in get_args(kind)]
        else:
            parts.append(_name(kind))
    names = list(dict.fromkeys(parts))
    limits = [text for m in _metadata(field.annotation, field.metadata) if (text := _limit(m))]
    return ", ".join(names) + (f"; {' and '.join(dict.fromkeys(limits))}" if limits else "")


_NAMES = {str: "text", int: "whole number", float: "number", bool: "true, false", dict: "section",
          list: "list", tuple: "list", type(None): "null", Any: "any value"}  # fmt: skip


def _name(kind: Any) -> str:
    origin = get_origin(kind) or kind
    if origin in (list, tuple):
        inner = [union_members(a)[0] for a in get_args(kind)[:1]]
        if inner and get_origin(inner[0]) is Literal:
            return f"list of {', '.join(map(str, get_args(inner[0])))}"
        word = {str: "texts", int: "whole numbers", float: "numbers"}
        return f"list of {word[inner[0]]}" if inner and inner[0] in word else "list"
    return _NAMES.get(origin, getattr(origin, "__name__", str(origin)))


def _metadata(annotation: Any, own: Sequence[Any]) -> Iterator[Any]:
    """The metadata of a field and of the members of its union."""
    yield from own
    if hasattr(annotation, "__metadata__"):
        for mark in annotation.__metadata__:
            yield mark
            yield from getattr(mark, "metadata", ())
    for member in get_args(annotation) if get_origin(annotation) is not Literal else ():
        if get_origin(annotation) not in (list, dict, tuple):
            yield from _metadata(member, ())


def _limit(mark: Any) -> str | None:
    words = {
        Ge: ("ge", "at least"),
        Gt: ("gt", "above"),
        Le: ("le", "at most"),
        Lt: ("lt", "below"),
    }
    for kind, (name, word) in words.items():
        if isinstance(mark, kind):
            return f"{word} {getattr(mark, name):,g}" if getattr(mark, name) < 1e6 else None
    return f"at least {mark.min_length} long" if isinstance(mark, MinLen) else None


def _parameters() -> str:
    """The parameters that the methods' own losses add to `objective`."""
    shared = ObjectiveSettings.model_fields
    rows = [
        [f"`objective.{name}`", f"`{method}`", _code(_value(value))]
        for method in METHODS
        for name, value in _defaults(method).items()
        if name not in shared
    ]
    return "Parameters of single methods:\n\n" + _table(["field", "method", "default"], rows)


def _recipe(method: str) -> Recipe:
    """The defaults of a method; of a teacher any, as some methods need one of their own."""
    return Recipe.from_tree({"method": method, "teacher": {"model": "any"}})


def _defaults(method: str) -> dict[str, Any]:
    """The parameters of a method with their values where the recipe says nothing."""
    values = _recipe(method).objective.model_dump()
    return {name: values[name] for name in METHODS[method].parameters}


# --- methods ---------------------------------------------------------------------------------


def methods_page() -> str:
    """The table METHODS."""
    from gft_lite.cli import methods

    rows = []
    for name, method in METHODS.items():
        recipe = _recipe(name)
        group = " + ".join(
            str(getattr(recipe.group, s)) if s in method.sources else "-"
            for s in ("expert", "teacher", "self")
        )
        paper = re.sub(r"arXiv ([\d.]+)", r"[arXiv \1](https://arxiv.org/abs/\1)", method.citation)
        dial = f"`{method.dial.parameter}`" if method.dial else ""
        rate = f"{recipe.optim.rate:.0e}".replace("e-0", "e-")
        rows.append([
            f"`{name}`", group, _code(method.formula), recipe.objective.reduction.replace("_", " "),
            f'<span class="nowrap">{rate}</span>', dial, paper,
        ])  # fmt: skip
    head = ["method", "expert + teacher + self", "loss of a token", "mean", "lr", "tuned", "source"]
    return (
        "# Methods\n\nWritten from the table `METHODS`. Numbers are defaults: `group`, `objective` "
        "and `optim.lr` in the recipe change them. *tuned* is the parameter that the "
        "[referee](../guides/referee.md) tunes beside the learning rate. "
        "[Methods and losses](../guides/methods.md) has the context.\n\n"
        + _table(head, rows)
        + f"```\n{methods._LEGEND.strip()}\n```\n\n"
        + "".join(f"## {name}\n\n{_method(name)}" for name in METHODS)
    )


def _method(name: str) -> str:
    """What the docstrings say of the method's loss, of its selection of rows and its prefixes."""
    method = METHODS[name]
    functions = [f for f in (method.loss, method.select, method.prefixes) if f]
    texts = [inspect.getdoc(f) or "" for f in functions]
    shown = ", ".join(_code(f"{key}: {_value(value)}") for key, value in _defaults(name).items())
    return "\n\n".join([*texts, f"Parameters, under `objective`: {shown or 'none'}."]) + "\n\n"


# --- rewards ---------------------------------------------------------------------------------


def rewards_page() -> str:
    """The table REWARDS with the parameters of each rule."""
    rows = []
    for name, entry in REWARDS.items():
        make = JudgeSettings if name == JUDGE else load_dotted(entry.make)
        parameters = inspect.signature(make).parameters.values()
        shown = ", ".join(_code(f"{p.name}: {_value(p.default)}") for p in parameters)
        correct = "" if entry.correct_above is None else f"above {entry.correct_above:g}"
        answer = "yes" if entry.needs_answer else "no"
        rows.append([f"`{name}`", _cell(entry.doc), shown, answer, correct])
    head = ["name", "score", "parameters and defaults", "needs an answer", "correct"]
    return (
        "# Rewards\n\nWritten from the table `REWARDS`. *correct* is the score above which an "
        "evaluation counts a response as correct. [Rewards](../guides/rewards.md) describes how to "
        "combine them and how to write your own.\n\n"
        + _table(head, rows)
        + f"## judge\n\n{inspect.cleandoc(JudgeSettings.__doc__ or '')}\n"
    )


# --- metrics ---------------------------------------------------------------------------------


def metric_tables() -> dict[str, dict[str, list[str]]]:
    """By file, and by key: meaning, unit, healthy range."""
    return yaml.safe_load(METRICS.read_text(encoding="utf-8"))


def has_meaning(file: str, key: str) -> bool:
    """True if the table has the key, perhaps with `*` in place of a name."""
    patterns = (re.escape(known).replace(r"\*", "[^/]+") for known in metric_tables()[file])
    return any(re.fullmatch(pattern, key) for pattern in patterns)


def metrics_page() -> str:
    """Every metric with its meaning, unit and healthy range."""
    page = [
        "# Metrics\n\nNested keys are joined by `/`, as in `run.frame()` and in trackers; `*` "
        "stands for a name, such as a source, a set or a phase. Logarithms are natural: KL and "
        "entropy are in nats. A healthy range is a rule of thumb, not a guarantee.\n"
    ]
    titles = {
        "objective/*": "What losses report, under objective/",
        "eval/": "eval/: the figures of a set",
    }
    for file, keys in metric_tables().items():
        page.append(f"## {titles.get(file, file)} {{ #{re.sub(r'[^a-z]', '', file)} }}\n")
        rows = [[_code(key), *(_cell(str(text)) for text in row)] for key, row in keys.items()]
        page.append(_table(["key", "meaning", "unit", "healthy"], rows))
    return "\n".join(page)


PAGES: dict[str, Callable[[], str]] = {
    "reference/cli.md": commands_page,
    "reference/recipe.md": recipe_page,
    "reference/methods.md": methods_page,
    "reference/rewards.md": rewards_page,
    "reference/metrics.md": metrics_page,
}
