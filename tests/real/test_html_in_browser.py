"""The HTML report in a real browser: no network, no console message, and what people click works."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from forkproof.report import formats
from forkproof.report.formats import Look
from tests.unit.report.test_formats import REPORTS, decided, hostile

if TYPE_CHECKING:
    from selenium.webdriver.remote.webelement import WebElement

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = [
    pytest.mark.together,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]


def _flags() -> webdriver.ChromeOptions:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return options


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    driver = webdriver.Chrome(options=_flags(), service=Service(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: webdriver.Chrome, tmp_path: Path) -> Page:
    return Page(browser, tmp_path)


class Page:
    """A report on the screen."""

    def __init__(self, browser: webdriver.Chrome, directory: Path) -> None:
        self.browser, self.directory = browser, directory

    def show(self, name: str = "decided", anchor: str = "", width: int = 1200) -> None:
        path = self.directory / f"{name}.html"
        path.write_text(formats.render(REPORTS[name](), "html", Look()), encoding="utf-8")
        self.messages()
        self.browser.set_window_size(width, 900)
        self.browser.get("about:blank")
        self.browser.get(f"{path.as_uri()}{anchor}")

    def messages(self) -> list[str]:
        """What came into the console since the last time."""
        found = self.browser.get_log("browser")  # type: ignore[no-untyped-call] # selenium's own
        return [str(each) for each in found]

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    @property
    def shown(self) -> list[str]:
        cards = self.all("details.finding")
        visible = [str(card.get_attribute("data-finding")) for card in cards if card.is_displayed()]
        assert self.one("#shown").text == str(len(visible))
        return visible


@pytest.mark.parametrize("name", REPORTS)
def test_quiet_and_alone(page: Page, name: str) -> None:
    """Nothing in the console, and no request but for the file itself."""
    page.show(name)
    assert page.messages() == []
    loaded = page.browser.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert [each for each in loaded if not each.startswith("data:")] == []
    assert len(page.shown) == len(REPORTS[name]().findings)


def test_hostile_names_are_text(page: Page) -> None:
    page.show("hostile")
    assert len(page.all("script")) == 1
    assert "<script>alert(1)</script>" in page.one("details.finding .message").text
    assert len(page.all("details.finding")) == len(hostile().findings)


class TestSearchAndFilter:
    def test_search_looks_at_stacks(self, page: Page) -> None:
        page.show("decided")
        page.one("input[type=search]").send_keys("f17 remove")
        (only,) = page.shown
        assert only in {finding.id for finding in decided().findings if finding.fork and finding.fork.function == "f17"}
        page.one("input[type=search]").clear()
        page.one("input[type=search]").send_keys("no such function")
        assert page.shown == []

    def test_severity_target_and_state(self, page: Page) -> None:
        page.show("decided")
        page.one("input[value=low]").click()
        high = [f for f in decided().findings if f.severity.value == "high"]
        assert len(page.shown) == len(high)
        Select(page.one("select[name=state]")).select_by_value("closed")
        assert len(page.shown) == sum(not f.is_open for f in high)
        Select(page.one("select[name=state]")).select_by_value("")
        Select(page.one("select[name=target]")).select_by_visible_text("/opt/other/bin/qemu-system-aarch64")
        assert len(page.shown) == 1

    def test_unfold_all(self, page: Page) -> None:
        page.show("incident")
        page.one("#unfold").click()
        assert all(card.get_attribute("open") for card in page.all("details.finding"))


class TestGraph:
    def test_has_the_functions_of_both_stacks(self, page: Page) -> None:
        page.show("incident")
        graph = page.one("details.finding[open] .graph")
        text = graph.text
        assert all(name in text for name in ("qemu_thread_start", "g_free", "g_realloc", "os_daemonize"))
        roles = {each.get_attribute("data-role") for each in graph.find_elements(By.CSS_SELECTOR, "g[data-role]")}
        assert roles == {"holder", "requester", "fork", "lock"}

    def test_zooms(self, page: Page) -> None:
        page.show("incident")
        svg = page.one("details.finding[open] .graph svg")
        before = str(svg.get_dom_attribute("viewBox"))
        page.one("details.finding[open] [data-zoom=in]").click()
        closer = str(svg.get_dom_attribute("viewBox"))
        assert float(closer.split()[2]) < float(before.split()[2])
        page.one("details.finding[open] [data-zoom=whole]").click()
        assert str(svg.get_dom_attribute("viewBox")) == before

    def test_nothing_overlaps(self, page: Page) -> None:
        page.show("incident")
        boxes = page.browser.execute_script(
            "return [...document.querySelectorAll('details[open] .graph g[data-role] rect')].map((e) => {"
            " const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; })"
        )
        assert len(boxes) > 8
        pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :]]
        assert not [1 for a, b in pairs if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]]


def test_an_address_opens_its_finding(page: Page) -> None:
    wanted = decided().findings[9].id
    page.show("decided", f"#{wanted}")
    assert page.one(f"#{wanted}").get_attribute("open")


def test_a_phone(page: Page) -> None:
    """Nothing is wider than the screen, and the stacks are one below the other."""
    page.show("incident", width=500)
    assert page.browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    holder, requester = page.all("details.finding[open] .stack")
    assert holder.rect["y"] + holder.rect["height"] <= requester.rect["y"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_readable_in_both_schemes(page: Page, scheme: str) -> None:
    """WCAG's contrast of at least 4.5 for text, quiet text and every badge."""
    page.browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    page.show("incident")
    ratios = page.browser.execute_script(_CONTRAST)
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert ratios
    assert min(ratios.values()) >= 4.5, ratios


_CONTRAST = """
const luminance = (color) => {
  const part = color.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
};
const card = luminance(getComputedStyle(document.querySelector('details.finding')).backgroundColor);
const found = {};
for (const selector of ['.message', '.quiet', '.badge.high', 'td.yes', 'a', 'td.unbound', 'td.builtin']) {
  const element = document.querySelector(selector);
  if (!element) continue;
  const text = luminance(getComputedStyle(element).color);
  found[selector] = (Math.max(text, card) + 0.05) / (Math.min(text, card) + 0.05);
}
return found;
"""
