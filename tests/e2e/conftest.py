"""A headless browser for tests: fixtures, and what a reader does on a page."""

from __future__ import annotations

import shutil

import pytest


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A headless browser; skips where there is none."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("no chromium with chromedriver: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
        "disable-background-networking", "disable-component-update", "disable-dev-shm-usage",
        f"user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


class Page:
    """A page that was opened, and what a reader does on it."""

    def __init__(self, browser, path, *, width=1280, scheme="light"):
        self.browser = browser
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        browser.get_log("browser")  # Forgets what earlier pages logged.
        # Where an earlier page left the pointer, it may enter a chart once this one scrolls.
        self.mouse("mouseMoved", 0, 0)
        browser.get(path.as_uri())

    def js(self, expression):
        return self.browser.execute_script(f"return {expression}")

    def mouse(self, kind, x, y, **more):
        event = {"type": kind, "x": x, "y": y, **more}
        self.browser.execute_cdp_cmd("Input.dispatchMouseEvent", event)

    def wait(self, expression):
        """Wait until an expression is true."""
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.browser, 120, 0.05).until(lambda _: self.js(expression), expression)

    def hold_timers(self):
        """What the page wants to do later is done by `run_timers` only, however late that is."""
        self.browser.execute_script(
            "window.held = []; window.setTimeout = (run) => held.push(run);"
            "window.clearTimeout = (number) => { delete held[number - 1]; };"
        )

    def run_timers(self):
        self.js("held.splice(0).forEach((run) => run())")

    def each(self, selector, expression):
        """What the expression says of each element `e`."""
        return self.js(f"[...document.querySelectorAll({selector!r})].map((e) => {expression})")

    def texts(self, selector):
        return self.each(selector, "e.innerText ?? e.textContent")

    def styles(self, selector, name):
        return self.each(selector, f"getComputedStyle(e).{name}")

    def click(self, selector):
        self.browser.find_element("css selector", selector).click()

    def choose(self, name, text):
        """Choose an option of a filter by its text."""
        from selenium.webdriver.support.select import Select

        Select(self.browser.find_element("name", name)).select_by_visible_text(text)

    def write(self, text):
        """Write in the search box, in place of what is there."""
        box = self.browser.find_element("name", "text")
        box.clear()
        box.send_keys(text)

    @property
    def place(self):
        return self.texts("#place")[0]


@pytest.fixture
def opened(chromium):
    """Opens pages, and checks at the end that none logged anything or asked the network."""
    pages = []

    def open_page(path, **options):
        pages.append(Page(chromium, path, **options))
        return pages[-1]

    yield open_page
    assert pages[-1].js("performance.getEntriesByType('resource').map((e) => e.name)") == []
    assert chromium.get_log("browser") == []
