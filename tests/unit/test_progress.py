"""Progress as lines where the output is not a terminal, as a live display on one."""

import io
import re
import threading

import pytest
from rich.console import Console
from rich.text import Text

from gft_lite.utils.progress import (
    Phase,
    ProgressDisplay,
    format_duration,
    report_progress,
    show_phase,
    show_sampling,
    sparkline,
    track,
)


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    """A terminal that can be drawn on, unlike a dumb one."""
    monkeypatch.setenv("TERM", "xterm")


def lines(total: int | None, units: range, completed: int = 0) -> list[str]:
    out = io.StringIO()
    with ProgressDisplay(Console(file=out), "step", total, completed) as display:
        for unit in units:
            display.update(unit, f"[loss] {unit}")
    return out.getvalue().splitlines()


@pytest.mark.parametrize(
    "total, completed, printed",
    [(3, 0, [1, 2, 3]), (100, 0, list(range(5, 101, 5))), (100, 50, list(range(55, 101, 5))),
     (30, 28, [29, 30])],
)  # fmt: skip
def test_at_most_twenty_lines(total: int, completed: int, printed: list[int]):
    expected = [f"step {n}/{total}  [loss] {n}" for n in printed]
    assert lines(total, range(completed + 1, total + 1), completed) == expected


def test_without_a_total_a_line_every_ten_units():
    assert lines(None, range(1, 31)) == [f"step {n}  [loss] {n}" for n in (10, 20, 30)]


def test_a_terminal_shows_the_panel_and_keeps_printed_lines():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60)
    with ProgressDisplay(console, "trials", 4) as display:
        display.update(3, panel=Text("the panel"))
        display.print("trial [a] failed")
    assert "the panel" in out.getvalue() and "3/4" in out.getvalue()
    assert "trial [a] failed" in out.getvalue()


class Lines(io.StringIO):
    """Wakes `wait_for` at every write."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()

    def write(self, text: str) -> int:
        with self._changed:
            self._changed.notify_all()
            return super().write(text)

    def wait_for(self, part: str) -> str:
        """The first line with `part`, as soon as there is one."""
        with self._changed:
            assert self._changed.wait_for(lambda: part in self.getvalue(), timeout=600)
        return next(line for line in self.getvalue().splitlines() if part in line)


def test_a_phase_in_a_log_begins_with_a_line_and_repeats_how_far_it_is():
    out = Lines()
    console = Console(file=out, width=20)
    with show_phase(console, "reading [the] model", log_seconds=1e-3):
        assert out.getvalue().startswith("reading [the] model\n")
        for number in track(range(4), "weights"):
            if number == 2:
                line = out.wait_for("2 of 4 weights")
    assert line.startswith("reading [the] model: 2 of 4 weights, ")
    assert "left" in line and len(out.getvalue().splitlines()) > 1


def test_sampling_shows_responses_and_tokens_after_the_outer_phase():
    out = Lines()
    console = Console(file=out)
    with (
        show_phase(console, "evaluating", announce=False, log_seconds=1e9),
        show_sampling(console, 30, log_seconds=1e-3) as update,
    ):
        early = out.wait_for("0 of 30")
        update(5)
        first = out.wait_for("1 of 30")
        update(7)
        update(9)
        third = out.wait_for("3 of 30")
    assert early.startswith("evaluating: sampling: 0 of 30 responses, ") and "left" not in early
    assert "1 of 30 responses, " in first and ", 5 tokens, " in first and "left" not in first
    # A narrow terminal cuts the end, and the time that is left is worth more than tokens/s.
    assert re.search(r"3 of 30 responses, .* left, 21 tokens, .* tokens/s$", third)


def test_a_phase_on_a_terminal_leaves_no_line_and_shows_its_state():
    out = Lines()
    console = Console(file=out, force_terminal=True, width=60)
    with show_phase(console, "reading"):
        report_progress(3, 4, "weights")
        out.wait_for("reading: 3 of 4 weights")
    assert out.getvalue().endswith("\x1b[2K")  # The line is erased.


def test_the_time_left_follows_from_the_units_of_this_process():
    display = ProgressDisplay(Console(file=io.StringIO()), "step", 20, 10)
    display._started -= 1200  # For 5 of 10 steps, after a resumption at step 10.
    assert display.time_left(15).startswith("  about 20 min ")
    assert display.time_left(20, 90.0) == "  about 1 min 30 s left"
    assert display.time_left(20) == display.time_left(15, 0.0) == ""
    phase = Phase("loading", done=1, total=4, unit="weights")
    phase.started -= 600
    assert phase.describe().startswith("loading: 1 of 4 weights, 10 min ")
    assert ", about 30 min " in phase.describe()


def test_a_terminal_shows_the_time_left_that_it_is_given():
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    with ProgressDisplay(console, "step", 20, 10) as display:
        display.update(11, "text", left=5025.4)
        screen = Console(file=io.StringIO(), width=60, color_system=None)
        screen.print(display._live.renderable)
    assert screen.file.getvalue().rstrip().endswith("left 1:23:45")


def test_progress_without_a_phase_is_not_an_error():
    report_progress(1, 2, "weights")
    assert list(track("ab", "weights")) == ["a", "b"]


@pytest.mark.parametrize(
    ("values", "bars"),
    [([], ""), ([1.0], "▄"), ([2.0, 2.0], "▄▄"), ([0.0, 7.0], "▁█"), (list(range(8)), "▁▂▃▄▅▆▇█"),
     ([0.0, None, float("nan"), 1.0], "▁  █"), ([float("inf"), None], "  "),
     ([0.0, 0.0, 0.0, 0.0, 2.0, 4.0, 6.0, 8.0, 8.0, 6.0] + [7.0] * 6, "▁▁▄█████")],
)  # fmt: skip
def test_bars_of_values(values: list, bars: str):
    """Of 16 values in 8 bars: the means 0, 0, 3, 7, 7, 7, 7, 7."""
    assert sparkline(values, 8) == bars


def test_bars_without_unicode():
    assert sparkline([0.0, 7.0, None], 8, ascii_only=True) == "_# "


@pytest.mark.parametrize(
    "seconds, text",
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7512, "2 h 5 min")],
)
def test_durations(seconds: float, text: str):
    assert format_duration(seconds) == text
