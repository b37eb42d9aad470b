"""What `accelerate` did to a model: every layer that it knows, what became of it, and the way back. Decides nothing about a layer."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Literal

from titans_backends.integrations.classes import portable, unpacked
from titans_backends.integrations.swapped import Swapped, lost, overlooked, undone

__all__ = ["Entry", "Report", "places"]

Status = Literal["swapped", "already", "refused", "lost"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One module, however often the model holds it.

    `paths`: its names in the model; `layer`: the known layer's; `old`: its class before, of one that was swapped already the class before that; `new`: its
    class now, None where it was refused; `reasons`: why it was, all of them; `notes`: in what the swapped layer is not the old one. `"lost"`, which
    `Report.lost` alone gives: it was swapped, and its call runs another forward since, for the reason that is there.
    """

    paths: tuple[str, ...]
    status: Status
    layer: str
    old: type
    new: type | None = None
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """The first of its names; empty for the model itself."""
        return self.paths[0]

    def __reduce__(self) -> tuple[object, ...]:
        """A swapped class has no place that it could be imported from: its pair goes in its stead."""
        new = None if self.new is None else portable(self.new)
        return _entry, (self.paths, self.status, self.layer, portable(self.old), new, self.reasons, self.notes)


def _entry(
    paths: tuple[str, ...],
    status: Status,
    layer: str,
    old: type | tuple[type, type],
    new: type | tuple[type, type] | None,
    reasons: tuple[str, ...],
    notes: tuple[str, ...],
) -> Entry:
    return Entry(paths, status, layer, unpacked(old), None if new is None else unpacked(new), reasons, notes)


class Report:
    """The entries of one call of `accelerate`, and `undo()`. As a context manager it undoes at the end. Holds no module alive.

    A copy, or one from a file (of a model that held its report, say), has the entries and no way back: its `undo()` raises RuntimeError.
    """

    def __init__(self, model: type, entries: Sequence[Entry], swaps: Sequence[Swapped]) -> None:
        self.model = model
        self.entries = tuple(entries)
        self._swaps = tuple(swaps)
        self._undone = False
        self._copied = False

    def __reduce__(self) -> tuple[object, ...]:
        return _copied, (portable(self.model), self.entries)

    @property
    def swapped(self) -> tuple[Entry, ...]:
        """What this call swapped, whether it was undone since or not."""
        return self._of("swapped")

    @property
    def already(self) -> tuple[Entry, ...]:
        """What ran on our ops before this call; this report does not undo it."""
        return self._of("already")

    @property
    def refused(self) -> tuple[Entry, ...]:
        """What was recognised and is as it was, with the reasons."""
        return self._of("refused")

    @property
    def lost(self) -> tuple[Entry, ...]:
        """What this call swapped and something has taken off our ops since (another forward on the instance, another class), as the model stands now."""
        why = {done.path: reason for done in self._swaps if (reason := lost(done))}
        return tuple(replace(entry, status="lost", reasons=(why[entry.path],)) for entry in self.swapped if entry.path in why)

    @property
    def undone(self) -> bool:
        """Whether `undo()` has run."""
        return self._undone

    def undo(self) -> None:
        """Gives back the class and the forward of every layer that this call swapped; a second time it does nothing.

        RuntimeError, before anything is undone, where a layer has got another class since: then undo that first; and of a copy.
        """
        if self._copied:
            raise RuntimeError(
                "undo: this report is a copy and undoes nothing: neither the model that it was made for nor a copy of that; "
                "undo the report that accelerate returned, and copy or save the model after that"
            )
        if not self._undone:
            undone(self._swaps)
            self._undone, self._swaps = True, ()

    def __enter__(self) -> Report:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"<{self._counted()}>"

    def __str__(self) -> str:
        return "\n".join([f"{self._counted()}.", *(_table(self._now()) if self.entries else ())])

    def _now(self) -> list[Entry]:
        """The entries with what has come over their layers since."""
        gone = {entry.path: entry for entry in self.lost}
        hung = {done.path: told for done in self._swaps if (told := overlooked(done))}
        return [replace(found := gone.get(entry.path, entry), notes=(*found.notes, *hung.get(entry.path, ()))) for entry in self.entries]

    def _of(self, status: Status) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.status == status)

    def _counted(self) -> str:
        kinds = (("swapped", self.swapped), ("lost since", self.lost), ("already", self.already), ("refused", self.refused))
        counts = [f"{len(found)} {what}" for what, found in kinds if found]
        return f"{self.model.__name__}: {', '.join(counts) or 'nothing swapped'}{', undone' if self._undone else ''}"


def _copied(model: type | tuple[type, type], entries: Sequence[Entry]) -> Report:
    """A report that tells and undoes nothing."""
    made = Report(unpacked(model), entries, ())
    made._copied = True
    return made


def places(entries: Sequence[Entry]) -> str:
    """Where they are, in a few words: the only one's paths, or the first and the last, and how many."""
    first, last = (" = ".join(path or "the model itself" for path in entry.paths) for entry in (entries[0], entries[-1]))
    return first if len(entries) == 1 else f"{first}, {last}" if len(entries) == 2 else f"{first} ... {last} ({len(entries)} layers)"


def _table(entries: Sequence[Entry]) -> list[str]:
    """Entries that differ by nothing but their place share a row; sentences are wrapped, names are not cut."""
    from rich.console import Console
    from rich.table import Table

    groups: dict[Entry, list[Entry]] = {}
    for entry in entries:
        alike = Entry((), entry.status, entry.layer, entry.old, entry.new, entry.reasons, entry.notes)
        groups.setdefault(alike, []).append(entry)
    table = Table(box=None, pad_edge=False, header_style="")
    for title in ("where", "was", "is", "what to know"):
        table.add_column(title, overflow="fold")
    for alike, members in groups.items():
        now = "refused" if alike.new is None else f"{alike.new.__name__}{f' ({alike.status})' if alike.status in ('already', 'lost') else ''}"
        table.add_row(places(members), alike.old.__name__, now, "\n".join((*alike.reasons, *alike.notes)))
    console = Console(file=io.StringIO(), width=150, no_color=True, highlight=False, markup=False, emoji=False)
    console.print(table)
    written: str = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    return [line.rstrip() for line in written.rstrip().splitlines()]
