"""Whatever the arguments of a command are, it ends with exit code 0 or 2 and a clear line."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gft_lite.cli import main
from gft_lite.cli.entry_point import COMMANDS, make_parser

LONG = "x" * 256  # One byte more than a file system allows.
PATHS = (
    "", ".", "..", "~", "nowhere", "no/where", LONG, "é" * 130, f"new/{LONG}/x", "/" + "x/" * 2500,
    "file.txt", "file.txt/x", "folder", "circle", "circle/x", "dangling", "latin1.yaml",
    "binary.jsonl", "empty.yaml", "list.yaml", "deep.yaml", "/dev/null", "/dev/null/x", "a/b",
    "a/b@step-3", "lab@all", "run", "run@all", "run@step-" + "9" * 30, "broken-run", "model",
    "adapter", "\udcff", "a\nb", "\x1b[2J", "[bold]x[/]", "out.jsonl", "out.parquet", "new/out",
)  # fmt: skip
NUMBERS = (
    "0", "-1", "1", "3", "1e999", "-inf", "nan", "9" * 30, "9" * 5000, "1.5", "x", "٣", "0x10",
    "1_000", "1e-320", "1e308", "2147483648",
)  # fmt: skip
TEXTS = (
    "é", "\u2028", "a b", "{", "[", "null", "a=b", "os:system", "8GiB", "0GiB", "1e999GiB", "h200",
    "http://", "http://127.0.0.1:1/v1?x=1", "http://[::1", "http://127.0.0.1:99999", "ftp://x",
    "http://a b", "http://xn--a", "http://me:pass@host", "ray", "lab", "gft,,sft", "problem",
)  # fmt: skip
OVERRIDES = (
    "seed=1", "seed=", "=", "a=b", "train.steps=1e999", "train.steps=" + "9" * 5000, "optim.lr=[",
    "optim.lr=!!python/object:os", "a.b.c.d=1", "..=1", "name=../x", f"name={LONG}", "method=no",
    f"policy.model={LONG}", "policy.model=circle", "policy.model=file.txt", "policy.model=model",
    "data.source=", f"data.source={LONG}", "data.source=circle", "data.source=binary.jsonl",
    "stages=[sft, {}]", "stages=5", "group=5", "rollout.servers=['http://[']", "reward=null",
    "samples=" + "9" * 25, "k=[0]", "seed=*a", "<<=1", "seed=1\n2", "seed=\udcff", "'a'=1",
)  # fmt: skip
GRIDS = ("optim.lr=1,2", "optim.lr=", "optim.lr", "=", "group=x", "optim.lr={log: [0, 1]}",
         "optim.lr={log: 5}", "optim.lr=" + ",".join(map(str, range(3000))))  # fmt: skip
# Added to a command whose arguments may all be valid, so that it does no work.
IDLE = {"train": ["policy.model=nowhere"], "groups": ["policy.model=nowhere"],
        "distill": ["data.source=nowhere.jsonl"], "sweep": ["--dry-run"],
        "referee": ["--dry-run"],
        "compare": ["no.such=1"], "study": ["no.such=1"]}  # fmt: skip
# These need valid values of their arguments to do any work.
TARGETS = tuple(path for path in PATHS if path not in ("lab", "run"))


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Iterator[Path]:
    """A working directory with files and folders that no command can use."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "file.txt").write_text("x\n")
    (folder / "latin1.yaml").write_bytes(b"name: \xe9\n")
    (folder / "binary.jsonl").write_bytes(b"\0\1\2" * 100)
    (folder / "empty.yaml").touch()
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "deep.yaml").write_text("[" * 20_000)
    (folder / "circle").symlink_to("circle")
    (folder / "dangling").symlink_to("nothing")
    for name, file, text in (
        ("run", "recipe.yaml", "extends: recipes/lab.yaml\n"),
        ("broken-run", "recipe.yaml", "\0"),
        ("model", "config.json", "{}"),
        ("adapter", "adapter_config.json", '{"r": 4}'),
        ("folder", "empty", ""),
    ):
        (folder / name).mkdir()
        (folder / name / file).write_text(text)
    with contextlib.chdir(folder):
        yield folder


def commands(
    parser: argparse.ArgumentParser,
) -> Iterator[tuple[list[str], argparse.ArgumentParser]]:
    """Every command with its parser, also those of `gft-lite lab`."""
    [group] = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)] or [None]
    if group is None:
        yield [], parser
        return
    for name, inner in group.choices.items():
        for words, leaf in commands(inner):
            yield [name, *words], leaf


LEAVES = [(words, leaf) for words, leaf in commands(make_parser()) if words[-1] != "doctor"]


