"""The page of a report as a browser shows it: without a network, sorted, filtered, zoomed, on a phone, on paper."""

import csv
import io
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.tools.scaling.studies import Study
from tools.dev.benchmarks import browser
from tools.scaling import fit_file
from tools.scaling.fit import Settings, fit
from tools.scaling.observations import Observation, read_csv
from tools.scaling.report import content, write
from tools.scaling.report.content import Content
from tools.scaling.study_results import Spent, StudyResults

HOSTILE = "</script><img src=x onerror=alert(1)>"
NAMED = 7


@pytest.fixture(scope="module")
def cells():
    """A study with noise, missing and diverged cells, one of them with a name that would be a script."""
    found = Study(noise=0.003, sizes=(1e8, 2e8, 4e8, 8e8, 1.6e9)).draw(0)
    named = [Observation(**{**vars(one), "name": f"cell{index:04d}"}) for index, one in enumerate(found)]
    named[NAMED] = Observation(**{**vars(named[NAMED]), "name": HOSTILE})
    return named


@pytest.fixture(scope="module")
def page(cells, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    (folder / "runs" / "cell0000").mkdir(parents=True)
    fitted = fit(cells, Settings(draws=50))
    document = fit_file.document(fitted, source="drawn")
    diverged = next(one.name for one in cells if one.status == "diverged")
    results = StudyResults(
        "drawn & <fitted>",
        cells,
        reasons={diverged: "its loss came to 9.1, having been 3.2"},
        runs=folder / "runs",
        spent=[Spent("small", 10, 1.0, 1.5), Spent("large", 10, 4.0, 3.5)],
        budget_hours=6.0,
        dropped=[{"what": "huge, 1e+12 tokens", "cells": 30, "device_hours": 9.0, "reason": "the budget ends"}],
    )
    links = content.links(results, folder / "report.html")
    shown = Content(results, fitted, document, document["notes"], links)
    write.write(shown, folder / "report.html", folder / "figures")
    return folder / "report.html"


@pytest.fixture
def opened(chromium, page):
    """The page, and everything that it asked the network for or complained of."""
    tab = chromium.new_page(viewport={"width": 1280, "height": 900})
    tab.said = []
    tab.on("console", lambda message: tab.said.append(message.text))
    tab.on("pageerror", lambda error: tab.said.append(str(error)))
    tab.on("dialog", lambda dialog: tab.said.append("a dialog") or dialog.dismiss())
    tab.on("request", lambda request: request.url == page.as_uri() or tab.said.append(request.url))
    tab.goto(page.as_uri())
    tab.wait_for_function(browser.DRAWN)
    yield tab
    assert tab.said == []
    tab.close()


def column(tab, number):
    return tab.eval_on_selector_all(f"#cells tbody tr td:nth-child({number})", "all => all.map(one => one.textContent)")


def test_it_asks_nothing_of_a_network_and_complains_of_nothing(opened):
    assert opened.title() == "drawn & <fitted>"
    assert opened.locator(".chart svg.marks").count() == 8
    assert HOSTILE in column(opened, 1)


def test_columns_sort_both_ways_and_what_has_no_value_comes_last(opened, cells):
    losses = [f"{one.loss:.4f}" for one in cells if one.status == "done"]
    missing = len(cells) - len(losses)
    button = opened.get_by_role("button", name="loss", exact=True)
    button.click()
    assert column(opened, 8) == sorted(losses, key=float) + ["-"] * missing
    button.click()
    assert column(opened, 8) == sorted(losses, key=float, reverse=True) + ["-"] * missing
    assert opened.locator('th[aria-sort="descending"]').count() == 1
    opened.get_by_role("button", name="status", exact=True).press("Enter")  # by keyboard; words, not numbers
    assert column(opened, 2) == sorted(one.status for one in cells)


def test_rows_are_found_by_text_and_status(opened, cells):
    opened.locator("#status").select_option("diverged")
    count = sum(one.status == "diverged" for one in cells)
    assert opened.locator("#cells tbody tr:visible").count() == count
    opened.locator("#filter").fill("having been")
    assert opened.locator("#cells tbody tr:visible").count() == 1
    assert opened.locator("#shown").text_content() == f"1 of {len(cells)}"


def test_a_point_tells_its_cell(opened, cells):
    mark = opened.locator("#chart-loss_over_compute svg .mark-symbol.role-mark path").first
    mark.hover(force=True)
    tip = opened.locator("#vg-tooltip-element.visible")
    tip.wait_for()
    text = tip.text_content()
    assert "cell" in text
    assert any(one.name in text for one in cells if one.name)
    assert re.search(r"loss:?\s*\d\.\d{4}", text)


def test_a_name_that_would_be_a_script_is_a_name(opened):
    """Also where Vega shows it."""
    marks = opened.locator("#chart-loss_over_compute svg .mark-symbol.role-mark path")
    label = "aria-label"
    hostile = next(
        index for index in range(marks.count()) if "alert(1)" in (marks.nth(index).get_attribute(label) or "")
    )
    marks.nth(hostile).hover(force=True)
    tip = opened.locator("#vg-tooltip-element.visible")
    tip.wait_for()
    assert tip.locator("img").count() == 0


def test_zoom_and_back(opened):
    labels = "document.querySelectorAll('#chart-residuals .role-axis-label text')"
    ticks = f"[...{labels}].map(one => one.textContent).sort().join()"
    before = opened.evaluate(ticks)
    opened.locator("#chart-residuals").scroll_into_view_if_needed()
    box = opened.locator("#chart-residuals svg.marks").bounding_box()
    opened.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    opened.keyboard.down("Control")
    for _ in range(5):
        opened.mouse.wheel(0, -200)
    opened.keyboard.up("Control")
    opened.wait_for_function(f"({ticks}) !== {before!r}")
    opened.mouse.dblclick(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    opened.wait_for_function(f"({ticks}) === {before!r}")


def test_links_lead_to_the_runs_that_are_there(opened):
    links = opened.eval_on_selector_all("#cells a", "all => all.map(one => one.getAttribute('href'))")
    assert links == ["runs/cell0000"]


def test_the_csv_in_the_page_and_beside_it_are_the_cells(opened, page, cells, tmp_path):
    href = opened.locator("main > p a[download]").get_attribute("href")
    with opened.expect_download() as download:
        opened.locator("main > p a[download]").click()
    assert href.startswith("data:text/csv")
    download.value.save_as(tmp_path / "saved.csv")
    saved = read_csv(tmp_path / "saved.csv")
    assert [(one.name, one.params, one.status) for one in saved] == [(o.name, o.params, o.status) for o in cells]
    beside = (page.parent / "figures" / "observations.csv").read_text()
    assert len(list(csv.reader(io.StringIO(beside)))) == len(cells) + 1


@pytest.mark.parametrize("width", [360, 768, 1600])
def test_no_width_scrolls_sideways(opened, width):
    opened.set_viewport_size({"width": width, "height": 800})
    opened.wait_for_timeout(200)
    assert opened.evaluate("document.documentElement.scrollWidth") == width
    chart = opened.locator("#chart-loss_over_compute svg.marks").bounding_box()
    assert chart["x"] >= 0
    assert chart["x"] + chart["width"] <= width


def test_dark_and_paper(opened):
    ink = "getComputedStyle(document.querySelector('.chart svg text')).fill"
    ground = "getComputedStyle(document.body).backgroundColor"
    light = opened.evaluate(f"[{ink}, {ground}]")
    opened.emulate_media(color_scheme="dark")
    dark = opened.evaluate(f"[{ink}, {ground}]")
    assert sum(map(int, re.findall(r"\d+", dark[0])[:3])) > 500 > sum(map(int, re.findall(r"\d+", dark[1])[:3]))
    assert dark != light
    opened.emulate_media(media="print", color_scheme="dark")
    assert opened.evaluate(f"[{ink}, {ground}]") == ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]
    assert not opened.locator("#filter").is_visible()


def test_charts_as_files(page):
    figures = page.parent / "figures"
    names = sorted(path.stem for path in figures.glob("*.svg"))
    assert names == sorted(path.stem for path in figures.glob("*.png"))
    assert len(names) == 8
    for path in figures.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert all("<svg" in path.read_text()[:200] for path in figures.glob("*.svg"))


def test_budget_and_losses_of_cells_are_told(opened):
    text = opened.locator("main").text_content()
    for word in ("5 of 6", "device-hours spent", "huge, 1e+12 tokens", "the budget ends", "having been 3.2"):
        assert word in text


def test_a_study_of_which_nothing_is_done_yet(chromium, cells, tmp_path):
    waiting = [replace(one, status="unfinished", loss=math.nan) for one in cells[:20]]
    page = tmp_path / "report.html"
    write.write(
        Content(StudyResults("early", waiting), None, {}, ["there is nothing to fit"]), page, tmp_path / "figures"
    )
    tab = chromium.new_page()
    said = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(page.as_uri())
    assert tab.locator("#cells tbody tr:visible").count() == 20
    assert "there is nothing to fit" in tab.locator("main").text_content()
    assert said == []
    tab.close()
