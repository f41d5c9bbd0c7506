"""A run's metrics and a sweep's trials as pandas DataFrames."""

from __future__ import annotations

import math
import sys

import pytest

from gft_lite import Run, SweepFolder

pytest.importorskip("pandas", reason="needs the notebooks extra: pip install 'gft-lite[notebooks]'")

STEPS = [
    {"step": 1, "reward": {"expert": 1.0, "self": 0.25}, "skipped": None, "rectified": None},
    {"step": 2, "reward": {"expert": 1.0, "self": 0.5}, "skipped": "non_finite", "rectified": 0.1,
     "kl": {"held_out": {"forward": 0.02}}},
]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path)
    for metrics in STEPS:
        run.append_metrics(metrics)
    return run


def test_a_step_is_a_row_and_nested_names_are_joined(run):
    frame = run.frame()
    assert list(frame.columns) == [
        "step", "skipped", "rectified", "reward/expert", "reward/self", "kl/held_out/forward",
    ]  # fmt: skip
    assert frame["step"].tolist() == [1, 2]
    assert frame["reward/self"].tolist() == [0.25, 0.5]


def test_missing_values_are_nan(run):
    frame = run.frame()
    for column, second in (("rectified", 0.1), ("kl/held_out/forward", 0.02)):
        assert frame[column].dtype == float
        assert math.isnan(frame[column][0])
        assert frame[column][1] == second
    assert frame["skipped"].isna().tolist() == [True, False]


def test_a_run_without_steps_is_empty(tmp_path):
    assert Run(tmp_path).frame().empty


@pytest.mark.parametrize("folder", [Run, SweepFolder])
def test_without_pandas_the_extra_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)  # Python treats the module as missing.
    with pytest.raises(ModuleNotFoundError, match=r"gft-lite\[notebooks\]"):
        folder(tmp_path).frame()
