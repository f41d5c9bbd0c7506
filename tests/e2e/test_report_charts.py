"""The charts and tables of the report in a real browser: values, zoom, smoothing, steps, order."""

from __future__ import annotations

import pytest
from report_runs import evaluated, figures, make_run, step

from gft_lite.report.page import write_report

REWARDS = [0.0, 1.0, 0.0, 1.0, 0.5]


def metrics(rewards):
    return [
        step(n, reward={"expert": 1.0, "teacher": 0.75, "self": reward}, entropy=0.1 * n)
        for n, reward in enumerate(rewards, 1)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("charts")


@pytest.fixture(scope="module")
def page(folder):
    """One run of five steps that kept its groups; the third step was the best."""
    summary = {"trained": {"pass@1": 0.5, "kl": 0.25}, "seconds": {"total": 95.0, "eval": 3.0}}
    make_run(
        folder / "a", metrics=metrics(REWARDS), groups=range(1, 6), base={"test": figures(1)},
        trained={"test": figures(2)}, summary=summary,
        **{"step-000000": evaluated(1), "step-000003": evaluated(3), "step-000005": evaluated(2)},
    )  # fmt: skip
    return write_report([folder / "a"], folder / "a.html", tokens=False)


@pytest.fixture(scope="module")
def pair(folder, page):
    """Two runs, the second with a long name and a better score."""
    other = folder / ("b" + "_long" * 20)
    make_run(other, "objective.tau=0.3", metrics=metrics([0.5] * 5), groups=(2, 4),
             base={"test": figures(1)}, trained={"test": figures(4)})  # fmt: skip
    return write_report([folder / "a", other], folder / "pair.html", tokens=False)


def chart(shown, name):
    """Brings a chart into view and returns its area under the pointer."""
    area = shown.browser.find_element("css selector", f"[data-name={name}] .u-over")
    shown.browser.execute_async_script(
        "const done = arguments[1]; arguments[0].scrollIntoView({ block: 'center' });"
        "requestAnimationFrame(() => requestAnimationFrame(done));", area)  # fmt: skip
    return area


def pointer(shown):
    from selenium.webdriver import ActionChains

    return ActionChains(shown.browser)


def span(shown, name, scale="x"):
    return shown.js(f"['min', 'max'].map((end) => charts.get('{name}').u.scales.{scale}[end])")


def drag(shown, area, across, down):
    moves = pointer(shown).move_to_element_with_offset(area, -across // 2, -down // 2)
    moves.click_and_hold().move_by_offset(across, down).release().perform()


def center(shown, area):
    """The middle of an element in the window."""
    box = shown.browser.execute_script("return arguments[0].getBoundingClientRect().toJSON()", area)
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def double_click(shown, area):
    """Two clicks that are a double one however long the second takes to come."""
    at = center(shown, area)
    shown.mouse("mouseMoved", *at)
    for count in (1, 2):
        for kind in ("mousePressed", "mouseReleased"):
            shown.mouse(kind, *at, button="left", clickCount=count)


def lines(shown):
    return [line for line in shown.texts("#values")[0].split("\n") if line]


def test_the_headline_figures_come_first(opened, page):
    shown = opened(page)
    cards = {text.split("\n")[0]: text for text in shown.texts(".card")}
    assert next(iter(cards)) == "test, pass@1" and "25.0% → 50.0%" in cards["test, pass@1"]
    assert list(cards)[-4:] == ["KL to the reference", "Time", "Tokens trained on", "Best step"]
    assert "1 min 35 s" in cards["Time"]
    assert "1,500" in cards["Tokens trained on"] and "500 sampled" in cards["Tokens trained on"]
    assert "\n3\n" in cards["Best step"].replace("\n\n", "\n") and "75.0%" in cards["Best step"]


def test_the_pointer_shows_the_values_of_a_step(opened, page):
    shown = opened(page)
    assert shown.styles("#values", "display") == ["none"]
    pointer(shown).move_to_element(chart(shown, "reward")).perform()
    assert lines(shown) == ["step 3", "expert: 1", "teacher: 0.75", "self: 0"]
    assert shown.styles("[data-name=reward] > svg", "display") == ["none"]
    shown.click("[data-name=reward] .legend button:nth-child(2)")
    pointer(shown).move_to_element(chart(shown, "reward")).perform()
    assert lines(shown) == ["step 3", "expert: 1", "self: 0"]
    pointer(shown).move_to_element(chart(shown, "evaluation-test")).perform()
    assert lines(shown)[0] == "step 3" and lines(shown)[1].startswith("a: 75% [")


def test_dragging_zooms_all_steps_and_a_double_click_shows_all_again(opened, page):
    shown = opened(page)
    shown.hold_timers()
    assert span(shown, "reward") == [1, 5] and span(shown, "reward", "y") == [0, 1.05]
    area = chart(shown, "reward")
    drag(shown, area, 100, 6)
    low, high = span(shown, "reward")
    assert 1 < low < 3 < high < 5
    assert span(shown, "entropy") == [low, high]
    assert span(shown, "reward", "y") == [0, 1.05]
    drag(shown, area, 100, 80)
    bottom, top = span(shown, "reward", "y")
    assert 0 < bottom < top < 1.05
    double_click(shown, area)
    assert span(shown, "reward") == [1, 5] and span(shown, "reward", "y") == [0, 1.05]
    drag(shown, area, 100, 6)
    shown.click(".tools button")
    assert span(shown, "reward") == span(shown, "entropy") == [1, 5]
    shown.run_timers()
    assert "step 1" in shown.place  # Neither a drag nor a double click is a click on a step.


def test_smoothing_is_a_moving_average_without_a_pull_to_zero(opened, page):
    shown = opened(page)
    # Of weight 1/2: 1; (1/4) / (3/4); (1/8 + 1/2) / (7/8).
    assert shown.js("smooth([1, 0, 1], 0.5)") == pytest.approx([1, 1 / 3, 5 / 7])
    assert shown.js("smooth([null, 1, null, 0], 0.5)") == pytest.approx([None, 1, None, 1 / 3])
    assert shown.js("smooth([3, 1], 0)") == [3, 1]
    shown.js("Object.assign(document.querySelector('[name=smoothing]'), { value: 0.5 })"
             ".dispatchEvent(new Event('input'))")  # fmt: skip
    assert shown.texts(".tools output") == ["0.50"]
    pointer(shown).move_to_element(chart(shown, "reward")).perform()
    # 0, 1 and 0: (0 / 8 + 1 / 4 + 0 / 2) / (7/8).
    assert lines(shown)[3] == "self: 0.286, not smoothed 0"


def test_a_click_on_a_step_opens_its_groups(opened, page, pair, folder):
    def wait_for(shown, text):
        shown.wait(f"document.getElementById('place').textContent.includes({text!r})")

    shown = opened(page)
    pointer(shown).move_to_element(chart(shown, "reward")).click().perform()
    wait_for(shown, "group 1 of 1: a, step 3, problem a-3")
    assert shown.texts(".response .text") == ["right at 3", "wrong at 3"]
    assert shown.texts("#notice") == [""]
    top = shown.each("#groups", "e.getBoundingClientRect().top")[0]
    assert abs(top) < 60
    both = opened(pair)
    area = chart(both, "reward")
    # Step 3 of the second run, whose self samples have 0.5; it kept steps 2 and 4 only.
    height = both.js("charts.get('reward').u.valToPos(0.5, 'y')") - area.size["height"] / 2
    pointer(both).move_to_element_with_offset(area, 0, round(height)).click().perform()
    wait_for(both, ", step 2, problem b_long")
    assert both.texts("#notice") == ["No groups of step 3 are on this page; step 2 is the nearest."]


def test_keys_show_the_values_of_steps_and_open_their_groups(opened, page):
    from selenium.webdriver import Keys

    shown = opened(page)
    assert "left and right" in shown.each("[data-name=reward] .chart", "e.ariaLabel")[0]
    shown.js("document.querySelector('[data-name=reward] .chart').focus()")
    pointer(shown).send_keys(Keys.ARROW_RIGHT).perform()
    assert lines(shown)[0] == "step 1"
    pointer(shown).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT).perform()
    pointer(shown).send_keys(Keys.ARROW_LEFT).perform()
    assert lines(shown) == ["step 3", "expert: 1", "teacher: 0.75", "self: 0"]
    pointer(shown).send_keys(Keys.ENTER).perform()
    assert "group 1 of 1: a, step 3, problem a-3" in shown.place


def test_values_move_with_their_chart(opened, page):
    from selenium.webdriver import Keys

    shown = opened(page)
    shown.js("document.querySelector('[data-name=reward] .chart').focus()")
    pointer(shown).send_keys(Keys.ARROW_RIGHT).perform()

    def above():
        [top] = shown.each("#values", "e.getBoundingClientRect().top")
        return shown.each("[data-name=reward] .u-over", "e.getBoundingClientRect().top")[0] - top

    before, at = above(), shown.js("scrollY")
    shown.browser.execute_script("scrollBy(0, 70)")
    for _ in range(2):  # The event of a scroll comes with the next frame.
        shown.browser.execute_async_script("requestAnimationFrame(arguments[0])")
    assert shown.js("scrollY") - at == 70
    assert above() == before and lines(shown)[0] == "step 1"


def test_a_tap_shows_the_values_and_a_second_one_opens_the_groups(opened, page):
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.actions.pointer_input import PointerInput

    shown = opened(page, width=390)
    shown.hold_timers()
    area = chart(shown, "reward")
    shown.js("(window.taps = 0, addEventListener('click', () => { taps += 1; }, true))")

    def tap():
        before, finger = shown.js("taps"), PointerInput("touch", "finger")
        touch = ActionBuilder(shown.browser, mouse=finger, duration=0)
        touch.pointer_action.move_to(area).pointer_down().pointer_up()
        touch.perform()
        shown.wait(f"taps == {before + 1}")
        shown.run_timers()  # By which the page tells two clicks from a double click.

    tap()
    assert lines(shown) == ["step 3", "expert: 1", "teacher: 0.75", "self: 0"]
    assert "step 1" in shown.place
    tap()
    assert "step 3" in shown.place


def test_several_runs_share_a_plot_of_the_sources(opened, pair):
    shown = opened(pair)
    titles = [text for text in shown.texts("figcaption") if text.startswith("Reward")]
    assert titles == ["Reward by source (expert solid, teacher dashed, self dotted), mean reward"]
    labels = shown.js("charts.get('reward').chart.curves.map((c) => c.label)")
    assert labels[0] == "a, expert" and len(labels) == 6
    shown.click("[data-series='0']")
    visible = "charts.get('reward').u.series.slice(1).map((s) => s.show)"
    assert shown.js(visible) == ([False] * 4 + [True] * 4) * 3


def test_tables_are_sorted_and_the_best_value_is_marked(opened, pair):
    shown = opened(pair)
    assert shown.each("#headline .best", "e.cellIndex") == [1]
    best = shown.each("#headline .best", "e.parentElement.cells[0].textContent")
    assert best[0].startswith("b_long")
    assert '"★' in shown.js("getComputedStyle(document.querySelector('.best'), '::before').content")

    order = "['-', 2, '', 'b', 0.5].sort((a, b) => compare(a, b)[0])"
    assert shown.js(order) == [0.5, 2, "b", "-", ""]

    def first():
        return shown.texts("#headline tbody th")[0].strip()

    assert first() == "a"
    shown.click("#headline thead th:nth-child(2) button")
    assert first().startswith("b_long")
    shown.click("#headline thead th:nth-child(2) button")
    assert first() == "a"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(opened, page, pair, scheme):
    for made in (page, pair):
        shown = opened(made, width=420, scheme=scheme)
        assert shown.js("document.documentElement.scrollWidth") == 420
        widths = shown.each(".chart canvas", "e.clientWidth")
        assert widths and max(widths) <= 420 and min(widths) > 300
    area = chart(shown, "entropy")
    edge = area.size["width"] // 2 - 10
    for across in (-edge, edge):
        pointer(shown).move_to_element_with_offset(area, across, 0).perform()
        [box] = shown.each("#values", "e.getBoundingClientRect().toJSON()")
        assert box["left"] >= 0 and box["right"] <= 420 and box["width"] > 50


def test_changed_values_of_the_recipe_come_first(opened, pair):
    shown = opened(pair)
    text = shown.texts("#recipes .changed")[1]
    assert "objective" in text and "tau\n0.3" in text.replace("\n\n", "\n")
    assert shown.js("document.querySelector('#recipes details').open") is False


def test_without_scripts_the_drawn_plots_are_there(opened, chromium, page):
    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        shown = opened(page)
        svg = chromium.find_element("css selector", "[data-name=reward] > svg")
        assert svg.is_displayed() and svg.size["height"] > 150
        assert not chromium.find_element("css selector", ".tools").is_displayed()
    finally:
        chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert shown.texts(".card")
