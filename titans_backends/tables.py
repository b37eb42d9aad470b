"""The tuned tables in the order in which they are asked, each loaded once: a named file, the user's, the shipped with those of backends, a relative's.

Says which files there are and what is wrong with them; which row answers is `cache.lookup`'s to say, what to do with it dispatch's.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from titans_backends import registry, switches
from titans_backends.buckets import defaults_of
from titans_backends.cache import file, paths
from titans_backends.cache.schema import Device, Environment, Table, device_of
from titans_backends.device_names import is_slice
from titans_backends.machine import Machine

__all__ = ["Source", "current_environment", "forget_received", "invalidate", "own", "receive", "shipped_paths", "sources"]

SourceKind = Literal["named", "user", "received", "shipped", "backend", "borrowed"]
_MOST_UNLIKE = 2.0
"""Of two cards of one architecture, how many times the processors of the one the other may have and still lend its rows."""

_received: dict[str, tuple[Source, ...]] = {}
"""By a machine's slug: what stands in place of its own files."""


@dataclass(frozen=True, slots=True)
class Source:
    """One file: its table, or why it is not used.

    received: the named or the user's file of the job's rank 0, in place of this rank's own. backend: one that ships with the backend `owner`; borrowed: a
    shipped one, the library's or a backend's, of another device of the same architecture.
    """

    kind: SourceKind
    path: Path
    table: Table | None
    problem: str = ""
    world_writable: bool = False
    owner: str = ""

    @property
    def described(self) -> str:
        """For people: which of the places this is, and where."""
        names = {
            "named": f"{switches.PREFIX}CACHE",
            "user": "user cache",
            "received": "received from rank 0:",
            "shipped": "shipped table",
            "backend": f"table of the backend {self.owner}",
            "borrowed": f"borrowed table of the backend {self.owner}" if self.owner else "borrowed table",
        }
        return f"{names[self.kind]} {self.path}"


def _source(kind: SourceKind, path: Path, loaded: file.Loaded[Table], owner: str = "") -> Source:
    problem = loaded.reason or ("" if loaded.table is not None else f"there is no such file{_damaged_beside(path)}")
    return Source(kind, path, loaded.table, problem, loaded.world_writable, owner)


def _damaged_beside(path: Path) -> str:
    """What an earlier process, which found the file damaged, left of it."""
    left = file.set_aside(path)
    return f" (damaged, it was moved to {', '.join(one.name for one in left)} beside)" if left else ""


def own(machine: Machine) -> Iterator[Source]:
    """This process's own files, read again: the named one, the user's."""
    device = device_of(machine)
    named = switches.current().cache
    if named is not None:
        if not named.exists():
            warnings.warn(
                f"{switches.PREFIX}CACHE names {named}, which does not exist{_damaged_beside(named)}, so it decides nothing; "
                f"make it with: titans-backends tune --output {named}",
                stacklevel=2,
            )
        yield _source("named", named, file.load(named, defaults_of, device))
    user = paths.user_cache_path(machine.slug)
    yield _source("user", user, file.load(user, defaults_of, device))


def receive(machine: Machine, given: Sequence[Source]) -> None:
    """Puts another process's tables in place of this one's own. Loaded tables and memos are for the caller to drop."""
    _received[machine.slug] = tuple(given)


def _sources(machine: Machine) -> Iterator[Source]:
    device = device_of(machine)
    yield from _received[machine.slug] if machine.slug in _received else own(machine)
    shipped = [(owner, path, file.read(path, defaults_of)) for owner, path in shipped_paths()]
    for owner, path, loaded in shipped:
        if loaded.table is None or loaded.table.device.same(device):
            yield _source("backend" if owner else "shipped", path, loaded, owner)
    for owner, path, loaded in shipped:
        if loaded.table is not None and _lends(loaded.table.device, device):
            yield _source("borrowed", path, loaded, owner)


def _lends(owner: Device, device: Device) -> bool:
    """Whether a table of another device may speak here: one architecture, both whole cards, neither far larger than the other."""
    if owner.kind != device.kind or owner.sm is None or owner.sm != device.sm or owner.same(device):
        return False
    if is_slice(owner.slug) or is_slice(device.slug):
        return False
    return owner.sms is None or device.sms is None or max(owner.sms, device.sms) <= _MOST_UNLIKE * min(owner.sms, device.sms)


@functools.lru_cache(maxsize=16)
def sources(machine: Machine) -> tuple[Source, ...]:
    """Every table that may answer for a machine, first come first served."""
    return tuple(_sources(machine))


def shipped_paths() -> Iterator[tuple[str, Path]]:
    """The tables that came with the library, then those of every backend that has some, with its name."""
    for path in paths.shipped_paths():
        yield "", path
    for backend in registry.known().values():
        if backend.tables is not None:
            for path in paths.tables_in(Path(backend.tables)):
                yield backend.name, path


@functools.lru_cache(maxsize=4)
def current_environment(kind: str) -> Environment:
    """The versions that rows are graded against."""
    from titans_backends.cache.environment import current_environment as gather

    return gather(kind)


def forget_received() -> None:
    """This process's own files decide again."""
    _received.clear()


def invalidate() -> None:
    """Forgets the loaded tables, so that the next miss reads them again; what was received stays."""
    sources.cache_clear()
    current_environment.cache_clear()
