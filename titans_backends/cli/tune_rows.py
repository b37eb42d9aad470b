"""The rows that `tune` ends with: the same for the table and for `--json`. What each gain is over is said in the column's title."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from titans_backends.buckets import field
from titans_backends.cli.keys import by_key, key_json, key_title
from titans_backends.cli.show import Column, Group, Json, say, table
from titans_backends.cli.winners import is_narrow, winner_cells, winner_columns
from titans_backends.reporting import numbers
from titans_backends.tuning.report import Row

__all__ = ["rows_json", "show_rows"]

_MARK = "~"


def rows_json(rows: Sequence[Row]) -> list[Json]:
    """One object per bucket; times in microseconds, gains as factors, null where a number was not measured. `choices`: how many raced and passed;
    `between`: of a midpoint its neighbours' lengths."""
    return [_row_json(row) for row in rows]


def show_rows(to: Console, rows: Sequence[Row]) -> None:
    """The table, buckets of one key under one title."""
    reference = "vs ref." if is_narrow(to) else "vs reference"
    winner, *second = winner_columns(to)
    columns = [Column("seq_len", "right"), winner, Column("median", "right"), Column("vs default", "right"), Column(reference, "right"), *second]
    groups = [Group(key_title(first), [_cells(to, row) for _, row in found]) for first, found in by_key((row.bucket, row) for row in rows)]
    table(to, columns, groups)
    by_time = [row.entry for row in rows if row.entry is not None and not row.entry.tuned_with]
    if any(entry.next_us is not None and entry.next_us < entry.us for entry in by_time):
        to.print()
        say(to, "a runner-up that is faster within the noise does not replace the default, nor a simpler winner", "dim")
    if any(row.between is not None for row in rows):
        to.print()
        say(
            to,
            f"{_MARK} a midpoint, which nobody asked for: its two neighbours chose differently, or its row held no longer, and their choices alone raced there",
            "dim",
        )
    doubtful = [row.entry for row in rows if row.entry is not None and row.entry.doubt is not None]
    if doubtful:
        again = " ".join(word for word in ("titans-backends tune --doubtful", doubtful[0].tuned_with) if word)  # one tune has one limit
        to.print()
        say(to, f"noise decided {numbers.amount(len(doubtful), 'bucket')}: measure them again with {again}", "dim")


def _cells(to: Console, row: Row) -> list[str | Text]:
    length, entry = f"{_MARK if row.between is not None else ''}{row.bucket.seq_len}", row.entry
    if entry is None:
        nothing: list[str | Text] = [length, Text(f"none: {row.reason}", "red"), "", "", ""]
        return nothing if is_narrow(to) else [*nothing, ""]
    winner, *second = winner_cells(to, entry)
    return [length, winner, numbers.time_us(entry.us), numbers.gain(row.default_us, entry.us), numbers.gain(row.reference_us, entry.us), *second]


def _row_json(row: Row) -> dict[str, Json]:
    entry = row.entry
    return {
        **key_json(row.bucket),
        "regime": str(field(row.bucket, "regime")),
        "winner": entry.label if entry else None,
        "median_us": entry.us if entry else None,
        "spread": entry.spread if entry else None,
        "doubt": entry.doubt if entry else None,
        "peak_mib": entry.peak_mib if entry else None,
        "objective": entry.objective if entry else None,
        "max_memory_mib": entry.max_memory_mib if entry else None,
        "default_us": row.default_us,
        "gain_over_default": _factor(row.default_us, entry.us if entry else None),
        "reference_us": row.reference_us,
        "gain_over_reference": _factor(row.reference_us, entry.us if entry else None),
        "runner_up": entry.next if entry else None,
        "runner_up_us": entry.next_us if entry else None,
        "choices": row.choices,
        "between": None if row.between is None else list(row.between),
        "measured": row.measured,
        "reason": row.reason,
    }


def _factor(slower_us: float | None, faster_us: float | None) -> float | None:
    return round(slower_us / faster_us, 4) if slower_us and faster_us else None
