"""The pages of the site that follow from the code: commands, recipe fields, methods, metrics."""

from __future__ import annotations

import argparse
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from meanings import field_meanings, method_meanings, prose, reward_meanings
from page_parts import as_yaml, cell, code, table
from recipe_reference import recipe_page, recipe_schema

from gft_lite.cli.entry_point import make_parser
from gft_lite.objective.methods import METHODS
from gft_lite.recipe import Recipe
from gft_lite.recipe.sections import ObjectiveSettings
from gft_lite.rewards.judge import JudgeSettings
from gft_lite.rewards.registry import JUDGE, REWARDS
from gft_lite.utils.imports import load_dotted

METRICS = Path(__file__).with_name("metrics.yaml")


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
    rows = [[f"[`gft-lite {n}`](#{_anchor(n)})", cell(lines.get(n, ""))] for n in parsers]
    page.append(table(["command", "what it does"], rows))
    for name, parser in parsers.items():
        page.append(f"## gft-lite {name} {{ #{_anchor(name)} }}\n")
        page.append((parser.description or lines.get(name, "")) + "\n")
        page.append(f"```\n{_usage(parser)}\n```\n")
        shown = [a for a in parser._actions if a.help != argparse.SUPPRESS]
        page.append(table(["argument", "meaning"], [_argument(a) for a in shown]))
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
        return [code(str(value)), cell(action.help or "")]
    takes = action.nargs != 0
    if takes and action.choices and not action.metavar:
        value = "|".join(map(str, action.choices))
    names = ", ".join(action.option_strings)
    return [code(f"{names} {value}" if takes else names), cell(action.help or "")]


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
            f"`{name}`", group, code(method.formula), recipe.objective.reduction.replace("_", " "),
            f'<span class="nowrap">{rate}</span>', dial, paper,
        ])  # fmt: skip
    head = ["method", "expert + teacher + self", "loss of a token", "mean", "lr", "tuned", "source"]
    return (
        "# Methods\n\nWritten from the table `METHODS`. Numbers are defaults: `group`, `objective` "
        "and `optim.lr` in the recipe change them. *tuned* is the parameter that the "
        "[referee](../guides/referee.md) tunes beside the learning rate. "
        "[Methods and losses](../guides/methods.md) has the context.\n\n"
        + table(head, rows)
        + f"```\n{methods._LEGEND.strip()}\n```\n\n"
        + "".join(f"## {name}\n\n{_method(name)}" for name in METHODS)
    )


def _recipe(method: str) -> Recipe:
    """The defaults of a method; of a teacher any, as some methods need one of their own."""
    return Recipe.from_tree({"method": method, "teacher": {"model": "any"}})


def _method(name: str) -> str:
    """What the docstrings say of the method's loss, of its selection of rows and its prefixes."""
    method, values = METHODS[name], _recipe(name).objective.model_dump()
    texts = [prose(f) for f in (method.loss, method.select, method.prefixes) if f]
    meanings = field_meanings(ObjectiveSettings) | method_meanings(method)
    shown = _parameters({name: values[name] for name in method.parameters}, meanings)
    return "\n\n".join([*texts, f"Parameters, under `objective`:{shown}"]) + "\n\n"


def _parameters(defaults: Mapping[str, Any], meanings: Mapping[str, str]) -> str:
    """A list of parameters with their defaults and meanings, or the word none."""
    lines = [
        f"- {code(f'{name}: {as_yaml(default)}')}: {meanings.get(name, '')}"
        for name, default in defaults.items()
    ]
    return "\n".join(["\n", *lines]) if lines else " none."


# --- rewards ---------------------------------------------------------------------------------


def reward_defaults(name: str) -> dict[str, Any]:
    """The parameters of a rule with their defaults."""
    make = JudgeSettings if name == JUDGE else load_dotted(REWARDS[name].make)
    return {p.name: p.default for p in inspect.signature(make).parameters.values()}


def rewards_page() -> str:
    """The table REWARDS and the parameters of each rule."""
    rows, parameters = [], []
    for name, entry in REWARDS.items():
        correct = "" if entry.correct_above is None else f"above {entry.correct_above:g}"
        answer = "yes" if entry.needs_answer else "no"
        rows.append([f"[`{name}`](#{name})", cell(entry.doc), answer, correct])
        shown = _parameters(reward_defaults(name), reward_meanings(name))
        parameters.append(f"## {name}\n\nParameters:{shown}\n\n")
    return (
        "# Rewards\n\nWritten from the table `REWARDS`. *correct* is the score above which an "
        "evaluation counts a response as correct. [Rewards](../guides/rewards.md) describes how to "
        "combine them and how to write your own.\n\n"
        + table(["name", "score", "needs an answer", "correct"], rows)
        + "".join(parameters)
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
        rows = [[code(key), *(cell(str(text)) for text in row)] for key, row in keys.items()]
        page.append(table(["key", "meaning", "unit", "healthy"], rows))
    return "\n".join(page)


PAGES: dict[str, Callable[[], str]] = {
    "reference/cli.md": commands_page,
    "reference/recipe.md": recipe_page,
    "reference/recipe.schema.json": recipe_schema,
    "reference/methods.md": methods_page,
    "reference/rewards.md": rewards_page,
    "reference/metrics.md": metrics_page,
}
