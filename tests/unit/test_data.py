"""Rows to problems, on real files, real GSM8K rows and the lab."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gft_lite.data.problems import load_problems, problems_of_step, split_holdout
from gft_lite.data.prompts import PromptFormat
from gft_lite.recipe.loader import read_tree
from gft_lite.recipe.schema import Recipe
from gft_lite.recipe.sections import ColumnsSettings, DataSettings
from gft_lite.types import Problem
from gft_lite.utils.errors import RecipeError

ROOT = Path(__file__).resolve().parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "bench" / "gsm8k_train.jsonl"
MAPPINGS = sorted((ROOT / "configs" / "data").glob("*.yaml"))


def char_tokenizer() -> PreTrainedTokenizerFast:
    """A real tokenizer of one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


TOKENIZER = char_tokenizer()


def load(source: Path | str, *, context: int | None = None, reserve: int = 1, **settings):
    settings = DataSettings(source=str(source), **({"shuffle": False} | settings))
    format = PromptFormat(TOKENIZER, settings.prompt)
    return load_problems(settings, format, context=context, reserve=reserve)


def jsonl(path: Path, *rows: object) -> Path:
    lines = [r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows]
    path.write_bytes("".join(lines).encode("utf-8", "surrogateescape"))
    return path


def answers(loaded) -> list[str | None]:
    return [p.answer for p in loaded.problems]


# --- formats ---------------------------------------------------------------------------------


def test_a_row_becomes_a_problem(tmp_path):
    row = {"problem": "1+1=", "answer": 2, "expert": "two", "teacher": ["2!", "II"], "level": 3}
    path = jsonl(tmp_path / "x.jsonl", row)
    loaded = load(path, columns={"expert": "expert", "teacher": ["teacher"]})
    assert loaded.total == 1 and loaded.skipped == {} and loaded.examples == ()
    assert loaded.describe() == "1 problems of 1 rows"
    (problem,) = loaded.problems
    assert (problem.id, problem.text, problem.answer) == ("1", "1+1=", "2")
    assert (problem.experts, problem.teachers) == (("two",), ("2!", "II"))
    assert problem.columns == row
    assert TOKENIZER.decode(problem.prompt_ids) == "1+1="


def test_every_format_gives_the_same_problems(tmp_path):
    rows = [{"problem": f"{i}+1=", "answer": f"00{i}", "expert": f"a\n{i},"} for i in range(3)]
    jsonl(tmp_path / "a.jsonl", *rows)
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    jsonl(tmp_path / "c.json", *rows)
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    with (tmp_path / "e.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["problem", "answer", "expert"])
        writer.writeheader()
        writer.writerows(rows)
    names = ["a.jsonl", "b.json", "c.json", "d.parquet", "e.csv"]
    loaded = [load(tmp_path / n, columns={"expert": "expert"}).problems for n in names]
    assert [p.answer for p in loaded[0]] == ["000", "001", "002"]
    assert loaded[0][1].experts == ("a\n1,",)
    assert all(problems == loaded[0] for problems in loaded)
    together = load(tmp_path, columns={"expert": "expert"})
    assert [p.text for p in together.problems] == [r["problem"] for r in rows] * 5
    assert [p.id for p in together.problems] == [str(i + 1) for i in range(15)]


def test_of_a_folder_only_the_files_of_the_split_are_read(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "gsm8k_test"):
        jsonl(tmp_path / f"{name}.jsonl", {"problem": name, "answer": 1})
    (tmp_path / "README.md").write_text("train")
    assert [p.text[:5] for p in load(tmp_path).problems] == ["train", "train"]
    assert [p.text for p in load(tmp_path, split="test").problems] == ["gsm8k_test"]
    with pytest.raises(RecipeError, match=r"^data\.split: .*gsm8k_test\.jsonl.*got 'dev'"):
        load(tmp_path, split="dev")


def test_the_files_of_a_folder_are_read_in_the_order_of_their_names(tmp_path):
    for i in (3, 1, 7, 0, 9, 4, 8, 2, 6, 5):
        jsonl(tmp_path / f"part{i}.jsonl", {"problem": str(i), "answer": i})
    assert answers(load(tmp_path)) == list("0123456789")


def test_a_very_long_csv_cell_is_read(tmp_path):
    (tmp_path / "x.csv").write_text("problem,answer,expert\na,1," + "x" * 200_000 + "\nb,2\n")
    first, second = load(tmp_path / "x.csv", columns={"expert": "expert"}).problems
    assert len(first.experts[0]) == 200_000
    assert second.experts == ()


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"problem": "a", "answer": 1}\r\n{"problem": "b", "answer": 2}\r\n'
    )
    assert [p.text for p in load(path).problems] == ["a", "b"]


