"""What reaches the terminal: legible at 80 columns, whole when piped, and never read as markup. And units for people."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console
from rich.text import Text

from titans_backends.cli import show
from titans_backends.cli.show import Column, Group
from titans_backends.reporting import numbers

LONG = "eager/chunked chunk_size=64 inverse=blocks + eager/chunked chunk_size=64 inverse=solve"


def printed(width: int, rows: list[list[str | Text]], *, terminal: bool = False) -> str:
    stream = io.StringIO()
    to = Console(file=stream, width=width, highlight=False, markup=False, force_terminal=terminal)
    columns = [Column("seq_len", "right"), Column("winner", flexible=True), Column("median", "right"), Column("then", flexible=True)]
    show.table(to, columns, [Group("one", rows[:1]), Group("two", rows[1:])])
    return stream.getvalue()


ROWS: list[list[str | Text]] = [["512", LONG, "12.3 ms", LONG], ["131072", "a/b", "1 µs", "c/d"]]


def test_a_wide_table_loses_no_word_at_80_columns() -> None:
    text = printed(80, ROWS)
    assert max(map(len, text.splitlines())) <= 80
    for word in (*LONG.split(), "12.3", "131072"):
        assert word in text
    assert "…" not in text


def test_a_wide_table_keeps_its_rows_on_one_line_where_there_is_room() -> None:
    lines = printed(10_000, ROWS).splitlines()
    assert any(LONG in line and "12.3 ms" in line for line in lines)
    assert all(line == line.rstrip() for line in lines)


def test_groups_share_their_columns() -> None:
    lines = printed(200, ROWS).splitlines()
    first, second = (next(line for line in lines if word in line) for word in ("12.3 ms", "1 µs"))
    assert first.index("12.3 ms") + len("12.3 ms") == second.index("1 µs") + len("1 µs")


def test_a_column_that_is_empty_everywhere_is_left_out() -> None:
    assert "then" not in printed(80, [[*row[:3], ""] for row in ROWS])


def test_brackets_are_printed_as_they_are() -> None:
    reason = "head_dim [bold]96[/bold] is not in [32, 64] :smile:"
    assert reason in printed(10_000, [["1", reason, "", ""]])
    stream = io.StringIO()
    show.facts(Console(file=stream, width=200, markup=False, emoji=False), [("reason", reason)])
    assert reason in stream.getvalue()


def test_a_stream_that_is_no_terminal_gets_no_control_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    stream = io.StringIO()
    monkeypatch.setattr("sys.stdout", stream)
    to = show.console()
    show.say(to, Text("word " * 100, "bold red"))
    show.table(to, [Column("a", style="green")], [Group(Text("t", "bold"), [[Text("x", "red")]])])
    assert "\x1b" not in stream.getvalue()
    assert ("word " * 100).strip() in stream.getvalue()


def test_colour_survives_on_a_terminal() -> None:
    assert re.search(r"\x1b\[[0-9;]*m", printed(80, [["1", Text("x", "red"), "", ""]], terminal=True))


@pytest.mark.parametrize(
    ("us", "text"),
    [
        (0.0, "0 µs"),
        (8.123, "8.12 µs"),
        (12.34, "12.3 µs"),
        (812.3, "812 µs"),
        (999.6, "1.00 ms"),
        (12340, "12.3 ms"),
        (999_600, "1.00 s"),
        (None, ""),
    ],
)
def test_times_have_three_digits_and_a_unit_that_fits(us: float | None, text: str) -> None:
    assert numbers.time_us(us) == text


def test_waits_gains_and_counts() -> None:
    assert [numbers.seconds(s) for s in (0.44, 9.96, 59.6, 125, 3840)] == ["0.4 s", "10 s", "1 min 00 s", "2 min 05 s", "1 h 04 min"]
    assert numbers.gain(200.0, 100.0) == "2.00×"
    assert numbers.gain(None, 1.0) == ""
    assert (numbers.amount(1, "bucket"), numbers.amount(2, "bucket"), numbers.amount(2, "is", "are")) == ("1 bucket", "2 buckets", "2 are")
