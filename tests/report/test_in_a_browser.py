"""The page in a real browser: what it shows, asks for and says at the widths of a phone and a desk."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from latentforge.report.making import make_report

from .chromium import Chromium
from .planted import distilled

WIDTHS = [390, 1280]


def _made(runs: Path, folder: Path) -> Path:
    page = make_report([str(distilled(runs))], folder / "report.html").page
    assert page is not None
    return page


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_report_fits_says_nothing_and_asks_for_nothing(
    browser: Chromium, runs: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    page = _made(runs, tmp_path)
    seen = browser.show(page, width=width, dark=dark)
    assert seen.overflow == []
    assert seen.console == []
    assert seen.asked == []
    assert seen.height > 800


@pytest.mark.parametrize("width", WIDTHS)
def test_a_planted_overflow_is_caught(browser: Chromium, runs: Path, tmp_path: Path, width: int) -> None:
    page = _made(runs, tmp_path)
    whole = page.read_text()
    page.write_text(whole.replace("<footer>", f'<div style="width:{width + 40}px">wide</div><footer>'))
    assert any("wide in" in line for line in browser.show(page, width=width).overflow)
    cut = '<div style="width:50px;overflow:hidden"><pre style="white-space:pre">a word that is cut off</pre></div>'
    page.write_text(whole.replace("<footer>", f"{cut}<footer>"))
    assert any("cuts off" in line for line in browser.show(page, width=width).overflow)


def test_a_planted_script_is_refused_by_the_page_and_the_refusal_is_caught(
    browser: Chromium, runs: Path, tmp_path: Path
) -> None:
    page = _made(runs, tmp_path)
    page.write_text(page.read_text().replace("<footer>", "<script>document.title = 'ran'</script><footer>"))
    seen = browser.show(page, width=1280)
    assert any("Content Security Policy" in line for line in seen.console)
    assert browser.ask("Runtime.evaluate", expression="document.title")["result"]["value"] != "ran"


def test_a_planted_console_error_and_a_planted_picture_from_elsewhere_are_caught(
    browser: Chromium, tmp_path: Path
) -> None:
    page = tmp_path / "planted.html"
    page.write_text(
        "<!doctype html><script>console.error('planted'); undefined.x</script><img src='http://127.0.0.1:9/x'>"
    )
    seen = browser.show(page, width=390)
    assert "planted" in seen.console
    assert any("Uncaught" in line for line in seen.console)
    assert any("127.0.0.1" in address for address in seen.asked)


def test_a_report_of_a_run_prints_on_two_pages(browser: Chromium, runs: Path, tmp_path: Path) -> None:
    page = _made(runs, tmp_path)
    browser.show(page, width=1280)
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", browser.printed())) <= 2
    assert browser.show(page, width=688, media="print").overflow == []
