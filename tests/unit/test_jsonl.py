"""The append-only JSON-lines store: torn tails, bad lines, offsets, threads."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gft_lite.utils.errors import UserError
from gft_lite.utils.jsonl import JsonlFile

RULE, ADVICE = "must be a number's name and value", "Remove the line."


def make(path: Path) -> JsonlFile[tuple[str, int]]:
    return JsonlFile(path, lambda o: (o["name"], int(o["value"])), RULE, ADVICE)


def entry(name: str, value: int) -> dict[str, object]:
    return {"name": name, "value": value}


def test_entries_come_back_in_order_and_by_offset(tmp_path: Path):
    file = make(tmp_path / "new" / "numbers.jsonl")
    assert (len(file), list(file)) == (0, [])
    offsets = file.append([entry("zwölf\u2028", 12), entry("数", 3)])
    offsets += file.append([entry("one", 1)])
    expected = [("zwölf\u2028", 12), ("数", 3), ("one", 1)]
    assert (len(file), list(file)) == (3, expected)
    assert list(file.entries()) == list(zip(offsets, expected, strict=True))
    assert [file.read_at(offset) for offset in offsets] == expected


@pytest.mark.parametrize("tail", [b'{"name": "tw', b"\0" * 70_000, b'{"name": "two", "value": 2}'])
def test_a_torn_tail_is_no_entry_and_the_next_append_removes_it(tmp_path: Path, tail: bytes):
    file = make(tmp_path / "numbers.jsonl")
    file.append([entry("one", 1)])
    torn = file.path.read_bytes() + tail
    file.path.write_bytes(torn)
    assert (len(file), list(file)) == (1, [("one", 1)])
    assert file.path.read_bytes() == torn  # Reading changes nothing.
    [offset] = file.append([entry("three", 3)])
    assert list(file) == [("one", 1), ("three", 3)]
    assert file.read_at(offset) == ("three", 3)


@pytest.mark.parametrize(
    "line",
    [b"", b"{", b"[]", b"7", b"{}", b'{"name": "x"}', b'{"name": "x", "value": "y"}', b"\xff\xfe",
     b'{"name": "x", "value": null}', b'{"name": "x", "value": 1e999}', b"[" * 100_000],
)  # fmt: skip
def test_any_other_bad_line_is_an_error_with_file_and_line(tmp_path: Path, line: bytes):
    file = make(tmp_path / "numbers.jsonl")
    first, second = file.append([entry("one", 1), entry("two", 2)])
    lines = file.path.read_bytes().splitlines(keepends=True)
    file.path.write_bytes(lines[0] + line + b"\n" + lines[1])
    with pytest.raises(UserError) as caught:
        list(file)
    [problem] = caught.value.problems
    assert problem.startswith(f"{file.path}:2: {RULE}, got ")
    assert problem.endswith(ADVICE) and "\n" not in problem and len(problem) < 400
    assert len(file) == 3
    assert file.read_at(first) == ("one", 1)
    with pytest.raises(UserError, match=r"numbers\.jsonl:2: "):
        file.read_at(second)


def test_only_the_first_lines_are_kept(tmp_path: Path):
    file = make(tmp_path / "numbers.jsonl")
    file.append(entry(str(i), i) for i in range(5))
    with file.path.open("a") as out:
        out.write("not JSON\n{")
    file.keep_first(9)
    assert len(file) == 6
    file.keep_first(3)
    assert list(file) == [("0", 0), ("1", 1), ("2", 2)]
    file.keep_first(0)
    assert file.path.read_bytes() == b""


def test_threads_may_append_at_once(tmp_path: Path):
    file = make(tmp_path / "numbers.jsonl")
    with ThreadPoolExecutor(8) as pool:
        offsets = list(pool.map(lambda i: file.append([entry("n", i)])[0], range(64)))
    assert sorted(value for _, value in file) == list(range(64))
    assert [file.read_at(offset) for offset in offsets] == [("n", i) for i in range(64)]