def test_the_lab_needs_no_columns():
    loaded = load("lab", problems=20)
    assert loaded.problems[0].id.startswith("lab-train-")
    assert all(len(p.experts) == 1 and p.teachers and p.columns["skill"] for p in loaded.problems)
    own = load("lab", columns={"expert": "teacher"}).problems[0]
    assert len(own.experts) > 1 and own.teachers == () and own.id == "1"
    with pytest.raises(RecipeError, match=r"^data\.split: must be one of train"):
        load("lab", split="trian")


# --- sources that do not exist ---------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    ["no.jsonl", "./no", "../no", "/no/such/folder", "~/no", "a/b/c", "org/no.parquet", "a\\b", ""],
)
def test_a_missing_file_is_an_error_without_a_download(source, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: pytest.fail("a download was attempted")
    )
    monkeypatch.chdir(tmp_path)
    if source == "":
        (tmp_path / "sub").mkdir()  # the empty string is the folder one is in
    with pytest.raises(RecipeError, match=r"^data\.source: .*got '"):
        load(source)


def test_a_hub_data_set_is_requested_with_the_settings_of_the_recipe(monkeypatch):
    import datasets

    requested = []

    def answer(*args, **kwargs):
        requested.append((args, kwargs))
        return datasets.Dataset.from_list([{"problem": "a", "answer": "1"}] * 3)

    monkeypatch.setattr(datasets, "load_dataset", answer)
    loaded = load("org/set", config="main", split="test", revision="abc")
    assert requested == [(("org/set",), {"name": "main", "split": "test", "revision": "abc"})]
    assert loaded.total == 3
    assert [p.id for p in loaded.problems] == ["1", "2", "3"]


def test_a_hub_that_cannot_be_reached_is_a_recipe_error(tmp_path):
    code = (
        "from types import SimpleNamespace as N\n"
        "from gft_lite.data.problems import load_problems\n"
        "from gft_lite.recipe.sections import DataSettings\n"
        "from gft_lite.utils.errors import RecipeError\n"
        "try: load_problems(DataSettings(source='no-such-org/no-such-set'), N())\n"
        "except RecipeError as error: print(error)\n"
    )
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert done.stdout.startswith("data.source: no such file here, and the hub's data set")
    assert "no-such-org/no-such-set" in done.stdout


