"""The page in a real browser without a network: no error, no request, no overflow on a phone, both colour schemes, and the keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the package matplotlib is not installed: pip install 'titans-backends[report]'")
pytest.importorskip("jinja2", reason="the package jinja2 is not installed: pip install 'titans-backends[report]'")

from tests.chromium import Browser, found
from tests.report_facts import facts
from titans_backends.reporting.page import page
from titans_backends.reporting.palette import PALETTE
from titans_backends.reporting.view import page_view

PROGRAM = found()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no chromium, chromium-browser or google-chrome on this machine")

REACHABLE = 'a[href], summary, [tabindex="0"]'
WIDER = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('.skip') &&
e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + '.' + e.getAttribute('class')).join(', ')"""


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Browser, Path]]:
    folder = tmp_path_factory.mktemp("browser")
    path = folder / "report.html"
    path.write_text(page(page_view(facts())), encoding="utf-8")
    assert PROGRAM is not None
    with Browser(PROGRAM, folder / "profile") as browser:
        browser.open(path)
        yield browser, path


def test_there_is_no_message_and_no_request(opened: tuple[Browser, Path]) -> None:
    browser, path = opened
    for width in (1280, 390):
        with browser.looking(width):
            assert browser.ask("document.querySelectorAll('svg').length") == 11  # five of the machine, six of the race
    assert browser.console == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [path.as_uri()]


@pytest.mark.parametrize("opened_details", [False, True])
@pytest.mark.parametrize("width", [1280, 768, 390, 320])
def test_nothing_is_wider_than_the_screen(opened: tuple[Browser, Path], width: int, opened_details: bool) -> None:
    browser, _ = opened
    with browser.looking(width):
        browser.ask(f"document.querySelectorAll('details').forEach(d => d.open = {str(opened_details).lower()})")
        assert browser.ask("document.documentElement.scrollWidth") == width
        assert browser.ask(WIDER) == ""
        browser.ask("document.querySelectorAll('details').forEach(d => d.open = false)")


def test_letters_of_the_charts_are_legible_on_a_phone(opened: tuple[Browser, Path]) -> None:
    browser, _ = opened
    with browser.looking(390):
        least = browser.ask("Math.min(...[...document.querySelectorAll('.panel svg text')].map(t => t.getBoundingClientRect().height))")
    assert isinstance(least, (int, float))
    assert least > 9


def test_the_page_and_its_charts_follow_the_colour_scheme(opened: tuple[Browser, Path]) -> None:
    browser, _ = opened
    seen = {}
    for scheme in ("light", "dark"):
        with browser.looking(1280, scheme=scheme):
            line = browser.ask("getComputedStyle(document.querySelector('.panel svg .s-triton')).stroke")
            grounds = [browser.ask(f"getComputedStyle(document.querySelector('{name}')).backgroundColor") for name in ("body", ".panel")]
            seen[scheme] = (grounds, line)
    for scheme, (_, line) in seen.items():
        colour = getattr(PALETTE["triton"], scheme)
        assert line == f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"
    assert all(light != dark for light, dark in zip(seen["light"][0], seen["dark"][0], strict=True))


def test_paper_is_light_and_shows_the_charts_without_the_closed_tables(opened: tuple[Browser, Path], tmp_path: Path) -> None:
    browser, _ = opened
    with browser.looking(794, scheme="dark", media="print"):
        assert browser.ask("getComputedStyle(document.body).color") == "rgb(28, 37, 48)"
        assert browser.ask("getComputedStyle(document.querySelector('details')).display") == "none"
        assert browser.ask("getComputedStyle(document.querySelector('nav')).display") == "none"
    browser.printed(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")


def test_the_keyboard_reaches_everything_in_the_order_of_the_page(opened: tuple[Browser, Path]) -> None:
    browser, _ = opened
    with browser.looking(1280):
        browser.ask("document.activeElement.blur(), scrollTo(0, 0)")
        browser.ask(f"window.reachable = [...document.querySelectorAll(`{REACHABLE}`)].filter(e => e.checkVisibility())")
        order = []
        for _ in range(80):
            browser.tab()
            at = browser.ask("reachable.indexOf(document.activeElement)")
            if order and at in (-1, 0):
                break
            order.append(at)
            assert browser.ask("getComputedStyle(document.activeElement).outlineStyle") != "none"
        assert order == list(range(int(str(browser.ask("reachable.length")))))
        assert browser.ask("reachable[0].className") == "skip"
        assert browser.ask("reachable.filter(e => e.tagName == 'SUMMARY').length") == 9


def test_the_first_link_leads_to_the_results(opened: tuple[Browser, Path]) -> None:
    browser, _ = opened
    assert browser.ask("document.querySelector('.skip').click(), document.activeElement.id") == "main"
