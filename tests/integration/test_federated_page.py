"""The page of a federated run in a real browser: no error, nothing fetched, nothing wider than the window."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from federated_result import write_compared

from clients.matrix import matrix_of, runs_with_compared
from clients.report import write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH: install it to see the page rendered")


def test_the_page_shows_and_fits_its_width(tmp_path: Path) -> None:
    runs = runs_with_compared([write_compared(tmp_path / "run")])
    page = write_report(runs[0], matrix_of(runs, {}, None), tmp_path / "report.html")
    with Browser(tmp_path / "browser") as browser:
        for width in (1280, 390):
            browser.look(width=width)
            browser.open(page.as_uri())
            assert "Every model at every site" in browser.text() and "not allowed after 20:00" in browser.text()
            assert browser.evaluate("document.documentElement.scrollWidth") == width
            assert browser.evaluate("document.querySelectorAll('svg').length") == 5
        heat = "[...document.querySelectorAll('.heat td[style]')].map(cell => getComputedStyle(cell).backgroundColor)"
        assert len(set(browser.evaluate(heat))) > 10
        assert browser.problems == [] and browser.asked == set()
