"""Data of every wrong shape: a bad row is skipped, a bad source is a recipe error."""

from __future__ import annotations

import csv
import io
import json
import struct
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import GOOD, answers, jsonl, load

from gft_lite.cli import main
from gft_lite.utils.errors import RecipeError

CHOICE = {"problem": "1+1=", "answer": 1, "choices": ["1", "2"]}


def nested(depth: int) -> str:
    return f'{{"problem": "a", "answer": "1", "expert": {"[" * depth}"x"{"]" * depth}}}\n'


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("5\n", "not an object with columns"),
        ("null\n", "not an object with columns"),
        ('"text"\n', "not an object with columns"),
        ("{}\n", "missing column 'problem'"),
        (GOOD | {"problem": ["1+1="]}, "wrong type in column 'problem'"),
        (GOOD | {"problem": True}, "wrong type in column 'problem'"),
        (GOOD | {"answer": [[1]]}, "wrong type in column 'answer'"),
        (GOOD | {"answer": [None]}, "no answer"),
        (GOOD | {"answer": ""}, "no answer"),
        (GOOD | {"answer": float("inf")}, "no answer"),
        (GOOD | {"answer": float("-inf")}, "no answer"),
        ('{"problem": "a", "answer": 1e400}\n', "no answer"),
        (f'{{"problem": "a", "answer": {"9" * 5000}}}\n', "not valid JSON"),
        (GOOD | {"answer": "\ud800"}, "broken Unicode in column 'answer'"),
        (nested(4), "wrong type in column 'expert'"),
        (nested(700), "wrong type in column 'expert'"),
        (nested(100_000), "not valid JSON"),
        (GOOD | {"expert": [{"role": "assistant", "content": 5}]}, "wrong type in column 'expert'"),
        (GOOD | {"expert": {"text": "so 2"}}, "wrong type in column 'expert'"),
        (GOOD | {"id": [1]}, "wrong type in column 'id'"),
        (GOOD | {"id": "\udfff"}, "broken Unicode in column 'id'"),
    ],
)  # fmt: skip
def test_a_bad_row_is_skipped_alone(row, reason, tmp_path):
    good = GOOD | {"id": "x"}
    file = jsonl(tmp_path / "x.jsonl", good, row, good)
    loaded = load(file, columns={"expert": "expert", "id": "id"})
    assert loaded.skipped == {reason: 1}
    assert answers(loaded) == ["2", "2"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"choices": 5}, "wrong type in column 'choices'"),
        ({"choices": "ab"}, "wrong type in column 'choices'"),
        ({"choices": {"text": ["1", "2"]}}, "wrong type in column 'choices'"),
        ({"choices": ["1", ["2"]]}, "wrong type in column 'choices'"),
        ({"choices": ["1", None]}, "wrong type in column 'choices'"),
        ({"choices": ["1", "\ud800"]}, "broken Unicode in column 'choices'"),
        ({"answer": "C"}, "an answer that is none of the choices in column 'answer'"),
        ({"answer": "0"}, "an answer that is none of the choices in column 'answer'"),
        ({"answer": "three"}, "an answer that is none of the choices in column 'answer'"),
        ({"choices": list("0123456789") * 3}, "more than 26 choices in column 'choices'"),
        ({"answer": -1}, "no choice of that number in column 'answer'"),
        ({"answer": 2}, "no choice of that number in column 'answer'"),
        ({"answer": 10**9}, "no choice of that number in column 'answer'"),
    ],
)
def test_a_row_with_a_wrong_choice_is_skipped_alone(change, reason, tmp_path):
    file = jsonl(tmp_path / "x.jsonl", CHOICE, CHOICE | change)
    loaded = load(file, columns={"choices": "choices"})
    assert loaded.skipped == {reason: 1}
    [problem] = loaded.problems
    assert (problem.text, problem.answer) == ("1+1=\nAnswer Choices: (A) 1 (B) 2", "B")


# --- CSV -------------------------------------------------------------------------------------


def csv_file(tmp_path: Path, text: str) -> Path:
    (tmp_path / "x.csv").write_text(text, encoding="utf-8", newline="")
    return tmp_path / "x.csv"


