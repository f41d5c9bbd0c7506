"""The argument parser: commands in groups, examples, suggestions, errors of one line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, get_args

from gft_lite.utils.errors import UserError, nearest, short_repr

Group = Literal["train", "compare", "look at results", "use and share a model", "check"]
_LISTED = 6  # Choices that an error lists although one of them is similar.


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations; its errors are a UserError of one line.

    `group` is the heading of the command in the list of all commands.
    """

    def __init__(self, *args: Any, group: Group | None = None, **options: Any) -> None:
        defaults: dict[str, Any] = {"formatter_class": _Formatter, "allow_abbrev": False}
        super().__init__(*args, **defaults | options)
        self.group = group

    def error(self, message: str) -> NoReturn:
        missing = message.removeprefix("the following arguments are required: ")
        if missing != message:
            message = f"{missing}: must be given, got none"
        line = " ".join(message.removeprefix("argument ").split())
        end = "" if line.endswith((".", "?")) else "."
        raise UserError([f"{line}{end} See {self.prog} --help."])

    def leaf(self, arguments: Sequence[str]) -> Parser:
        """The parser of the command that `arguments` name."""
        commands = self._commands()
        for number, word in enumerate(arguments if commands else ()):
            if word in commands.choices:
                return commands.choices[word].leaf(arguments[number + 1 :])
        return self

    def option_error(self, word: str) -> NoReturn:
        """Raises: UserError for a word that is no argument of this parser."""
        name = word.partition("=")[0]
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        if name.startswith("-"):
            hint = f"Did you mean {found}?" if (found := nearest(name, flags, 0.6)) else ""
            if "." in name:
                hint = f"Write {word.lstrip('-')} without dashes."
            self.error(
                f"{short_repr(name)[1:-1]}: must be an option of {self.prog}. {hint}".strip()
            )
        self.error(f"arguments: must be those of {self.prog}, got {short_repr(word)} in addition")

    def format_help(self) -> str:
        """The help text; commands are listed by group."""
        commands = self._commands()
        if commands is None or not any(p.group for p in commands.choices.values()):
            return super().format_help()
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        listed = {a.dest: a for a in commands._choices_actions}
        for group in get_args(Group):
            formatter.start_section(group)
            names = [name for name, parser in commands.choices.items() if parser.group == group]
            formatter.add_arguments([listed[name] for name in names])
            formatter.end_section()
        formatter.start_section("options")
        formatter.add_arguments([a for a in self._actions if a.option_strings])
        formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def _commands(self) -> Any:
        """The action with the commands, None for a command itself."""
        found = (a for a in self._actions if isinstance(a, argparse._SubParsersAction))
        return next(found, None)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raises: ArgumentError for a value that is not one of the choices, with the nearest."""
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        hint = f" Did you mean {found}?" if (found := nearest(value, choices)) else ""
        rule = f"must be one of {', '.join(choices)}"
        if hint and len(choices) > _LISTED:
            rule = "must be a command" if action.metavar == "COMMAND" else "must be a known name"
        raise argparse.ArgumentError(action, f"{rule}, got {short_repr(value)}.{hint}")


class _Formatter(argparse.HelpFormatter):
    """Keeps the lines of examples; everything else is wrapped."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith(_EXAMPLES):
            return text
        return super()._fill_text(text, width, indent)


_EXAMPLES = "examples:\n"


def add_command(
    commands: Any, name: str, summary: str, *, description: str, examples: Sequence[str],
    group: Group | None = None,
) -> Parser:  # fmt: skip
    """Add a command: its line in the list of commands, its description and its examples.

    The parser's `epilog` holds the examples, one a line.
    """
    lines = "".join(f"  {example}\n" for example in examples)
    return commands.add_parser(
        name, help=summary, description=description, epilog=_EXAMPLES + lines, group=group
    )
