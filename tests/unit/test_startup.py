"""The benchmark of a start: its parts are functions that exist, and their times add up."""

from __future__ import annotations

from importlib import import_module

from benchmarks import startup


def test_the_parts_of_a_start_are_functions_that_a_run_calls():
    for path in startup.PARTS.values():
        module, _, names = path.partition(":")
        found = import_module(module)
        for name in names.split("."):
            assert name in vars(found), path
            found = getattr(found, name)
        assert callable(found)


def test_time_in_a_nested_part_counts_for_that_part_alone(monkeypatch):
    seconds = iter([10, 11, 13, 16, 20, 25, 31, 38])
    monkeypatch.setattr(startup.time, "time", lambda: next(seconds))
    clock = startup.Clock(started=9)
    with clock("outer"), clock("inner"):  # Enter at 10 and 11, leave at 13 and 16.
        pass
    with clock(startup.LAST):  # From 20 to 25.
        pass
    with clock("later"):
        pass
    expected = {startup.OTHER: 1 + 4, "outer": 1 + 3, "inner": 2, startup.LAST: 5}
    assert clock.read()["wall"] == expected
