"""How results reach the terminal: tables that stay legible at 80 columns, facts with a hanging indent, and JSON.

Results go to stdout, everything else to stderr. Piped output is never wrapped, coloured or cut; reasons are printed as they are, and
never read as markup.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["Column", "Group", "Json", "command", "console", "facts", "heading", "print_json", "say", "status_console", "table"]

Json = str | int | float | bool | None | Sequence["Json"] | Mapping[str, "Json"]
Cell = str | Text

_GAP = 2
_NARROWEST = 14
_UNWRAPPED = 10_000


@dataclass(frozen=True, slots=True)
class Column:
    """A column's title. `flexible` ones give way where the terminal is narrow, and wrap at blanks; the others never do."""

    title: str
    justify: Literal["left", "right"] = "left"
    flexible: bool = False
    style: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """Rows under a title of their own; an empty title prints none."""

    title: Cell
    rows: Sequence[Sequence[Cell]]


def _made(stream: TextIO) -> Console:
    wide = None if stream.isatty() or os.environ.get("COLUMNS", "").isdecimal() else _UNWRAPPED
    return Console(file=stream, width=wide, highlight=False, markup=False, emoji=False)


def console() -> Console:
    """Where results go."""
    return _made(sys.stdout)


def status_console() -> Console:
    """Where progress, warnings and errors go."""
    return _made(sys.stderr)


def say(to: Console, text: Cell, style: str = "") -> None:
    """A paragraph, wrapped at blanks only."""
    to.print(text, style=style or None, overflow="fold")


def command(to: Console, text: str, indent: int = 2) -> None:
    """Something to copy and type: never broken by a line's end of ours."""
    to.print(" " * indent + text, style="bold", soft_wrap=True)


def heading(to: Console, text: str) -> None:
    """A title over what follows, with an empty line before it."""
    to.print()
    to.print(Text(text, style="bold"))


def print_json(value: Json) -> None:
    """The value, indented, on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def facts(to: Console, pairs: Iterable[tuple[str, Cell]], indent: int = 2) -> None:
    """Labels and values in two columns; a long value goes on under itself."""
    rows = [(label, value) for label, value in pairs if value]
    grid = Table.grid(padding=(0, _GAP, 0, 0))
    grid.add_column(style="dim", no_wrap=True, width=max((cell_len(label) for label, _ in rows), default=0) + indent)
    grid.add_column(overflow="fold")
    for label, value in rows:
        grid.add_row(" " * indent + label, _text(value))
    if rows:
        _print(to, grid)


def table(to: Console, columns: Sequence[Column], groups: Sequence[Group]) -> None:
    """Groups of rows in columns of the same widths throughout; a column that is empty everywhere is left out."""
    used = [i for i in range(len(columns)) if any(row[i] for group in groups for row in group.rows)]
    columns = [columns[i] for i in used]
    shown = [Group(group.title, [[row[i] for i in used] for row in group.rows]) for group in groups]
    widths = _widths(columns, [row for group in shown for row in group.rows], to.width)
    for number, group in enumerate(shown):
        if group.title:
            if number:
                to.print()
            to.print(_text(group.title), overflow="fold")
        made = Table(box=None, show_header=not number, header_style="dim", padding=(0, _GAP, 0, 0), pad_edge=False, show_edge=False)
        for column, width in zip(columns, widths, strict=True):
            made.add_column(column.title, justify=column.justify, width=width, no_wrap=not column.flexible, overflow="fold", style=column.style)
        for row in group.rows:
            made.add_row(*map(_text, row))
        _print(to, made)


def _print(to: Console, made: Table) -> None:
    """Without the blanks that pad a table's lines to its width."""
    with to.capture() as captured:
        to.print(made)
    lines = [Text.from_ansi(line) for line in captured.get().splitlines()]
    for line in lines:
        line.rstrip()
        to.print(line, no_wrap=True, overflow="ignore", crop=False)


def _text(cell: Cell) -> Text:
    return cell if isinstance(cell, Text) else Text(cell)


def _widths(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], available: int) -> list[int]:
    """What each column needs; where that is too much, the flexible ones share what the others leave, the shortest first."""
    needed = [max([cell_len(c.title), *(cell_len(line) for row in rows for line in str(row[i]).splitlines())]) for i, c in enumerate(columns)]
    flexible = sorted((i for i, c in enumerate(columns) if c.flexible), key=lambda i: needed[i])
    left = available - _GAP * len(columns) - sum(width for i, width in enumerate(needed) if i not in flexible)
    for position, i in enumerate(flexible):
        share = max(_NARROWEST, left // (len(flexible) - position))
        needed[i] = min(needed[i], share)
        left -= needed[i]
    return needed