def test_a_line_of_a_csv_with_too_many_cells_is_skipped(tmp_path):
    loaded = load(csv_file(tmp_path, "problem,answer\n1+1=,2,3\n2+2=,4\nx\n"))
    assert answers(loaded) == ["4"]
    assert loaded.skipped == {"more cells than columns": 1, "no answer": 1}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        # The quote in the third line ends before the 6 of the fifth.
        ('problem,answer\n1+2?,3\n"5 inch + 3 inch?,8\n3+4?,7\n"6 inch + 3 inch?,9\n7+8?,15\n', 3),
        ('problem,answer\n1+2?,3\n"5 inch + 3 inch?,8\n3+4?,7\n', 3),  # to the end of the file
        ('problem,answer\n1+2?,"3\n2+2?,4\n', 2),
        ('"problem,answer\n1+2?,3\n', 1),
        ('problem,answer\n"a ""quoted"" word",1\n"5" inch,2\n', 3),
        ('problem,answer\n"two\nlines",1\n\n"5" inch,2\n', 5),
    ],
)
def test_a_stray_quote_is_an_error_that_names_the_line(tmp_path, text, line):
    expected = rf"^data\.source: can't read '.*x\.csv': the row from line {line} on: "
    with pytest.raises(RecipeError, match=expected) as caught:
        load(csv_file(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_two_stray_quotes_that_look_like_one_cell_skip_those_rows(tmp_path):
    text = 'problem,answer\n1+2?,3\n"5 inch + 3 inch?,8\n3+4?,7\nHow much is 6",9\n7+8?,15\n'
    loaded = load(csv_file(tmp_path, text))
    assert answers(loaded) == ["3", "15"]
    assert loaded.skipped == {"several rows in a cell between quotes": 1}


def test_quotes_within_cells_and_cells_of_several_lines_are_read(tmp_path):
    rows = [
        {
            "problem": 'Is 5" more\nthan 3"?',
            "answer": "yes",
            "expert": 'Tom, 5, has 5".\n\nSo, yes.',
        },
        {"problem": '"Yes", said Ann.\nIs it, Tom?', "answer": "1,000", "expert": ""},
        {"problem": "2\n3", "answer": "5", "expert": "2,\n3, 5"},
    ]
    with (tmp_path / "x.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    loaded = load(tmp_path / "x.csv", columns={"expert": "expert"})
    assert [(p.text, p.answer) for p in loaded.problems] == [
        (r["problem"], r["answer"]) for r in rows
    ]
    assert [p.experts for p in loaded.problems] == [(rows[0]["expert"],), (), ("2,\n3, 5",)]
    plain = csv_file(tmp_path, 'problem,answer\nIs 5" more than 3"?,yes\n')
    assert load(plain).problems[0].text == 'Is 5" more than 3"?'


def test_a_csv_of_one_column_may_have_cells_of_several_lines(tmp_path):
    file = csv_file(tmp_path, 'problem\n"a\nb"\nc\n')
    assert [p.text for p in load(file, columns={"answer": None}).problems] == ["a\nb", "c"]


def test_a_column_name_that_comes_twice_is_an_error(tmp_path):
    with pytest.raises(RecipeError, match=r"x\.csv': column names must differ, got answer twice"):
        load(csv_file(tmp_path, "problem,answer,answer,,\na,1,2,,\n"))


LIST = ["1+2=3. It's $\\boxed{3}$.", 'It is "3", or $\\boxed{4}$.']


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("written", [str(LIST), json.dumps(LIST), json.dumps(LIST, indent=1)])
def test_a_list_that_is_written_as_text_is_a_list(tmp_path, suffix, written):
    row = {"problem": "1+2?", "answer": "3", "teacher": written, "choices": '["3", "4"]'}
    file = tmp_path / f"x{suffix}"
    if suffix == ".csv":
        with file.open("w", newline="", encoding="utf-8") as opened:
            csv.writer(opened).writerows([row.keys(), row.values()])
    else:
        jsonl(file, row)
    [problem] = load(file, columns={"teacher": "teacher"}).problems
    assert problem.teachers == tuple(LIST)
    [problem] = load(file, columns={"choices": "choices"}).problems
    assert (problem.text, problem.answer) == ("1+2?\nAnswer Choices: (A) 3 (B) 4", "A")


@pytest.mark.parametrize(
    "text",
    [
        "['a' 'b']",  # NumPy's: Python joins the two
        "['a'\n 'b']",
        "array(['a', 'b'], dtype=object)",
        "['a', b]",
        "['\\boxed{3}', 'b']",  # \b is no backslash
        "['" + "a', '" * 3 + "']" + "]",
        '["a", "b",]',
    ],
)
def test_a_list_in_another_notation_is_no_demonstration(tmp_path, text):
    file = jsonl(tmp_path / "x.jsonl", GOOD, GOOD | {"expert": text})
    loaded = load(file, columns={"expert": "expert"})
    assert loaded.skipped == {"a list as text in column 'expert'": 1}


@pytest.mark.parametrize("text", ["[1, 2]", "[1, 2)", "['a', 'b'] has two items.", "[a](b)"])
def test_brackets_do_not_make_a_text_a_list(tmp_path, text):
    file = jsonl(tmp_path / "x.jsonl", GOOD | {"expert": text})
    assert load(file, columns={"expert": "expert"}).problems[0].experts == (text,)


@pytest.mark.parametrize("text", ["[]", "[None]", "[null]"])
def test_an_empty_list_as_text_is_no_demonstration(tmp_path, text):
    file = jsonl(tmp_path / "x.jsonl", GOOD | {"expert": text})
    assert load(file, columns={"expert": "expert"}).problems[0].experts == ()


def test_messages_that_are_written_as_text_are_read(tmp_path):
    chat = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "It's 2"}]
    file = jsonl(
        tmp_path / "x.jsonl", *(GOOD | {"expert": w} for w in (str(chat), json.dumps(chat)))
    )
    loaded = load(file, columns={"expert": "expert"})
    assert [p.experts for p in loaded.problems] == [("It's 2",), ("It's 2",)]


# --- parquet ---------------------------------------------------------------------------------


def broken_texts(*texts: bytes) -> pa.StringArray:
    """A column of texts as another program may have written it: not checked to be UTF-8."""
    ends = [sum(map(len, texts[:i])) for i in range(len(texts) + 1)]
    offsets = pa.py_buffer(struct.pack(f"{len(ends)}i", *ends))
    return pa.StringArray.from_buffers(len(texts), offsets, pa.py_buffer(b"".join(texts)))


TEXTS = broken_texts(b"good", b"\xff\xfe", b"fine")
BAD_COLUMNS = {
    "text": TEXTS,
    "date": pa.array([0, 10**9, 1], pa.date32()),
    "time": pa.array([0, 2**62, 1], pa.timestamp("us")),
    "duration": pa.array([0, 2**62, 1], pa.duration("s")),
    "zone": pa.array([0, 1, 2], pa.timestamp("us", "Nowhere/City")),
    "list": pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), TEXTS),
    "struct": pa.StructArray.from_arrays([TEXTS, pa.array(["x", "y", "z"])], ["bad", "good"]),
    "category": pa.DictionaryArray.from_arrays(pa.array([0, 1, 2]), TEXTS),
}


