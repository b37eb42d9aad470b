"""The page and the pictures: complete, escaped, and asking for nothing from anywhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib", reason="the package matplotlib is not installed: pip install 'titans-backends[report]'")
pytest.importorskip("jinja2", reason="the package jinja2 is not installed: pip install 'titans-backends[report]'")

from dataclasses import replace

from tests.report_facts import cell, facts, machine, timed, training
from titans_backends.reporting import overviews, svg
from titans_backends.reporting.facts import Facts
from titans_backends.reporting.page import page
from titans_backends.reporting.pictures import write_pictures
from titans_backends.reporting.rows import rows_of
from titans_backends.reporting.times import strips, times
from titans_backends.reporting.view import page_view


@pytest.fixture(scope="module")
def html() -> str:
    return page(page_view(facts()))


class Outline(HTMLParser):
    """Every id, every attribute that names something, and whether tags are closed as they were opened."""

    void = frozenset(("meta", "link", "br", "input", "hr", "img"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.named: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(attrs)
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def _note(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href", "srcset", "action", "data", "poster"):
                self.named.append((name, value or ""))


def test_nothing_is_asked_from_anywhere(html: str) -> None:
    outline = Outline(html)
    assert all(value.startswith(("#", "data:,")) for _, value in outline.named), outline.named
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)|<script|<iframe|<object|<embed|\son\w+=", html)
    assert not re.search(r"https?://", html)
    assert "default-src 'none'" in html


def test_the_page_is_well_formed_and_its_links_arrive(html: str) -> None:
    outline = Outline(html)
    assert outline.open == []
    assert len(outline.ids) == len(set(outline.ids))
    assert {value[1:] for _, value in outline.named if value.startswith("#")} <= set(outline.ids)
    used = re.findall(r"url\(#([^)]+)\)", html)
    assert used
    assert set(used) <= set(outline.ids)


def test_what_was_found_stands_on_the_page(html: str) -> None:
    for words in (
        "Made-up GPU", "5 buckets measured", "triton in 4", "2.00×", "measured with torch 2.10.0", "titans-backends", "is no longer there",
        "it does not implement this op", "o is wrong by 3.0e-01, at most 1.0e-02", "cupy + triton", "copying 1 TB/s", "untuned default triton/scan block=64",
        "set by bytes: 50 %", "its timings are not kept here", "one run",
    ):  # fmt: skip
        assert words in html, words


def test_the_headline_says_what_decides_nothing_and_over_which_buckets_a_mean_is(html: str) -> None:
    head = html.split("Summary by op")[0]
    assert "Of these rows 1 no longer decide a call" in head
    assert "Of these rows 1 were measured with other versions" in head
    assert "as fast as the next backend; " in head  # known in all five
    assert "as fast as plain torch (eager) in the 3 where that time is known" in head


def test_a_column_that_nothing_fills_is_left_out(html: str) -> None:
    columns = ("over the default</th>", "over the next backend</th>", "over eager</th>", "of the floor, at most</th>")
    assert [words for words in columns if words not in html] == []
    bare = cell(measurements=(), default=None, default_reason="its timings are not kept here")
    text = page(page_view(Facts((machine(bare, ceilings=None),), "", "")))
    assert [words for words in columns if words in text] == ["over the next backend</th>"]
    Outline(text)


def test_words_from_files_are_text_and_never_markup(html: str) -> None:
    assert "&lt;b&gt;not&lt;/b&gt; a table" in html
    bad = cell(measurements=(*cell().measurements, replace(timed("cupy/<i>x</i>", None), reason="<script>alert(1)</script>")))
    text = page(page_view(Facts((machine(bad, cell(2048)),), "", "")))
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_nothing_to_show_says_what_to_type() -> None:
    text = page(page_view(Facts((), "2026-01-02", "0.1")))
    assert "No table has a row" in text
    assert "titans-backends tune" in text
    Outline(text)


def test_a_machine_of_damaged_files_alone_is_shown_with_its_files() -> None:
    assert "No rows." in page(page_view(Facts((machine(),), "", "")))


def test_without_ceilings_no_floor_is_drawn_and_the_page_says_so() -> None:
    text = page(page_view(Facts((machine(cell(), cell(2048), ceilings=None),), "", "")))
    assert "No floor is shown" in text
    assert "Share of the floor" not in text.split("How to read this</h2>")[0]


def test_every_mark_of_a_chart_says_what_it_is() -> None:
    chart = times(rows_of(machine(cell(), cell(2048))))
    text = svg.inlined(chart.figure, "x", chart.title, chart.notes)
    assert "triton, 512 tokens: 10.0 µs ± 10 %, triton/scan block=32" in text
    assert text.count("<use") > 6
    assert ">eager ↑ 10×<" in text  # plain torch is left above the axis
    assert ">floor<" in text


def test_an_inlined_chart_has_classes_and_no_colours_of_its_own() -> None:
    for chart in (
        times(rows_of(machine(cell(), cell(2048)))),
        strips(rows_of(machine(cell(), training()))),
        overviews.gains(rows_of(machine(cell()))),
    ):
        text = svg.inlined(chart.figure, "x", chart.title)
        assert not re.search(r"#[0-9a-f]{6}", text)
        assert all(found.startswith("x-") for found in re.findall(r'\bid="([^"]+)"', text))
        assert ElementTree.fromstring(text).get("role") == "img"


def test_pictures_are_whole_files_that_bring_their_colours(tmp_path: Path) -> None:
    written = write_pictures(facts(), tmp_path / "made")
    names = {path.name for path in written}
    assert names == {f"made_up_gpu-{what}.{kind}" for what in ("winners", "gains", "floor", "gated_delta_rule") for kind in ("svg", "png")}
    for path in written:
        if path.suffix == ".svg":
            text = path.read_text(encoding="utf-8")
            root = ElementTree.fromstring(text)
            assert root.tag == "{http://www.w3.org/2000/svg}svg"
            assert "prefers-color-scheme:dark" in text
            assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
            assert len(text) < 60_000
        else:
            assert path.read_bytes().startswith(b"\x89PNG")


def test_the_same_facts_make_the_same_bytes(tmp_path: Path, html: str) -> None:
    assert page(page_view(facts())) == html
    first, second = (write_pictures(facts(), tmp_path / name) for name in ("one", "two"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
