"""Progress as lines where the output is not a terminal, as a live display on one."""

import io

import pytest
from rich.console import Console
from rich.text import Text

from gft_lite.utils.progress import ProgressDisplay, show_phase, show_sampling


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


def test_a_log_gets_a_line_for_a_phase_and_lines_while_sampling():
    console = Console(file=io.StringIO(), width=200)
    with show_phase(console, "loading [the] model"):
        pass
    with show_sampling(console, 3, log_seconds=0) as update:
        for tokens in (5, 7, 9):
            update(tokens)
    with show_sampling(console, 3, log_seconds=1e9) as update:
        update(5)
    phase, *lines = console.file.getvalue().splitlines()
    assert phase == "loading [the] model"
    assert [line.split(" tokens/s")[0].rsplit(", ", 1)[0] for line in lines] == [
        "sampling: 1 of 3 responses, 5 tokens",
        "sampling: 2 of 3 responses, 12 tokens",
        "sampling: 3 of 3 responses, 21 tokens",
    ]
    assert lines[-1].endswith("about 0 s left")