@pytest.mark.parametrize("name", BAD_COLUMNS)
def test_a_bad_cell_in_an_unused_column_is_ignored(tmp_path, name):
    columns = {"problem": ["a", "b", "c"], "answer": ["1", "2", "3"], "other": BAD_COLUMNS[name]}
    pa.parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    loaded = load(tmp_path / "x.parquet")
    assert (answers(loaded), loaded.skipped) == (["1", "2", "3"], {})
    assert loaded.problems[1].columns.get("other") in (None, {"good": "y"})
    if name == "text":
        assert loaded.problems[0].columns["other"] == "good"


def test_a_row_with_a_bad_cell_in_a_used_column_is_skipped(tmp_path):
    struct_column = BAD_COLUMNS["struct"]
    columns = {"problem": TEXTS, "answer": ["1", "2", "3"], "demo": struct_column}
    pa.parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    loaded = load(tmp_path / "x.parquet", columns={"expert": "demo.good"})
    assert [(p.text, p.experts) for p in loaded.problems] == [("good", ("x",)), ("fine", ("z",))]
    assert loaded.skipped == {"unreadable value in column 'problem'": 1}
    columns["problem"] = ["a", "b", "c"]
    pa.parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    loaded = load(tmp_path / "x.parquet", columns={"expert": "demo.bad"})
    assert loaded.skipped == {"unreadable value in column 'demo.bad'": 1}


def test_a_column_that_cannot_be_read_is_named_where_it_is_used(tmp_path):
    category = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2]), TEXTS)
    columns = {"problem": category, "answer": ["1", "2", "3"]}
    pa.parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(RecipeError, match="3 with unreadable value in column 'problem'"):
        load(tmp_path / "x.parquet")


