"""The tables, plots and files of a comparison; hostile names and what is not known."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace

import pytest
from referee_cases import comparison, failure, outcome, simulated, tuned

from gft_lite.experiments.referee_files import write_referee
from gft_lite.experiments.referee_plots import quality_plots, tuning_plots
from gft_lite.experiments.referee_tables import (
    base_scores,
    edges,
    main_table,
    pareto_front,
    summaries,
)
from gft_lite.experiments.verdict import judge
from gft_lite.report.curves import BASE, Curve, Plot
from gft_lite.report.plots import inline_svg

HOSTILE = "</script><script>harm()</script> | $x_1^2$ & 50% #1 {~} \\end{table}\n世"


def tiny():
    """Two methods, two seeds, two problems; nothing is known of memory and KL of sft."""
    return comparison(
        [
            outcome("sft", 0, {"test": [0.5, 0.5]}, kl=None, peak_memory=None,
                    base_scores={"test": [0.25, 0.75]}),
            outcome("sft", 1, {"test": [0.5, 0.0]}, kl=None, peak_memory=None),
            outcome("gft", 0, {"test": [1.0, 0.5]}, kl=0.3, trained_tokens=3000, peak_memory=1.5),
            outcome("gft", 1, {"test": [0.5, 0.5]}, kl=0.1, trained_tokens=4000, peak_memory=2.5,
                    seconds={"total": 50.0, "rollout": 10.0}),
        ],
    )  # fmt: skip


def test_summaries_by_hand():
    made = tiny()
    sft, gft = summaries(made).values()
    assert (gft.scores, gft.lowest, gft.highest) == (
        {"test": 0.625}, {"test": 0.5}, {"test": 0.75},
    )  # fmt: skip
    assert (gft.kl, gft.trained_tokens, gft.peak_memory) == (pytest.approx(0.2), 3500, 2.5)
    assert gft.seconds == {"total": 40.0, "train": 10.0, "eval": 2.5, "rollout": 5.0}
    assert (sft.scores["test"], sft.kl, sft.peak_memory) == (0.375, None, None)
    assert base_scores(made) == {"test": 0.5}


def test_a_method_without_a_finished_run_failed():
    made = replace(tiny(), methods=("sft", "gft", "hpt"))
    rows = {row[0]: row for row in main_table(made, judge(made)).rows}
    assert rows["sft"] == ("sft", "reference", "-", "-", "-", "37.5", "-", "1,000", "500", "30")
    assert rows["hpt"] == ("hpt", "failed", *["-"] * 8)
    assert rows["gft"][1:3] == ("not separable", "+25.0")
    assert rows["before training"][5] == "50.0"


def test_the_pareto_front_by_hand():
    places = {"a": (1.0, 0.5), "b": (2.0, 0.7), "c": (2.0, 0.6), "d": (3.0, 0.7), "e": (1.0, 0.5)}
    assert pareto_front(places, less_is_better=True) == ("a", "b", "e")
    assert pareto_front(places, less_is_better=False) == ("d",)
    assert pareto_front({}, less_is_better=True) == ()


def test_a_best_value_at_the_edge_of_what_was_tried_is_said():
    rates = tuned("gft", "optim.lr", {0.003: 0.5, 0.001: 0.6, 0.01: 0.4}, 0.001)
    inner = tuned("sft", "optim.lr", {0.001: 0.5, 0.003: 0.6, 0.01: None}, 0.003)
    one = tuned("gft", "objective.tau", {0.7: 0.5}, 0.7)
    names = tuned("gft", "optim.schedule", {"cosine": 0.5, "linear": 0.4}, "cosine")
    made = replace(tiny(), tuning=rates + inner + one + names)
    assert edges(made) == [
        "gft: optim.lr = 0.001, the best, is the lowest value that was tried. "
        "A lower one may be better."
    ]
    many = [p for i in range(6) for p in tuned(f"m{i}", "optim.lr", {1: 0.5, 2: 0.6}, 1 + i % 2)]
    assert edges(replace(made, tuning=tuple(many))) == [
        "The best value is the highest that was tried for m1 (optim.lr = 2), m3 (optim.lr = 2), m5 "
        "(optim.lr = 2); the lowest that was tried for m0 (optim.lr = 1), m2 (optim.lr = 1), m4 "
        "(optim.lr = 1). Values beyond may be better."
    ]
    [of_rates, of_tau] = tuning_plots(made)
    gft, sft = of_rates.curves
    assert (gft.x, gft.y, gft.rings) == ([0.001, 0.003, 0.01], [0.6, 0.5, 0.4], [0])
    assert (sft.y, sft.rings) == ([0.5, 0.6, None], [1])
    assert of_rates.log_x and not of_tau.log_x


def test_plots_show_runs_means_front_and_base():
    made = simulated({"gft": 0.2, "grpo": -0.2}, problems=20)
    plots = {plot.name: plot for plot in quality_plots(made)}
    assert list(plots) == [
        "accuracy-tokens", "accuracy-seconds", "accuracy-retention-old", "accuracy-kl",
    ]  # fmt: skip
    tokens = plots["accuracy-tokens"]
    gft = next(curve for curve in tokens.curves if curve.label == "gft")
    assert gft.x == (35_000,) * 4 and gft.y[0] == pytest.approx(sum(gft.y[1:]) / 3)
    assert [curve.label for curve in tokens.curves if curve.rings] == ["sft", "gft"]
    assert [x for x, _ in tokens.front] == [20_000, 35_000]
    base = plots["accuracy-kl"].curves[-1]
    assert (base.label, base.color, base.x) == ("base", BASE, (0.0,))
    without = replace(made, outcomes=tuple(replace(o, kl=None) for o in made.outcomes))
    assert "accuracy-kl" not in {plot.name for plot in quality_plots(without)}


def marks(curve, **fields):
    """The number of markers in a plot of one curve."""
    svg = inline_svg(Plot("demo", "demo", "x", "y", (curve,), **fields))
    return len(re.findall(r"<use [^>]*xlink:href=\"#m", svg.partition('class="curve-0"')[2]))


def test_isolated_values_are_points():
    plain = marks(Curve("a", 0, (1, 2, 3, 4, 5), (0.1, 0.2, 0.3, 0.2, 0.1)))
    assert marks(Curve("a", 0, (1, 2, 3, 4, 5), (0.1, None, 0.3, None, 0.1))) == plain + 3
    assert marks(Curve("a", 0, (1, 2, 3, 4, 5), (0.1, 0.2, None, None, 0.1))) == plain + 1


# --- files -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A comparison in which every text is hostile, and its folder."""
    made = simulated({HOSTILE: 0.3}, problems=20)
    made = replace(
        made, name=HOSTILE, design={HOSTILE: HOSTILE}, recipes={HOSTILE: HOSTILE},
        failures=(failure(HOSTILE, HOSTILE, run=HOSTILE), failure("sft", "alone", run="")),
        tuning=tuned(HOSTILE, "optim.lr", {0.1: 0.5, 0.2: 0.6}, 0.2),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("hostile")
    write_referee(made, folder)
    return made, folder


def test_everything_is_in_the_json(hostile):
    made, folder = hostile
    found = json.loads((folder / "referee.json").read_text())
    assert found["answer"][0].startswith(f"{HOSTILE} is ") and len(found["rules"]) == 6
    [verdict] = found["verdicts"]["test"]
    assert verdict["difference"] == judge(made)["test"][0].difference
    assert found["verdicts"].keys() == {"test", "old", "KL"}
    assert len(found["outcomes"]) == 6 and found["outcomes"][0]["cost"]["trained_tokens"] == 20_000
    assert found["outcomes"][0]["scores"]["test"].keys() == {f"q{i}" for i in range(20)}
    assert found["failures"][0]["reason"] == HOSTILE and found["margin"] == 0.02
    assert found["tuning_edges"] == edges(made)


def test_the_csv_has_a_line_for_each_run(tmp_path):
    write_referee(tiny(), tmp_path)
    with (tmp_path / "referee.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("sft", "0"), ("sft", "1"), ("gft", "0"), ("gft", "1"),
    ]  # fmt: skip
    assert rows[2]["scores/test"] == "0.75" and rows[0]["base_scores/test"] == "0.5"
    assert rows[2]["cost/peak_memory"] == "1.5" and rows[0]["kl"] == rows[0]["cost/peak_memory"]
    assert rows[0]["kl"] == "" and rows[2]["settings/optim.lr"] == "0.001"


def test_markdown_is_one_table_row_for_each_method(hostile):
    _, folder = hostile
    text = (folder / "referee.md").read_text()
    assert "<script" not in text and "</script" not in text
    widths = {
        block.splitlines()[0]: {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        for block in text.split("\n\n") if block.startswith("|")
    }  # fmt: skip
    assert len(widths) >= 6 and all(len(counts) == 1 for counts in widths.values())


def test_latex_is_escaped(hostile):
    _, folder = hostile
    text = (folder / "referee.tex").read_text()
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") >= 6
    assert r"\$x\_1\textasciicircum{}2\$ \& 50\% \#1 \{\textasciitilde{}\}" in text
    assert not re.search(r"(?<!\\)[$#%^_~]", text) and text.encode("latin-1")


def test_an_empty_comparison_says_so(tmp_path):
    made = replace(comparison([]), methods=("sft", "gft"))
    write_referee(made, tmp_path)
    assert json.loads((tmp_path / "referee.json").read_text())["answer"][0] == (
        "No method could be compared with sft."
    )
    page = (tmp_path / "referee.html").read_text()
    assert "<h1>No method could be compared with sft.</h1>" in page
