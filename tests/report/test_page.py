"""The page in a real browser: headless Chromium through its driver, where both are installed."""

import functools
import shutil
from pathlib import Path

import pytest

from clipsae.report import write_report

pytestmark = pytest.mark.slow
PAPER = ("no_sae", "on_1", "on_5", "on_10", "on_50", "on_all")


@pytest.fixture
def browser():
    """A Chromium that can reach nothing but files."""
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no Chromium with its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    yield found
    found.quit()


@pytest.fixture
def page(store) -> Path:
    """Several seeds and k, a gap, a name that needs escaping, a very long one."""
    for dataset in ("dtd", "<i>x</i>_a_very_long_name_" * 5):
        for seed in (0, 1):
            for rank, model in enumerate(("relu", "topk", "sparsemax")):
                for k in (8, 16) if model == "topk" else (None,):
                    accuracy = {c: 10.0 * rank + i + seed for i, c in enumerate(PAPER)}
                    accuracy |= {"off_5": 3.0, "self_5": 4.0}
                    store.evaluation(model, dataset, accuracy, k=k, seed=seed)
    return write_report(store.report(), store.root / "report")


def show(browser, page: Path, width: int) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    browser.get(page.as_uri())


def column(browser, table: str, at: int) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll(`#${arguments[0]} tbody tr`)]"
        ".map(row => row.cells[arguments[1]].dataset.value)",
        table,
        at,
    )


def test_the_page_in_a_browser(browser, page):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    # As wide as a phone: nothing but the tables' own boxes scrolls sideways, folded parts open.
    show(browser, page, 360)
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    width = "return document.documentElement.scrollWidth"
    assert browser.execute_script(width) == 360
    browser.execute_script("window.scrollTo(500, 0)")
    assert browser.execute_script("return window.scrollX") == 0
    sideways = browser.execute_script(
        "const box = document.querySelector('#table_08_dtd .scroll');"
        "return [box.scrollWidth > box.clientWidth, box.getBoundingClientRect().right <= 360]"
    )
    assert sideways == [True, True]
    plots = browser.execute_script(
        "return [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width)"
    )
    assert plots
    assert all(300 <= width <= 360 for width in plots)
    smallest = browser.execute_script(
        "return Math.min(...[...document.querySelectorAll('.plot svg text')]"
        ".map(t => t.getBoundingClientRect()).filter(b => b.width > 0).map(b => b.height))"
    )
    assert smallest >= 8

    show(browser, page, 1280)
    assert browser.execute_script(width) <= 1280
    values = functools.partial(column, browser, "table_08_dtd")
    heads = browser.find_elements(By.CSS_SELECTOR, "#table_08_dtd thead th")
    assert [head.text.split()[0] for head in heads[:3]] == ["model", "no_sae", "on_1"]
    assert {head.get_attribute("aria-sort") for head in heads} == {"none"}
    assert values(0)[0] == "ReLU"

    # By a click: largest first, empty ones last; again: smallest first, empty ones last.
    heads[2].find_element(By.TAG_NAME, "button").click()
    assert values(2) == ["21.5", "11.5", "1.5", "", "", ""]
    assert heads[2].get_attribute("aria-sort") == "descending"
    heads[2].find_element(By.TAG_NAME, "button").click()
    assert values(2) == ["1.5", "11.5", "21.5", "", "", ""]
    assert heads[2].get_attribute("aria-sort") == "ascending"

    # By the keyboard, words: A to Z.
    heads[0].find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert values(0) == sorted(values(0), key=str.lower)
    assert heads[0].get_attribute("aria-sort") == "ascending"
    assert heads[2].get_attribute("aria-sort") == "none"

    # Every link of the contents leads somewhere, no id is there twice.
    broken = browser.execute_script(
        "return [...document.querySelectorAll('nav a')].map(a => a.getAttribute('href').slice(1))"
        ".filter(id => !document.getElementById(id))"
    )
    assert broken == []
    ids = browser.execute_script("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))

    # Light and dark by the reader's choice, text legible in both.
    colours = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    light = browser.execute_script(colours)
    dark_mode = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark_mode)
    dark = browser.execute_script(colours)
    assert brightness(light[0]) < 0.2 < 0.9 < brightness(light[1])
    assert brightness(dark[1]) < 0.2 < 0.8 < brightness(dark[0])
    ink = browser.execute_script(
        "return getComputedStyle(document.querySelector('.plot svg text')).fill"
    )
    assert brightness(ink) > 0.8

    assert browser.get_log("browser") == []
    asked = [entry["message"] for entry in browser.get_log("performance")]
    sent = [m for m in asked if "Network.requestWillBeSent" in m]
    assert sent
    assert not [m for m in sent if '"url":"http' in m]


def brightness(colour: str) -> float:
    red, green, blue = (int(part) for part in colour.strip("rgb()").split(","))
    return (red + green + blue) / (3 * 255)
