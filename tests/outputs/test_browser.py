"""The report in a real browser: Debian's chromium, driven by its chromedriver."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from jobs import run_on
from machine import need
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from reducer.run.folder import RunFolder

NASTY = "<script>alert(1)</script>"
WIDTHS, THEMES = (1280, 390), ("light", "dark")


def missing() -> str | None:
    absent = [program for program in ("chromium", "chromedriver") if shutil.which(program) is None]
    return f"needs {' and '.join(absent)}" if absent else None


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    need(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    # A container's root has neither a sandbox nor much shared memory.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a label that is a script, photos that have failed, one that is gone, and copies across labels."""
    folder = tmp_path_factory.mktemp("browser")
    shutil.copytree(tiny / "train", folder / "train")
    table = pd.read_csv(tiny / "train.csv", dtype=str)
    largest = table["landmark_id"].value_counts().idxmax()
    table.loc[table["landmark_id"] == largest, "landmark_id"] = NASTY
    for name in table[table["landmark_id"] == NASTY]["id"].head(3):
        (folder / "train" / name[0] / name[1] / name[2] / f"{name}.jpg").write_bytes(b"no photo")
    copies = table[table["landmark_id"] == NASTY].tail(2).assign(landmark_id="copies")
    pd.concat([table, copies]).to_csv(folder / "train.csv", index=False)
    run_on(folder, folder / "run", cross_label=True, rank_all=True, report=True)
    return folder / "run"


def opened(browser: webdriver.Chrome, run: Path, width: int, theme: str, media: str = "") -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    browser.get((run / "report.html").as_uri())


def asked(browser: webdriver.Chrome, script: str) -> Any:
    return browser.execute_script(f"return {script}")


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_report_opens_without_complaint(browser: webdriver.Chrome, run: Path, width: int, theme: str) -> None:
    opened(browser, run, width, theme)
    assert browser.get_log("browser") == []
    assert asked(browser, "document.title") == "Reducer: run"
    assert asked(browser, "document.documentElement.scrollWidth") == width, "it is wider than the screen"
    assert asked(browser, "[...document.images].filter(image => !image.complete || !image.naturalWidth).length") == 0
    assert asked(browser, "document.images.length") > 50
    # Whatever is loaded stands in the page itself.
    assert asked(browser, "performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:'))") == []
    paper = asked(browser, "getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}[theme]
    ink = {"light": "rgb(28, 37, 48)", "dark": "rgb(230, 234, 239)"}[theme]
    assert asked(browser, "getComputedStyle(document.body).color") == ink
    # The plots' text too, which is to be read on a phone.
    texts = "[...document.querySelectorAll('svg text')]"
    assert set(asked(browser, f"{texts}.map(text => getComputedStyle(text).fill)")) == {ink}
    assert (
        min(asked(browser, f"{texts}.map(text => text.getBoundingClientRect()).map(b => Math.min(b.width, b.height))"))
        > 5
    )
    assert len(browser.find_elements(By.TAG_NAME, "svg")) == 3


def test_a_label_that_is_a_script_stays_text(browser: webdriver.Chrome, run: Path) -> None:
    opened(browser, run, 1280, "light")
    assert asked(browser, "document.scripts.length") == 0
    headings = [heading.text for heading in browser.find_elements(By.TAG_NAME, "h3")]
    (heading,) = (heading for heading in headings if "the largest label" in heading)
    assert heading.startswith(f"Label {NASTY}: ")
    assert heading.endswith(", most failures")
    body = browser.find_element(By.TAG_NAME, "body").text
    assert f"(label {NASTY}): not an image: " in body


def test_galleries_show_kept_photos_and_those_dropped_for_them(browser: webdriver.Chrome, run: Path) -> None:
    opened(browser, run, 1280, "light")
    ledger = RunFolder(str(run)).parts.ledger().to_pandas()
    own = ledger[ledger["label"] == NASTY]
    section = browser.find_element(By.XPATH, f"//section[h3/code[text()='{NASTY}']]")
    cards = section.find_elements(By.CSS_SELECTOR, ".kept > li")
    kept = own[own["kept"]].sort_values("rank")
    assert len(cards) == len(kept) == 8
    for card, row in zip(cards, kept.itertuples(), strict=True):
        captions = card.find_elements(By.TAG_NAME, "figcaption")
        distance = "the first" if row.rank == 0 else f"{row.insertion_distance:g} bits"
        assert captions[0].text == f"rank {row.rank:g}, {distance}\n{row.id}"
        dropped = own[(own["nearest_kept"] == row.id) & ~own["kept"]].sort_values("nearest_kept_distance")
        shown = [caption.text for caption in captions[1:]]
        assert shown == [
            f"{far:g} bit{'' if far == 1 else 's'}" for far in dropped["nearest_kept_distance"].head(len(shown))
        ]
        assert len(shown) == min(12, len(dropped))
        pictures = card.find_elements(By.TAG_NAME, "img")
        assert pictures[0].get_attribute("title") == row.path
        assert pictures[0].get_attribute("alt") == f"Kept, rank {row.rank:g}: photo {row.id}"
        # Those that were dropped stand under the kept one, and smaller.
        assert all(picture.rect["y"] > pictures[0].rect["y"] for picture in pictures[1:])
        assert all(picture.rect["width"] < pictures[0].rect["width"] / 2 for picture in pictures[1:])
    pairs = section.find_elements(By.CSS_SELECTOR, ".pair")
    titles = [pair.find_element(By.TAG_NAME, "figcaption").text for pair in pairs]
    assert [title.split(":")[0] for title in titles] == ["The closest two", "The farthest two"]
    for pair in pairs:
        one, other = pair.find_elements(By.TAG_NAME, "img")
        assert one.rect["y"] == pytest.approx(other.rect["y"], abs=2)  # side by side
        assert one.rect["x"] + one.rect["width"] <= other.rect["x"]
    like = browser.find_elements(By.XPATH, "//h2[@id='cross-label']/following-sibling::div//figure[@class='pair']")
    assert any("label copies" in pair.text and f"label {NASTY}" in pair.text for pair in like)


def test_a_report_in_print_is_black_on_white(browser: webdriver.Chrome, run: Path) -> None:
    opened(browser, run, 1280, "dark", media="print")
    assert asked(browser, "getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert asked(browser, "getComputedStyle(document.body).color") == "rgb(28, 37, 48)"
    assert not browser.find_element(By.TAG_NAME, "nav").is_displayed()
