"""The documents name files, packages, tests and commands that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gft_lite.cli.entry_point import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
README, SECURITY, CONTRIBUTING = (
    (ROOT / f"{name}.md").read_text(encoding="utf-8")
    for name in ("README", "SECURITY", "CONTRIBUTING")
)


def test_the_tree_in_the_readme_has_every_package():
    tree = README[README.index("gft_lite/\n") :].partition("```")[0]
    listed = re.findall(r"^  (\w+)/", tree, re.MULTILINE)
    assert sorted(listed) == sorted(p.parent.name for p in ROOT.glob("gft_lite/*/__init__.py"))


def test_the_four_files_to_read_first_exist():
    section = README[README.index("Read these four files first") :].partition("```")[0]
    files = re.findall(r"`(\w+/\w+\.py)`", section)
    assert len(files) == 4
    assert all((ROOT / "gft_lite" / file).is_file() for file in files)


def test_every_command_is_in_the_readme():
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2].replace("evaluate", "eval")
        assert f"gft-lite {name}" in README, name


@pytest.mark.parametrize("text", [README, SECURITY, CONTRIBUTING], ids=["readme", "security", "c"])
def test_paths_exist(text):
    roots = ("recipes", "configs", "examples", "benchmarks", "tests", "docs")
    named = re.findall(rf"`((?:{'|'.join(roots)})/[\w./{{}},-]+)`", text)
    assert named
    for path in named:
        before, *choices = re.split(r"[{}]", path)
        options = [f"{before}{c}{choices[1]}" for c in choices[0].split(",")] if choices else [path]
        for option in options:
            assert (ROOT / option).exists() or list(ROOT.glob(f"{option}*")), option
