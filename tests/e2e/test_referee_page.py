"""The page of a comparison of methods in a real browser."""

from __future__ import annotations

from dataclasses import replace

import pytest
from referee_cases import failure, outcome, simulated, tuned

from gft_lite.experiments.referee_files import write_referee

HOSTILE = (
    "</script><script>window.harm = 1</script><img src=x onerror='window.harm = 2'> \"q\" & 世"
)


@pytest.fixture(scope="module")
def made():
    """Four methods of which one failed; one has neither KL nor memory, one a hostile name."""
    made = simulated({"gft": 0.3, HOSTILE: 0.0}, problems=150)
    poor = outcome("dft", 0, {"test": {"q0": 0.5, "q1": 0.0}}, kl=None, peak_memory=None)
    return replace(
        made, name=f"demo {HOSTILE}", methods=("sft", "gft", HOSTILE, "dft", "hpt"),
        outcomes=(*made.outcomes, replace(poor, folder="javascript:alert(1)")),
        failures=(failure("hpt", HOSTILE), failure("hpt", "no tuning", "tune", "/etc/passwd")),
        tuning=tuned("gft", "optim.lr", {0.001: 0.4, 0.01: 0.5}, 0.01)
        + tuned("sft", "optim.lr", {0.001: 0.4, 0.01: None}, 0.001),
        recipes={"gft": f"method: gft # {HOSTILE}"}, design={"budget": HOSTILE},
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("referee")
    for run in ("runs/gft-0", "javascript:alert(1)"):
        (folder / run).mkdir(parents=True)
    write_referee(made, folder)
    return folder / "referee.html"


def test_the_answer_comes_first_and_every_part_is_there(opened, page):
    shown = opened(page, width=1300)
    [answer] = shown.texts("h1")
    assert answer.startswith("gft is better than sft by ") and answer.endswith(" on test.")
    assert shown.texts("h2") == [
        "Verdicts", "Quality and cost", "Plots", "Tuning", "Failures", "Rules", "Runs", "Recipes",
        "Design",
    ]  # fmt: skip
    warnings = shown.texts(".warning")
    assert any("gft: optim.lr = 0.01, the best, is the highest" in text for text in warnings)
    assert "2 runs failed: why." in warnings
    assert shown.each("svg", "e.dataset.plot") == [
        "accuracy-tokens", "accuracy-seconds", "accuracy-retention-old", "accuracy-kl",
        "tuning-optim-lr",
    ]  # fmt: skip
    assert min(shown.each("figure:not(.live) svg, canvas", "e.clientHeight")) > 150
    assert shown.each("figure.live", "e.dataset.name") == ["tuning-optim-lr"]
    assert {"gft", "sft", "base"} <= set(shown.texts("svg[data-plot=accuracy-kl] text"))
    words = shown.texts("#verdicts table:first-of-type .word")
    assert words[:4] == ["better", "not separable", "not separable", "not compared"]
    # The interval of gft lies right of 0, which is in the middle of its box.
    boxes = shown.each(
        ".interval", "[e, e.querySelector('b')].map((x) => x.getBoundingClientRect().toJSON())"
    )
    box, interval = boxes[0]
    assert box["x"] + box["width"] / 2 < interval["x"] < interval["right"] < box["right"]


def test_hostile_text_stays_text(opened, page):
    shown = opened(page)
    assert shown.js("window.harm === undefined")
    assert shown.js("document.images.length") == 0
    assert any(HOSTILE in text for text in shown.texts("#methods th"))
    assert any(HOSTILE in text for text in shown.texts("#failures li"))
    assert HOSTILE in shown.texts("#design dd")[0]
    links = shown.each("#runs a, #failures a", "[e.textContent, e.getAttribute('href')]")
    assert ["runs/gft-0", "./runs/gft-0/"] in links
    assert "runs/gft-1" not in dict(links) and "runs/gft-1" in shown.texts("#runs td")
    assert ["javascript:alert(1)", "./javascript%3Aalert%281%29/"] in links
    assert all(href.startswith("./") for _, href in links) and "/etc/passwd" not in dict(links)


def test_what_is_not_known_is_a_dash_and_what_failed_is_said(opened, page):
    shown = opened(page)
    rows = {text.split("\t")[0].strip(): text.split("\t") for text in shown.texts("#methods tr")}
    assert rows["hpt"][1:] == ["-"] * 7 + ["failed"]
    assert rows["dft"][2:4] == ["-", "-"] and rows["dft"][7] == "-"
    assert rows["dft"][8] == "1" and rows["before training"][1] != "-"


def test_tables_are_sorted_by_a_column(opened, page):
    shown = opened(page)

    def column(place):
        return shown.texts(f"#methods td:nth-child({place})")

    def click(place):
        shown.click(f"#methods th:nth-child({place}) button")

    click(5)  # Trained tokens.
    assert column(5) == ["50,000", "35,000", "20,000", "1,000", "-", "-"]
    click(5)
    assert column(5) == ["1,000", "20,000", "35,000", "50,000", "-", "-"]
    assert shown.each("#methods th[aria-sort]", "e.getAttribute('aria-sort')") == ["ascending"]
    click(1)
    names = [text.strip() for text in shown.texts("#methods tbody th")]
    assert names[:3] == ["sft", "hpt", "gft"]


def test_methods_can_be_hidden(opened, page):
    shown = opened(page)
    dots = "svg[data-plot=accuracy-tokens] .curve-1"
    assert set(shown.styles(dots, "display")) == {"inline"}
    shown.click("[data-series='1']")
    assert set(shown.styles(dots, "display")) == {"none"}
    assert set(shown.styles("svg[data-plot=tuning-optim-lr] .curve-1", "display")) == {"none"}


def test_it_fits_a_phone_and_follows_the_dark(opened, page):
    light = opened(page, width=420)
    assert light.js("document.documentElement.scrollWidth") == 420
    white = light.styles("body", "backgroundColor")
    texts = "svg[data-plot=accuracy-kl] text"
    inks = set(light.styles(texts, "fill"))
    dark = opened(page, width=420, scheme="dark")
    assert dark.styles("body", "backgroundColor") != white
    assert set(dark.styles(texts, "fill")) - inks
