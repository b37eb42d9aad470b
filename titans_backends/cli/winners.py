"""How a row's winner and its runner-up stand in a table: side by side, or one under the other where the terminal is narrow."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from titans_backends.cache.schema import Entry
from titans_backends.cli.show import Column
from titans_backends.reporting import numbers

__all__ = ["is_narrow", "winner_cells", "winner_columns"]

_NARROW = 110


def is_narrow(to: Console) -> bool:
    """Whether a table has to do without what JSON has anyway."""
    return to.width < _NARROW


def winner_columns(to: Console) -> list[Column]:
    """The columns: the winner, and where there is room the runner-up."""
    return [Column("winner", flexible=True), *([] if is_narrow(to) else [Column("runner-up", flexible=True)])]


def winner_cells(to: Console, entry: Entry) -> list[str | Text]:
    """The cells of `winner_columns`; a training pair stands on two lines. Where time alone did not decide, the winner's says what it was tuned with."""
    winner, second = Text(_lines(entry.label), "green"), Text(_runner_up(entry), "dim")
    if entry.tuned_with:
        winner.append(f"\ntuned with {entry.tuned_with}", "yellow")
    if not is_narrow(to):
        return [winner, second]
    return [Text.assemble(winner, ("\nthen ", "dim"), second) if second else winner]


def _runner_up(entry: Entry) -> str:
    if entry.next is None:
        return ""
    return _lines(entry.next) + (f" {numbers.time_us(entry.next_us)}" if entry.next_us is not None else "")


def _lines(label: str) -> str:
    return label.replace(" + ", "\n+ ", 1)