def values(action: argparse.Action) -> st.SearchStrategy[str]:
    if action.dest == "overrides":
        return st.sampled_from(OVERRIDES)
    if action.dest == "grid":
        return st.sampled_from(GRIDS)
    if action.dest == "recipe":
        return st.sampled_from(("recipes/lab.yaml", *PATHS))
    if not action.option_strings:
        return st.sampled_from(TARGETS)
    pools = [PATHS, NUMBERS, TEXTS, *([tuple(action.choices)] if action.choices else [])]
    return st.sampled_from(pools).flatmap(st.sampled_from) | st.text(max_size=10)


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command with random options and positional arguments."""
    words, parser = draw(st.sampled_from(LEAVES))
    line = list(words)
    for action in parser._actions:
        if action.option_strings and action.dest != "help":
            if action.required or draw(st.integers(0, 3)) == 0:
                flag = action.option_strings[0]
                line.append(flag if action.nargs == 0 else f"{flag}={draw(values(action))}")
        elif not action.option_strings:
            count = draw(st.integers(0, 2)) if action.nargs == "*" else 1
            line += [draw(values(action)) for _ in range(count)]
    return [*line, *IDLE.get(words[-1], [])]


def run(line: list[str]) -> tuple[int, str]:
    """The exit code of a command and what it prints to standard error.

    Without the progress of imports, which only the first command of a process may show.
    """
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = main(line)
    lines = errors.getvalue().splitlines(keepends=True)
    return code, "".join(t for t in lines if not t.startswith("importing libraries"))


def test_every_command_is_fuzzed():
    assert {words[0] for words, _ in LEAVES} == {
        {"evaluate": "eval"}.get(name, name)
        for name in (command.__name__.rpartition(".")[2] for command in COMMANDS)
    } - {"doctor"}


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(command_lines())
def test_any_arguments_end_with_exit_code_0_or_2(here, line):
    code, errors = run(line)
    assert code in (0, 2), errors
    assert "Traceback" not in errors
    assert code == 0 or errors.strip()


# --- paths -----------------------------------------------------------------------------------

OUTPUTS = {
    "train recipes/lab.yaml": ["--out"], "groups recipes/lab.yaml": ["--out"],
    "distill recipes/lab.yaml --teacher lab": ["--out"], "eval lab --suite lab": ["--out"],
    "sweep recipes/sweeps/tau.yaml": ["--out"],
    "referee recipes/lab.yaml --methods gft,sft": ["--out"], "merge run --out x": ["--out"],
    "report run": ["--out", "--plots"], "lab compare": ["--out"],
    "lab study": ["--out", "--report"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "flag"), [(command, flag) for command, flags in OUTPUTS.items() for flag in flags]
)
@pytest.mark.parametrize("path", ["", LONG, "é" * 130, "file.txt/x", "/dev/null/x", "circle/x"])
def test_an_output_path_is_checked_before_anything_is_loaded(here, command, flag, path):
    code, errors = run([*command.split(), f"{flag}={path}"])
    assert code == 2
    [line] = errors.splitlines()
    assert line.startswith(f"{flag}: must be a f") and ", got " in line


INPUTS = ("train {}", "plan {}", "report {}", "chat {}", "sweep {}", "merge {} --out x",
          "referee {} --methods gft,sft", "referee recipes/lab.yaml --methods gft,{}.yaml",
          "groups {}", "eval {} --suite lab", "distill {} --teacher lab")  # fmt: skip


@pytest.mark.parametrize("command", INPUTS)
@pytest.mark.parametrize("path", [LONG, "circle", "file.txt/x", "no\udcffwhere"])
def test_an_input_path_that_cannot_be_read_is_one_line(here, command, path):
    code, errors = run([word.format(path) for word in command.split()])
    assert code == 2
    assert len(errors.splitlines()) == 1 and "got " in errors


# --- numbers and variables -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("sweep recipes/sweeps/tau.yaml --dry-run --seeds 999999999", "--seeds: must be a whole"),
        ("sweep recipes/sweeps/tau.yaml --dry-run --random -1", "--random: must be a whole"),
        ("sweep recipes/sweeps/tau.yaml --jobs 0", "--jobs: must be a whole number from 1"),
        ("referee recipes/lab.yaml --methods gft,sft --seeds 0", "--seeds: must be a whole"),
        ("referee recipes/lab.yaml --methods gft,sft --margin nan", "--margin: must be between 0"),
        ("groups recipes/lab.yaml --visits -3", "--visits: must be a whole number from 1"),
        ("lab compare --seeds 1e3", "--seeds: must be a whole number from 1 to 1,000, got '1e3'"),
        ("lab study --jobs -1", "--jobs: must be a whole number from 1"),
        ("merge run --out x --limit nan", "--limit: must be a number and at least 0, got 'nan'"),
        ("merge run --out x --limit -1", "--limit: must be a number and at least 0, got '-1'"),
        ("chat lab --temperature inf", "--temperature: must be a number and at least 0"),
        ("plan recipes/lab.yaml --gpu 0GiB", "--gpu: must be"),
    ],
)
def test_a_number_out_of_range_is_one_line(here, line, rule):
    code, errors = run(line.split())
    assert code == 2 and errors.startswith(rule) and len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    "name", ["WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "HF_HUB_ETAG_TIMEOUT"]
)
@pytest.mark.parametrize("value", ["", "x", "-1", "1e9", "9" * 5000])
def test_a_variable_that_is_not_a_number_is_one_line(here, name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    code, errors = run(["train", "recipes/lab.yaml"])
    assert code == 2
    assert errors.startswith(f"{name}: must be a whole number and at least ")
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize("key", ["sécret", "se cret\n", " secret", "\tsecret", "secret\udcff"])
def test_a_key_that_no_header_can_hold_is_one_line(here, key, monkeypatch):
    monkeypatch.setenv("GFT_LITE_TEACHER_KEY", key)
    code, errors = run(["distill", "recipes/lab.yaml", "--teacher", "http://127.0.0.1:1"])
    assert code == 2
    assert errors.splitlines()[-1].startswith("GFT_LITE_TEACHER_KEY: must consist of printable")
    assert "cret" not in errors