def test_columns_of_one_name_are_an_error(tmp_path):
    columns = [pa.array(["a"]), pa.array(["1"]), pa.array(["2"])]
    table = pa.Table.from_arrays(columns, ["problem", "answer", "answer"])
    pa.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(RecipeError, match="column names must differ, got answer twice"):
        load(tmp_path / "x.parquet")


# --- folders ---------------------------------------------------------------------------------


def test_a_folder_of_save_to_disk_is_a_data_set_not_its_descriptions(tmp_path):
    rows = datasets.Dataset.from_list([GOOD, GOOD | {"problem": "2+2=", "answer": "4"}])
    rows.save_to_disk(tmp_path / "one")
    assert answers(load(tmp_path / "one", split="test")) == ["2", "4"]
    splits = datasets.DatasetDict({"train": rows, "test": rows.select([1])})
    splits.save_to_disk(tmp_path / "several")
    assert answers(load(tmp_path / "several")) == ["2", "4"]
    assert answers(load(tmp_path / "several", split="test")) == ["4"]
    with pytest.raises(RecipeError, match=r"^data\.split: must be one of train, test, got 'dev'"):
        load(tmp_path / "several", split="dev")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"^data\.source: must be what save_to_disk"):
        load(tmp_path / "one")


def test_a_bad_cell_of_a_data_set_is_handled_as_in_a_file(tmp_path):
    table = pa.table({"problem": TEXTS, "answer": ["1", "2", "3"], "date": BAD_COLUMNS["date"]})
    datasets.Dataset(table).save_to_disk(tmp_path / "set")
    loaded = load(tmp_path / "set")
    assert answers(loaded) == ["1", "3"]
    assert loaded.skipped == {"unreadable value in column 'problem'": 1}


def test_descriptions_and_hidden_files_of_a_folder_are_no_rows(tmp_path):
    for name in ("dataset_infos.json", "dataset_info.json", ".x.json"):
        (tmp_path / name).write_text('{"problem": "a", "answer": 1}')
    jsonl(tmp_path / "rows.jsonl", GOOD)
    assert load(tmp_path).total == 1


# --- anything --------------------------------------------------------------------------------


def test_an_error_lists_forty_columns_and_three_levels_at_most(tmp_path):
    deep = json.loads('{"a":' * 400 + "1" + "}" * 400)
    rows = GOOD | {f"c{i}": 1 for i in range(100)} | {"deep": deep}
    file = jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(RecipeError) as caught:
        load(file, columns={"expert": "zz"})
    assert "columns are: problem, answer, expert, c0," in str(caught.value)
    assert str(caught.value).endswith("c36, ....")


_text = st.text(st.characters(), max_size=5)  # Halves of surrogate pairs as well.
_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=6,
)
_row = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("problem", "answer", "expert", "choices", "id"), _value),
)
_likely = st.fixed_dictionaries(
    {"problem": _text, "answer": _value, "choices": st.lists(_text | st.integers(), max_size=3)},
    optional={"expert": _value, "id": _value},
)