def test_unreadable_files_are_recipe_errors(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 this is not one")
    (tmp_path / "x.txt").write_text("1+1")
    (tmp_path / "x.csv").write_bytes(b"problem,answer\n\xff\xfe,1\n")
    for name in ("x.parquet", "x.csv"):
        with pytest.raises(RecipeError, match=rf"^data\.source: can't read .*{name}"):
            load(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.jsonl")  # Reading it would never end.
    with pytest.raises(RecipeError, match="it is not a regular file"):
        load(tmp_path / "pipe.jsonl")
    with pytest.raises(RecipeError, match=r"^data\.source: must be a \.jsonl, .* or \.csv file"):
        load(tmp_path / "x.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match=r"^data\.source: must hold \.jsonl"):
        load(tmp_path / "empty")


@pytest.mark.parametrize(("name", "text"), [("x.jsonl", "\n\n"), ("x.json", "[]"), ("x.csv", "")])
def test_a_source_without_rows_is_an_error(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError, match=r"^data\.source: must have rows"):
        load(tmp_path / name)


# --- rows that can't be used -----------------------------------------------------------------

GOOD = {"problem": "1+1=", "answer": "2", "expert": "so 2"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"problem": "1+1=", "answer": \n', "not valid JSON"),
        ('{"problem": "\udcff", "answer": 1}\n', "not UTF-8"),
        ("[" * 100_000 + "\n", "not valid JSON"),
        ("\n", "blank line"),
        ("[1, 2]\n", "not an object with columns"),
        ({"answer": "2"}, "missing column 'problem'"),
        ({"problem": "1+1="}, "missing column 'answer'"),
        (GOOD | {"problem": " \n"}, "no problem text"),
        (GOOD | {"problem": None}, "no problem text"),
        (GOOD | {"problem": 7}, "wrong type in column 'problem'"),
        (GOOD | {"problem": "\ud800"}, "broken Unicode in column 'problem'"),
        (GOOD | {"answer": None}, "no answer"),
        (GOOD | {"answer": " "}, "no answer"),
        (GOOD | {"answer": float("nan")}, "no answer"),
        (GOOD | {"answer": []}, "no answer"),
        (GOOD | {"answer": ["1", "2"]}, "more than one answer"),
        (GOOD | {"answer": {"value": 2}}, "wrong type in column 'answer'"),
        (GOOD | {"expert": 7}, "wrong type in column 'expert'"),
        (GOOD | {"expert": ["a", {"b": 1}]}, "wrong type in column 'expert'"),
        (GOOD | {"expert": "\udfff"}, "broken Unicode in column 'expert'"),
        (GOOD | {"problem": "1" * 9}, "prompt too long (> 8 tokens)"),
    ],
)
def test_an_unusable_row_is_skipped_alone(tmp_path, row, reason):
    path = jsonl(tmp_path / "x.jsonl", GOOD, row, GOOD)
    loaded = load(path, columns={"expert": "expert"}, max_prompt_tokens=8)
    assert [p.id for p in loaded.problems] == ["1", "3"]
    assert loaded.skipped == {reason: 1}
    assert loaded.examples == (f"x.jsonl, row 2: {reason}",)
    assert loaded.total == 3


def test_reasons_are_counted_and_the_first_three_rows_shown(tmp_path):
    bad = [GOOD | {"answer": None}] * 4 + ["{\n"]
    loaded = load(jsonl(tmp_path / "x.jsonl", *bad, GOOD))
    assert loaded.skipped == {"no answer": 4, "not valid JSON": 1}
    assert loaded.examples == tuple(f"x.jsonl, row {i}: no answer" for i in (1, 2, 3))
    assert (
        loaded.describe() == "1 problems of 6 rows, skipped 4 with no answer, 1 with not valid JSON"
    )


def test_no_usable_row_at_all_is_an_error_with_the_counts(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", GOOD | {"answer": None}, GOOD | {"answer": ""}, "{\n")
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert caught.value.problems == [
        "data.source: must have usable rows, got 3 that are not: 2 with no answer, 1 with not "
        "valid JSON. For example x.jsonl, row 1: no answer; x.jsonl, row 2: no answer; "
        "x.jsonl, row 3: not valid JSON."
    ]
    with pytest.raises(RecipeError, match=r"1 with not valid JSON"):
        load(jsonl(tmp_path / "y.jsonl", "{\n"))


def test_the_policys_context_limits_the_prompt_too(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", *[GOOD | {"problem": "1" * n} for n in (4, 5, 6)])
    assert len(load(path, context=6).problems) == 2
    assert len(load(path, context=6, reserve=2).problems) == 1
    loaded = load(path, context=100, max_prompt_tokens=4)
    assert loaded.skipped == {"prompt too long (> 4 tokens)": 2}


def test_a_column_that_no_row_has_is_a_recipe_error(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", "{\n", GOOD | {"extra": {"solution": "2"}}, {"more": 1})
    columns = {"expert": ["expert", "extra.solutoin"], "id": "zzz"}
    with pytest.raises(RecipeError) as caught:
        load(path, columns=columns)
    known = "problem, answer, expert, extra, extra.solution, more"
    assert caught.value.problems == [
        f"data.columns.expert: no row has a column 'extra.solutoin'; columns are: {known}. "
        "Did you mean extra.solution?",
        f"data.columns.id: no row has a column 'zzz'; columns are: {known}.",
    ]
    pa.parquet.write_table(pa.Table.from_pylist([GOOD]), tmp_path / "x.parquet")
    with pytest.raises(RecipeError, match=r"columns\.answer: no row has a column 'gold'"):
        load(tmp_path / "x.parquet", columns={"answer": "gold"})


def test_a_demonstration_that_only_some_rows_have_is_no_error(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", {"problem": "a", "answer": 1}, GOOD)
    loaded = load(path, columns={"expert": "expert"})
    assert [p.experts for p in loaded.problems] == [(), ("so 2",)]


# --- columns ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "value", "answer"),
    [
        ("plain", 72, "72"),
        ("plain", 72.0, "72"),
        ("plain", 0.5, "0.5"),
        ("plain", ["72"], "72"),
        ("plain", [72], "72"),
        ("plain", " 1,000 ", "1,000"),
        ("hash", "48/2 #### no\n#### 1,000\n", "1,000"),
        ("boxed", r"\boxed{1} then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("boxed", r"so \boxed{\left\{ x \right.}", r"\left\{ x \right."),
        ("boxed", r"\boxed 2$.", "2"),
        ("hash", "no mark", None),
        ("hash", "####  ", None),
        ("boxed", "no box", None),
        ("boxed", r"\boxed{1", None),
        ("boxed", r"\boxed{ }", None),
    ],
)
def test_the_answer_is_extracted(tmp_path, how, value, answer):
    fallback = {"plain": "good", "hash": "#### good", "boxed": r"\boxed{good}"}[how]
    rows = [{"problem": "a", "answer": v} for v in (value, fallback)]
    loaded = load(jsonl(tmp_path / "x.jsonl", *rows), columns={"answer_from": how})
    assert answers(loaded) == ([answer] if answer else []) + ["good"]
    assert loaded.skipped == ({} if answer else {"no answer": 1})


def test_data_without_answers_are_declared_by_a_null_column(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", {"problem": "Tell a joke."})
    assert answers(load(path, columns={"answer": None})) == [None]


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ("one", ("one",)),
        (["one", "", None, "two"], ("one", "two")),
        (None, ()),
        (float("nan"), ()),
        ([], ()),
        (
            [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "draft"},
                {"role": "user", "content": "again"},
                {"role": "assistant", "content": "final"},
            ],
            ("final",),
        ),
        ([{"role": "user", "content": "q"}], ()),
        (
            [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]],
            ("a", "b"),
        ),
    ],
)
def test_demonstrations_of_every_shape(tmp_path, value, texts):
    path = jsonl(tmp_path / "x.jsonl", GOOD | {"teacher": value, "more": "last"})
    (problem,) = load(path, columns={"expert": "expert", "teacher": ["teacher", "more"]}).problems
    assert problem.experts == ("so 2",)
    assert problem.teachers == (*texts, "last")


def test_nested_columns_of_a_parquet_file(tmp_path):
    row = {"extra_info": {"question": "1+1=", "model_answer": ["a", "b"]}, "gold": {"value": "2"}}
    hollow = {"extra_info": None, "gold": {"value": "2"}}
    table = pa.Table.from_pylist([hollow, row], schema=pa.Table.from_pylist([row]).schema)
    pa.parquet.write_table(table, tmp_path / "x.parquet")
    columns = {
        "problem": "extra_info.question",
        "answer": "gold.value",
        "teacher": "extra_info.model_answer",
    }
    loaded = load(tmp_path / "x.parquet", columns=columns)
    assert loaded.skipped == {"missing column 'extra_info.question'": 1}
    assert [(p.text, p.answer, p.teachers) for p in loaded.problems] == [("1+1=", "2", ("a", "b"))]


def test_ids_are_unique(tmp_path):
    ids = ["a", "a", "a#2", None, "", 7, "7", "a"]
    path = jsonl(tmp_path / "x.jsonl", *[GOOD | {"id": i} for i in ids])
    names = [p.id for p in load(path, columns={"id": "id"}).problems]
    assert names == ["a", "a#2", "a#2#3", "4", "5", "7", "7#7", "a#8"]
    path = jsonl(tmp_path / "x.jsonl", *[GOOD | {"id": i} for i in ("a", "a#3", "a")])
    assert [p.id for p in load(path, columns={"id": "id"}).problems] == ["a", "a#3", "a#3#3"]


def test_gsm8k_annotations_are_cleaned_and_the_answer_boxed(tmp_path):
    solution = "He has 48/2 = <<48/2=24>>24 clips.\nSo 48+24 = <<48+24=72>>72.\n#### 72"
    path = jsonl(tmp_path / "x.jsonl", {"question": "q", "answer": solution})
    columns = {"problem": "question", "answer_from": "hash", "expert": "answer"}
    (raw,) = load(path, columns=columns).problems
    (clean,) = load(path, columns=columns | {"clean": "gsm8k"}).problems
    assert raw.experts == (solution,) and raw.answer == clean.answer == "72"
    assert clean.experts == (
        "He has 48/2 = 24 clips.\nSo 48+24 = 72.\nThe final answer is $\\boxed{72}$.",
    )


def test_real_gsm8k_rows():
    if not GSM8K.is_file():
        pytest.skip(f"{GSM8K.name}: the shared data are not beside the project")
    columns = {"answer": "solution", "answer_from": "boxed", "expert": "solution", "id": "id"}
    loaded = load(GSM8K, columns=columns)
    assert (loaded.total, loaded.skipped) == (7473, {})
    gold = [json.loads(line) for line in GSM8K.read_bytes().splitlines()]
    assert answers(loaded) == [row["answer"] for row in gold]
    assert [p.id for p in loaded.problems] == [row["id"] for row in gold]
    assert loaded.problems[0].columns == gold[0]


# --- order -----------------------------------------------------------------------------------


def test_the_seed_determines_the_order(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", *[GOOD | {"problem": str(i)} for i in range(10)])
    texts = [p.text for p in load(path, shuffle=True, seed=0).problems]
    # Fixed by hand: Python's own generator, the same on every platform.
    assert texts == ["7", "8", "1", "5", "3", "4", "2", "0", "9", "6"]
    assert [p.text for p in load(path, shuffle=True, seed=1).problems] != texts
    assert [p.text for p in load(path).problems] == [str(i) for i in range(10)]


@given(bad=st.sets(st.integers(0, 19), max_size=19), n=st.integers(1, 25), seed=st.integers(0, 99))
def test_a_subset_is_the_beginning_of_the_whole_order(tmp_path_factory, bad, n, seed):
    rows = [GOOD | {"problem": "" if i in bad else str(i)} for i in range(20)]
    path = jsonl(tmp_path_factory.mktemp("d") / "x.jsonl", *rows)
    whole = load(path, shuffle=True, seed=seed)
    part = load(path, shuffle=True, seed=seed, problems=n)
    assert len(whole.problems) == 20 - len(bad)
    assert part.problems == whole.problems[:n]
    assert sum(part.skipped.values()) <= len(bad)
    assert {p.id for p in whole.problems} == {str(i + 1) for i in range(20) if i not in bad}


def test_skipped_problems_and_their_copies_are_left_out(tmp_path):
    texts = ["1+1", "2+2", "3+3", " 1+1 ", "4+4", "5+5"]
    path = jsonl(tmp_path / "d.jsonl", *({"problem": t, "answer": t.strip()[0]} for t in texts))
    assert answers(load(path, skip=2)) == ["3", "4", "5"]
    assert answers(load(path, skip=2, problems=2)) == ["3"]  # One of the two is a copy.
    first, rest = load(path, shuffle=True, problems=2), load(path, shuffle=True, skip=2)
    assert set(answers(first)) | set(answers(rest)) == set("12345")
    assert not set(answers(first)) & set(answers(rest))
    with pytest.raises(RecipeError, match=r"data\.skip: must leave some of the 6 usable problems"):
        load(path, skip=6)


def test_a_small_subset_reads_few_rows(tmp_path):
    rows = ["{\n"] * 500 + [GOOD] * 500
    loaded = load(jsonl(tmp_path / "x.jsonl", *rows), shuffle=True, problems=5)
    assert loaded.total == 1000
    assert len(loaded.problems) == 5 and sum(loaded.skipped.values()) < 50


PROBLEMS = tuple(Problem(str(i), str(i), None) for i in range(60))


@given(n=st.integers(1, 60), holdout=st.integers(0, 80))
def test_the_holdout_is_disjoint_and_leaves_enough_to_train_on(n, holdout):
    problems = PROBLEMS[:n]
    train, held = split_holdout(problems, holdout)
    assert {p.id for p in train}.isdisjoint(p.id for p in held)
    assert sorted([*train, *held], key=lambda p: int(p.id)) == list(problems)
    assert len(held) == min(holdout, n - -(-4 * n // 5))
    assert len(train) >= max(1, 0.8 * n)
    assert (train, held) == split_holdout(problems, holdout)


def test_the_holdout_is_spread_over_the_data():
    train, held = split_holdout(PROBLEMS[:20], 2)
    assert [p.id for p in held] == ["5", "15"]
    assert len(train) == 18
    assert split_holdout((), 5) == ((), ())


def test_copies_of_a_held_out_problem_are_not_trained_on():
    # 0 to 9, each three times; " 4 " and "4" are one problem.
    texts = [f" {i % 10} " if i < 10 else str(i % 10) for i in range(30)]
    problems = [Problem(str(i), text, None) for i, text in enumerate(texts)]
    train, held = split_holdout(problems, 2)
    assert [p.text for p in held] == [" 2 ", " 7 "]
    assert [p.id for p in train] == [str(i) for i in range(30) if i % 10 not in (2, 7)]
    assert split_holdout([problems[0]] * 10, 2) == ((problems[0],) * 10, ())


@pytest.mark.parametrize(
    "copy", ["CAF\u00c9 2+2?", "cafe\u0301 2+2?", "caf\u00e9\u00a0 2+2?", "caf\u00e9 2\uff0b2?"]
)
def test_a_copy_in_another_case_or_encoding_is_a_copy(copy):
    texts = ["1", "3", "caf\u00e9 2+2?", "5", "7", copy]
    train, held = split_holdout([Problem(str(i), t, None) for i, t in enumerate(texts)], 1)
    assert [p.id for p in held] == ["2"]
    assert [p.id for p in train] == ["0", "1", "3", "4"]


@given(st.lists(st.integers(0, 12), max_size=40), st.integers(0, 10))
def test_no_text_is_in_both_parts_and_none_is_held_out_twice(numbers, holdout):
    problems = [Problem(str(i), str(n), None) for i, n in enumerate(numbers)]
    train, held = split_holdout(problems, holdout)
    held_texts = [p.text for p in held]
    assert len(held) == len(set(held_texts)) == min(holdout, len(set(numbers)) // 5)
    assert train == tuple(p for p in problems if p.text not in held_texts)


@given(n=st.integers(1, 30), per_step=st.integers(1, 70), seed=st.integers(0, 9))
def test_every_problem_comes_once_an_epoch(n, per_step, seed):
    problems = PROBLEMS[:n]
    steps = -(-3 * n // per_step)
    visits = [p.id for s in range(steps) for p in problems_of_step(problems, s, per_step, seed)]
    assert len(visits) == steps * per_step
    for epoch in range(3):
        assert set(visits[epoch * n : (epoch + 1) * n]) == {p.id for p in problems}


def test_epochs_and_seeds_have_their_own_order():
    epochs = [[p.id for p in problems_of_step(PROBLEMS, s, 60, seed=0)] for s in (0, 1)]
    assert epochs[0] != epochs[1] != [p.id for p in PROBLEMS]
    assert [p.id for p in problems_of_step(PROBLEMS, 0, 60, seed=1)] != epochs[0]
    assert [p.id for p in problems_of_step(PROBLEMS, 3, 20, seed=0)] == epochs[1][:20]
    with pytest.raises(ValueError, match="must not be empty"):
        problems_of_step((), 0, 4, 0)


# --- the identity of the data ----------------------------------------------------------------


def test_the_fingerprint_is_that_of_what_was_drawn(tmp_path):
    rows = [GOOD | {"problem": str(i), "level": i} for i in range(6)]
    path = jsonl(tmp_path / "x.jsonl", *rows)
    columns = {"expert": "expert"}
    first = load(path, columns=columns, problems=4)
    assert load(path, columns=columns, problems=4).fingerprint() == first.fingerprint()
    # What is not drawn, the file's name and its format do not matter.
    other = jsonl(tmp_path / "y.jsonl", *rows[:4], GOOD | {"problem": "changed"})
    assert load(other, columns=columns, problems=4).fingerprint() == first.fingerprint()
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "z.parquet")
    parquet = load(tmp_path / "z.parquet", columns=columns, problems=4)
    assert parquet.fingerprint() == first.fingerprint()
    assert load(path, columns=columns, problems=3).fingerprint() != first.fingerprint()
    assert (
        load(path, columns=columns, problems=4, shuffle=True).fingerprint() != first.fingerprint()
    )


@pytest.mark.parametrize(
    "change", [{"problem": "9"}, {"answer": "9"}, {"expert": "9"}, {"level": 9}, {"id": "9"}]
)
def test_the_fingerprint_changes_with_every_column_of_a_row(tmp_path, change):
    rows = [GOOD | {"id": "a", "level": 1}, GOOD | {"id": "b", "level": 2}]
    columns = {"expert": "expert", "id": "id"}
    first = load(jsonl(tmp_path / "x.jsonl", *rows), columns=columns).fingerprint()
    rows[1] = rows[1] | change
    assert load(jsonl(tmp_path / "x.jsonl", *rows), columns=columns).fingerprint() != first


# --- demonstrations that can't be trained on -------------------------------------------------


def load_for_training(path: Path, max_tokens: int, **settings):
    data = DataSettings(source=str(path), shuffle=False, **settings)
    format = PromptFormat(TOKENIZER, data.prompt)
    return load_problems(data, format, max_response_tokens=max_tokens)


def test_demonstrations_over_the_limit_are_left_out_and_counted(tmp_path):
    # With EOS: 3, 4, 5 and 6 tokens.
    texts = ["so", "soo", "so 2", "so 2."]
    rows = [GOOD | {"expert": texts[:2], "teacher": texts[2:]}, GOOD | {"expert": texts[3]}]
    path = jsonl(tmp_path / "x.jsonl", *rows)
    columns = {"expert": "expert", "teacher": "teacher"}
    loaded = load_for_training(path, 5, columns=columns)
    assert [(p.experts, p.teachers) for p in loaded.problems] == [
        (("so", "soo"), ("so 2",)), ((), ()),
    ]  # fmt: skip
    assert loaded.unusable_demonstrations == {"more tokens than rollout.max_tokens (5)": 2}
    assert loaded.describe() == (
        "2 problems of 2 rows; 2 demonstrations left out: 2 with more tokens than "
        "rollout.max_tokens (5)"
    )
    # Methods without demonstrations leave none out, and have the same data.
    assert loaded.fingerprint() == load(path, columns=columns).fingerprint()
    assert load_for_training(path, 6, columns=columns).unusable_demonstrations == {}
    with pytest.raises(RecipeError) as caught:
        load_for_training(path, 2, columns=columns)
    assert caught.value.problems == [
        "data.columns: must have demonstrations that can be trained on, got 5 that can't: 5 with "
        "more tokens than rollout.max_tokens (2)."
    ]


def test_demonstrations_with_an_end_token_inside_are_left_out(tmp_path):
    tokenizer = char_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<eos>"})
    rows = [GOOD | {"expert": "so<eos> 2"}, GOOD | {"expert": "so 2<eos>"}]
    data = DataSettings(source=str(jsonl(tmp_path / "x.jsonl", *rows)), shuffle=False,
                        columns=ColumnsSettings(expert=["expert"]))  # fmt: skip
    format = PromptFormat(tokenizer, data.prompt)
    loaded = load_problems(data, format, max_response_tokens=100)
    assert [p.experts for p in loaded.problems] == [(), ("so 2<eos>",)]
    assert loaded.unusable_demonstrations == {"an end token inside its text": 1}


def test_data_without_demonstrations_are_no_error(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", GOOD)
    assert load_for_training(path, 2).unusable_demonstrations == {}


# --- shipped mappings ------------------------------------------------------------------------


def test_all_mappings_exist():
    names = {"gsm8k", "math", "numinamath_cot", "numinamath_cot_distillation_100k", "jsonl"}
    assert {p.stem for p in MAPPINGS} >= names


@pytest.mark.parametrize("path", MAPPINGS, ids=lambda p: p.stem)
def test_a_shipped_mapping_is_a_valid_fragment(path):
    assert path.read_text(encoding="utf-8").startswith("# ")
    tree, places = read_tree(path)
    assert list(tree) == ["data"]
    data = Recipe.from_tree(tree, places).data
    assert data.source != "lab" and data.columns != ColumnsSettings()
    assert data.columns.expert


ROWS = {
    "gsm8k": {"question": "q", "answer": "It is <<2*3=6>>6.\n#### 6"},
    "math": {
        "problem": "q",
        "level": "Level 1",
        "solution": r"It is \boxed{6}.",
        "type": "Algebra",
    },
    "numinamath_cot": {"source": "s", "problem": "q", "solution": r"\boxed{6}", "messages": []},
    "numinamath_cot_distillation_100k": {
        "prompt": [{"role": "user", "content": "q Box it."}],
        "reward_model": {"style": "rule", "ground_truth": "6"},
        "extra_info": {"question": "q", "answer": "e", "model_answer": ["t", "u"], "index": 0},
    },
    "jsonl": {"problem": "q", "answer": 6, "expert": "e", "teacher": ["t", "u"]},
}


@pytest.mark.parametrize("name", ROWS)
def test_a_shipped_mapping_reads_a_row_of_its_data_set(name, tmp_path):
    tree, places = read_tree(ROOT / "configs" / "data" / f"{name}.yaml")
    mapped = Recipe.from_tree(tree, places).data
    path = jsonl(tmp_path / "x.jsonl", ROWS[name])
    (problem,) = load(path, columns=mapped.columns, prompt=mapped.prompt).problems
    assert (problem.text, problem.answer, len(problem.experts)) == ("q", "6", 1)
    assert len(problem.teachers) == (2 if "teacher" in str(tree) else 0)
    if name != "jsonl":
        assert TOKENIZER.decode(problem.prompt_ids).endswith("within \\boxed{}.")


# --- questions of several columns ------------------------------------------------------------


def test_a_problem_of_several_columns_and_of_options_without_letters(tmp_path):
    rows = [{"title": None, "table": "a|1", "q": "Which?", "options": ["yes", "no"], "answer": 3}]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    columns = ColumnsSettings(problem=["title", "table", "q", "options"])
    [problem] = load(str(file), columns=columns).problems
    assert problem.text == "a|1\nWhich?\nOptions: yes, no"
    assert problem.answer == "3"


def test_choices_and_the_number_of_one_get_letters(tmp_path):
    rows = [
        {"q": "Which?", "of": ["x", "y", "z"], "answer": 2},
        {"q": "And?", "of": ["x", "y"], "answer": "A"},
        {"q": "Open?", "of": None, "answer": "A"},
    ]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    found = load(
        str(file), columns=ColumnsSettings(problem="q", choices="of"), shuffle=False
    ).problems
    assert [p.text for p in found] == [
        "Which?\nAnswer Choices: (A) x (B) y (C) z", "And?\nAnswer Choices: (A) x (B) y", "Open?",
    ]  # fmt: skip
    assert [p.answer for p in found] == ["C", "A", "A"]
    with pytest.raises(RecipeError, match=r"columns\.choices: no row has a column 'off'"):
        load(str(file), columns=ColumnsSettings(problem="q", choices="off"))


ARC = {"question": "Which is hottest?", "choices": {"text": ["ice", "steam", "snow", "mud"]}}


@pytest.mark.parametrize(
    ("labels", "answer", "letter"),
    [
        (["1", "2", "3", "4"], "3", "C"),
        (["1", "2", "3", "4"], 3, "C"),
        ([1, 2, 3, 4], 1, "A"),
        ([1.0, 2.0, 3.0, 4.0], 3, "C"),  # pandas writes integers as floats
        (["1", "2", "3", "4"], 3.0, "C"),
        (["0", "1", "2", "3"], "3", "D"),
        (["A", "B", "C", "D"], "B", "B"),
        (["W", "X", "Y", "Z"], "X", "B"),
        (["D", "C", "B", "A"], "A", "D"),  # the data set's own A
        (["1", "2"], 3, "D"),  # labels of something else: a number counts from 0
        (None, 3, "D"),
        (None, 3.0, "D"),
        (None, "(b)", "B"),
        (None, " C. ", "C"),
        (None, "snow", "C"),
    ],
)
def test_the_gold_choice_becomes_the_letter_in_the_prompt(tmp_path, labels, answer, letter):
    row = ARC | {"answerKey": answer}
    if labels:
        row["choices"] = ARC["choices"] | {"label": labels}
    columns = {"problem": "question", "choices": "choices.text", "answer": "answerKey"}
    [problem] = load(jsonl(tmp_path / "x.jsonl", row), columns=columns).problems
    assert problem.text.endswith("Answer Choices: (A) ice (B) steam (C) snow (D) mud")
    assert problem.answer == letter
    assert problem.columns["answer_type"] == "choice"


@pytest.mark.parametrize("answer", [0, 5])
def test_a_number_that_is_none_of_the_numbers_that_label_choices_is_unusable(tmp_path, answer):
    right = {"text": ["ice", "steam", "snow", "mud"], "label": ["1", "2", "3", "4"]}
    rows = [{"question": "?", "choices": right, "answerKey": key} for key in (4, answer)]
    columns = {"problem": "question", "choices": "choices.text", "answer": "answerKey"}
    loaded = load(jsonl(tmp_path / "x.jsonl", *rows), columns=columns)
    assert [p.answer for p in loaded.problems] == ["D"]
    assert loaded.skipped == {"no choice of that number in column 'answerKey'": 1}


def test_letters_go_as_far_as_the_choices(tmp_path):
    row = {"problem": "?", "answer": 25, "choices": [f"no. {i}" for i in range(26)]}
    [problem] = load(jsonl(tmp_path / "x.jsonl", row), columns={"choices": "choices"}).problems
    assert problem.answer == "Z" and problem.text.endswith("(Z) no. 25")


def test_a_capital_letter_is_a_letter_and_a_small_one_first_a_text(tmp_path):
    rows = [{"problem": "?", "answer": a, "choices": ["b", "a", "B"]} for a in ("B", "b", "c")]
    columns = {"choices": "choices"}
    assert answers(load(jsonl(tmp_path / "x.jsonl", *rows), columns=columns)) == ["B", "A", "C"]


def test_a_row_keeps_its_own_answer_type(tmp_path):
    row = {"problem": "?", "answer": 0, "choices": ["x", "y"], "answer_type": "math"}
    [problem] = load(jsonl(tmp_path / "x.jsonl", row), columns={"choices": "choices"}).problems
    assert problem.columns["answer_type"] == "math"
    [problem] = load(jsonl(tmp_path / "x.jsonl", row | {"choices": None, "answer": "7"}),
                     columns={"choices": "choices"}).problems  # fmt: skip
    assert problem.answer == "7"


def test_one_file_of_a_hub_data_set(monkeypatch):
    import datasets

    requested = []

    def answer(*args, **kwargs):
        requested.append(kwargs)
        return datasets.Dataset.from_list([{"problem": "a", "answer": "1"}])

    monkeypatch.setattr(datasets, "load_dataset", answer)
    load("org/set", file="data/x/test.jsonl", split="test", revision="abc")
    assert requested[0]["data_files"] == {"test": "data/x/test.jsonl"}
    assert (requested[0]["split"], requested[0]["revision"]) == ("test", "abc")
