"""The rows of a table for people and for `--json`: winners, how they were measured, and whether they still hold; and what differs between two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.text import Text

from titans_backends.buckets import Bucket
from titans_backends.cache.repeats import repeats
from titans_backends.cache.schema import Change, Entry, Table
from titans_backends.cache.staleness import Staleness
from titans_backends.cli.keys import by_key, key_json, key_title
from titans_backends.cli.show import Column, Group, Json, say
from titans_backends.cli.show import table as show_table
from titans_backends.cli.winners import winner_cells, winner_columns
from titans_backends.reporting import numbers

__all__ = ["changes_json", "rows_json", "show_changes", "show_rows"]


def rows_json(table: Table, states: Mapping[Bucket, Staleness]) -> list[Json]:
    """One object per row."""
    return [
        {**key_json(bucket), **_entry_json(entry, table), "state": states[bucket].kind if bucket in states else None, "why": _why(states.get(bucket))}
        for bucket, entry in table.rows.items()
    ]


def show_rows(to: Console, table: Table, states: Mapping[Bucket, Staleness]) -> None:
    """The rows, those of one key under one title. Rows for traced graphs that repeat the row beside them are counted, not listed."""
    listed = {bucket: entry for bucket, entry in table.rows.items() if not repeats(bucket, entry, table.rows)}
    winner, *second = winner_columns(to)
    figures = [Column(title, "right") for title in ("median", "±", "doubt", "peak")]
    columns = [Column("seq_len", "right"), winner, *figures, *second, Column("state")]
    groups = [
        Group(key_title(first), [_cells(to, bucket, entry, states.get(bucket)) for bucket, entry in found]) for first, found in by_key(listed.items())
    ]
    show_table(to, columns, groups)
    if len(listed) < len(table.rows):
        many = numbers.amount(len(table.rows) - len(listed), "row")
        say(to, Text(f"not listed: {many} for traced graphs (saves=inputs) with the choice of the row beside; --json has all", "dim"))
    if any(entry.doubt is not None for entry in table.rows.values()):
        to.print()
        say(to, "doubt: noise decided; the share of the winner's time that another candidate may save, as far as both intervals go", "dim")


def changes_json(changes: Sequence[Change], old: Table, new: Table) -> list[Json]:
    """One object per bucket that differs."""
    return [
        {
            **key_json(change.bucket),
            "old": None if change.old is None else _entry_json(change.old, old),
            "new": None if change.new is None else _entry_json(change.new, new),
        }
        for change in changes
    ]


def show_changes(to: Console, changes: Sequence[Change]) -> None:
    """What stands in the first table and in the second."""
    columns = (Column("seq_len", "right"), Column("first", flexible=True), Column("", "right"), Column("second", flexible=True), Column("", "right"))
    groups = [
        Group(key_title(first), [[str(bucket.seq_len), *_side(change.old), *_side(change.new)] for bucket, change in found])
        for first, found in by_key((change.bucket, change) for change in changes)
    ]
    show_table(to, columns, groups)


def _side(entry: Entry | None) -> list[str | Text]:
    if entry is None:
        return [Text("no row", "dim"), ""]
    told = f"\ntuned with {entry.tuned_with}" if entry.tuned_with else ""
    if entry.until is not None:
        told += f"\nup to {entry.until[1]}, then that of {entry.until[0]}"
    return [entry.label.replace(" + ", "\n+ ", 1) + told, numbers.time_us(entry.us)]


def _cells(to: Console, bucket: Bucket, entry: Entry, state: Staleness | None) -> list[str | Text]:
    winner, *second = winner_cells(to, entry)
    held = Text(state.kind, {"fresh": "", "stale": "yellow", "ignored": "red"}[state.kind]) if state is not None else Text()
    doubt = Text(f"? {numbers.percent(entry.doubt)}" if entry.doubt is not None else "", "yellow")
    return [str(bucket.seq_len), winner, numbers.time_us(entry.us), numbers.percent(entry.spread), doubt, numbers.mib(entry.peak_mib), *second, held]


def _entry_json(entry: Entry, table: Table) -> dict[str, Json]:
    environment = table.environment(entry)
    return {
        "winner": entry.label,
        "median_us": entry.us,
        "spread": entry.spread,
        "doubt": entry.doubt,
        "peak_mib": entry.peak_mib,
        "objective": entry.objective,
        "max_memory_mib": entry.max_memory_mib,
        "until": None if entry.until is None else list(entry.until),
        "runner_up": entry.next,
        "runner_up_us": entry.next_us,
        "torch": environment.torch,
        "date": environment.date,
    }


def _why(state: Staleness | None) -> str:
    return "" if state is None else state.reason