@given(st.lists(_row | _likely | _value, min_size=1, max_size=4), st.booleans())
@settings(
    max_examples=150, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_any_rows_are_problems_or_counted(tmp_path, rows, choices):
    columns = {"expert": "expert", "id": "id", "choices": "choices" if choices else None}
    file = jsonl(tmp_path / "x.jsonl", *(json.dumps(row) + "\n" for row in rows))
    try:
        loaded = load(file, columns=columns)
    except RecipeError:
        return
    assert len(loaded.problems) + sum(loaded.skipped.values()) == loaded.total == len(rows)
    assert len({p.id for p in loaded.problems}) == len(loaded.problems)
    for problem in loaded.problems:
        assert problem.text.strip() and problem.answer and problem.prompt_ids
        "".join([problem.id, problem.text, problem.answer, *problem.experts]).encode()


# --- mutated files ---------------------------------------------------------------------------

ROWS = [
    {"problem": f"What is {i}+1?", "answer": str(i + 1), "expert": f"so\n{i + 1}, \"x\"",
     "choices": ["a", str(i + 1)], "id": f"n{i}"}
    for i in range(4)
]  # fmt: skip


def whole_files() -> dict[str, bytes]:
    text, table = io.StringIO(), io.BytesIO()
    writer = csv.DictWriter(text, list(ROWS[0]))
    writer.writeheader()
    writer.writerows(ROWS)
    pa.parquet.write_table(pa.Table.from_pylist(ROWS), table)
    return {
        "x.jsonl": "\n".join(map(json.dumps, ROWS)).encode(),
        "x.json": json.dumps(ROWS, indent=1).encode(),
        "x.csv": text.getvalue().encode(),
        "x.parquet": table.getvalue(),
    }


FILES = whole_files()
PIECES = [bytes([i]) for i in b'\0\xff",\'[]{}\r\n\\'] + [
    b"\xef\xbb\xbf", b"\xff\xfe", b"9" * 5000, b"\\ud800", b"NaN", b"1e999", b"['", b"[" * 2000,
]  # fmt: skip
_piece = st.sampled_from(PIECES) | st.binary(min_size=1, max_size=3)
# A place as a share of the file, how many bytes are taken out there, and what is put there.
_change = st.tuples(
    st.floats(0, 1), st.sampled_from([0, 1, 1, 3, 40, 10**6]), _piece | st.just(b"")
)


@pytest.mark.parametrize("name", FILES)
@given(st.lists(_change, min_size=1, max_size=4), st.booleans())
@settings(
    max_examples=150, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_a_mutated_file_is_problems_or_one_recipe_error(tmp_path, name, changes, choices):
    data = FILES[name]
    for share, taken, put in changes:
        at = int(share * len(data))
        data = data[:at] + put + data[at + taken :]
    if name == "x.parquet" and not data.endswith(b"PAR1"):
        data = data[:-8] + FILES[name][-8:]  # Without its last bytes it is never looked into.
    file = tmp_path / name
    file.write_bytes(data)
    columns = {"expert": "expert", "id": "id", "choices": "choices" if choices else None}
    try:
        loaded = load(file, columns=columns)
    except RecipeError as error:
        for line in error.problems:
            assert line.startswith("data.") and line.isprintable() and len(line) < 3000
    else:
        assert loaded.problems and all(p.text.strip() and p.answer for p in loaded.problems)
        assert len(loaded.problems) + sum(loaded.skipped.values()) == loaded.total
        assert len(loaded.fingerprint()) == 32


@pytest.mark.parametrize(
    "source",
    ["a" * 300 + ".jsonl", "a\0b.jsonl", "~no-such-user/x.jsonl", "x.jsonl/y.csv", "n" * 5000],
)
def test_a_source_that_is_no_possible_path_is_one_recipe_error(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "x.jsonl", GOOD)
    with pytest.raises(RecipeError, match=r"^data\.source: ") as caught:
        load(source)
    assert str(caught.value).isprintable()


def test_a_folder_that_is_named_like_a_file_is_not_read(tmp_path):
    (tmp_path / "set" / "x.json").mkdir(parents=True)
    jsonl(tmp_path / "set" / "y.jsonl", GOOD)
    assert load(tmp_path / "set").total == 1


# --- through the command line ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "overrides", "part"),
    [
        (
            GOOD | {"problem": "1+" * 3000},
            [],
            "1 with prompt too long (> 2015 tokens)",
        ),  # 2048 - 32 - 1
        (GOOD, ["rollout.max_tokens=2047"], "rollout.max_tokens: must leave room for a prompt"),
        (GOOD, ["data.max_prompt_tokens=1"], "1 with prompt too long (> 1 tokens)"),
        (GOOD | {"answer": None}, [], "data.source: must have usable rows, got 1 that are not"),
        ({"problem": "1+1=", "expert": "2"}, [], "data.columns.answer: no row has a column"),
        (GOOD | {"expert": None}, ["group.shortfall=drop"], "group: must find its demonstrations"),
        ("{\n", [], "1 with not valid JSON"),
        ("", [], "data.source: must have rows"),
    ],
)
def test_data_that_cannot_be_trained_on(row, overrides, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    jsonl(Path("x.jsonl"), row)
    own = ["data.source=x.jsonl", "data.columns.expert=expert", "group.teacher=0"]
    assert main(["train", "recipes/lab.yaml", *own, *overrides]) == 2
    errors = capsys.readouterr().err
    assert part in errors
    assert "Traceback" not in errors
    assert not Path("runs").exists()
