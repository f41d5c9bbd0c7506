"""Help, examples, suggestions and completion of every command."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest
from rich.console import Console

from gft_lite.cli import main
from gft_lite.cli.common import add_verbosity
from gft_lite.cli.entry_point import COMMANDS, make_parser, parse_arguments
from gft_lite.cli.parser import Parser
from gft_lite.utils.progress import stderr_console


def parsers(parser: Parser) -> Iterator[Parser]:
    """All parsers below a parser."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield inner
                yield from parsers(inner)


ALL = {parser.prog: parser for parser in parsers(make_parser())}


@pytest.mark.parametrize("name", ALL)
def test_every_command_has_a_description_and_examples_that_parse(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gft_lite.cli.report.run_folder", str)
    parser = ALL[name]
    assert parser.description.endswith(".")
    title, *examples = parser.epilog.splitlines()
    assert title == "examples:" and examples
    mine = [shlex.split(text.partition(" > ")[0], comments=True) for text in examples]
    assert any(words[: len(name.split())] == name.split() for words in mine)
    folder = tmp_path / "runs"
    for run in ("lab", "gft", "sft"):
        (folder / run).mkdir(parents=True)
    for words in mine:
        if words[0] == "gft-lite":
            parse_arguments(words[1:])


def test_commands_that_are_to_be_continued_by_a_flag_have_it(monkeypatch, capsys):
    def stop(_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("gft_lite.cli.entry_point._run", stop)
    for command, named in (("train", True), ("methods", False), ("plan", False)):
        recipe = [] if command == "methods" else ["recipes/lab.yaml"]
        assert main([command, *recipe]) == 130
        assert ("--resume" in capsys.readouterr().err) is named
    told = {name: parser.get_default("again") or "" for name, parser in ALL.items()}
    flags = {name for name, text in told.items() if "--resume" in text}
    assert flags == {name for name in ALL if "--resume" in ALL[name].format_help()}


@pytest.mark.parametrize("name", ["gft-lite", *ALL])
def test_help_fits_80_columns(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = ALL.get(name, make_parser()).format_help()
    assert max(map(len, text.splitlines())) <= 80
    assert " None" not in text


def test_the_list_of_commands_is_grouped_and_complete():
    text = make_parser().format_help()
    headings = [line[:-1] for line in text.splitlines() if line.endswith(":") and line[0] != " "]
    assert headings == ["train", "compare", "look at results", "use and share a model", "check",
                        "options"]  # fmt: skip
    listed = {line.split()[0] for line in text.splitlines() if line.startswith("  ")}
    assert listed >= {name.split()[1] for name in ALL}


def test_help_imports_no_large_library():
    heavy = ("torch", "pydantic", "rich", "yaml", "httpx", "transformers", "asyncio")
    code = (
        "import sys\nfrom gft_lite.cli.entry_point import make_parser\n"
        "make_parser().format_help()\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_version_and_help_of_the_program(capsys):
    for flag, start in (("--version", "gft-lite "), ("--help", "usage: gft-lite")):
        with pytest.raises(SystemExit) as ended:
            main([flag])
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith(start)


def test_a_closed_output_is_no_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["methods"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("trian r.yaml", "COMMAND: must be a command, got 'trian'. Did you mean train? See "
         "gft-lite --help."),
        ("lab compre", "COMMAND: must be one of compare, study, got 'compre'. Did you mean "
         "compare? See gft-lite lab --help."),
        ("train r.yaml --otu x", "--otu: must be an option of gft-lite train. Did you mean --out? "
         "See gft-lite train --help."),
        ("lab compare --seds=3", "--seds: must be an option of gft-lite lab compare. Did you mean "
         "--seeds? See gft-lite lab compare --help."),
        ("train r.yaml --optim.lr=1", "--optim.lr: must be an option of gft-lite train. Write "
         "optim.lr=1 without dashes. See gft-lite train --help."),
        ("chat lab more", "arguments: must be those of gft-lite chat, got 'more' in "
         "addition. See gft-lite chat --help."),
        ("groups --visits 2", "RECIPE: must be given, got none. See gft-lite groups --help."),
        ("train r.yaml --resum", "--resum: must be an option of gft-lite train. Did you mean "
         "--resume? See gft-lite train --help."),
        ("merge r --out m --dtype float", "--dtype: must be one of bfloat16, float32, got 'float'. "
         "Did you mean float32? See gft-lite merge --help."),
    ],
)  # fmt: skip
def test_a_mistyped_word_is_one_line_with_a_suggestion(line, told, capsys):
    assert main(line.split()) == 2
    assert capsys.readouterr().err == f"{told}\n"


def test_overrides_may_follow_options_and_are_not_kept():
    """A default of argparse is one object for all calls."""
    parser = make_parser()
    for _ in range(2):
        assert parser.parse_args(["train", "r.yaml", "--resume"]).overrides == []
    assert main(["train", "recipes/lab.yaml", "--dry-run", "seed=7", "optim.lr=[1]"]) == 2


def test_quiet_hides_progress_of_one_command_only(monkeypatch):
    seen = []

    def command(options: argparse.Namespace) -> int:
        seen.append(stderr_console().quiet)
        return 0

    monkeypatch.setattr("gft_lite.cli.methods.run", command)
    monkeypatch.setattr("gft_lite.cli.methods.add", lambda commands: _add_silent(commands, command))
    assert main(["methods", "--quiet"]) == 0 and main(["methods"]) == 0
    assert seen == [True, False] and isinstance(stderr_console(), Console)
    assert main(["methods", "--quiet", "--verbose"]) == 2


def _add_silent(commands, command):
    parser = commands.add_parser("methods", help="a command that prints progress")
    add_verbosity(parser)
    parser.set_defaults(run=command)


@pytest.mark.parametrize("name", sorted(set(ALL) - {"gft-lite lab"}))
def test_every_command_with_progress_has_both_flags(name):
    flags = set(ALL[name]._option_string_actions)
    silent = {"gft-lite plan", "gft-lite methods", "gft-lite completion", "gft-lite init"}
    assert ({"--verbose", "--quiet"} <= flags) is (name not in silent)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_has_commands_and_options(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "gft-lite" in script
    for word in ("referee", "lr-range", "minimize", "study"):
        assert word in script
    if shell == "bash":
        code = f"{script}\nCOMP_WORDS=(gft-lite re); COMP_CWORD=1\n_shtab_gft_lite\n"
        done = subprocess.run(
            ["bash", "-c", code + 'printf "%s\\n" "${COMPREPLY[@]}"'],
            capture_output=True, text=True,
        )  # fmt: skip
        assert sorted(done.stdout.split()) == ["referee", "report"], done.stderr


def test_commands_are_those_of_the_parser():
    names = [command.__name__.rpartition(".")[2] for command in COMMANDS]
    assert [name.replace("evaluate", "eval") for name in names] == [
        name.split()[1] for name in ALL if len(name.split()) == 2
    ]
