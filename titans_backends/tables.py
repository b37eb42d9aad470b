"""The tuned tables in the order in which they are asked, each loaded once: a named file, the user's, the shipped, a relative's.

Says which files there are and what is wrong with them; which row answers is `cache.lookup`'s to say, what to do with it dispatch's.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from titans_backends import switches
from titans_backends.buckets import defaults_of
from titans_backends.cache import file, paths
from titans_backends.cache.schema import Environment, Table, device_of
from titans_backends.machine import Machine

__all__ = ["Source", "current_environment", "forget_received", "invalidate", "own", "receive", "sources"]

SourceKind = Literal["named", "user", "received", "shipped", "borrowed"]

_received: dict[str, tuple[Source, ...]] = {}
"""By a machine's slug: what stands in place of its own files."""


@dataclass(frozen=True, slots=True)
class Source:
    """One file: its table, or why it is not used.

    received: the named or the user's file of the job's rank 0, in place of this rank's own. borrowed: the shipped table of another device of the same architecture.
    """

    kind: SourceKind
    path: Path
    table: Table | None
    problem: str = ""
    world_writable: bool = False

    @property
    def described(self) -> str:
        """For people: which of the places this is, and where."""
        names = {
            "named": f"{switches.PREFIX}CACHE",
            "user": "user cache",
            "received": "received from rank 0:",
            "shipped": "shipped table",
            "borrowed": "borrowed table",
        }
        return f"{names[self.kind]} {self.path}"


def _source(kind: SourceKind, path: Path, loaded: file.Loaded[Table]) -> Source:
    problem = loaded.problem.message if loaded.problem is not None else "" if loaded.table is not None else "there is no such file"
    return Source(kind, path, loaded.table, problem, loaded.world_writable)


def own(machine: Machine) -> Iterator[Source]:
    """This process's own files, read again: the named one, the user's."""
    device = device_of(machine)
    named = switches.current().cache
    if named is not None:
        if not named.exists():
            warnings.warn(
                f"{switches.PREFIX}CACHE names {named}, which does not exist, so it decides nothing; make it with: titans-backends tune --output {named}",
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
    for path in paths.shipped_paths():
        loaded = file.read(path, defaults_of)
        if loaded.table is None or loaded.table.device.same(device):
            yield _source("shipped", path, loaded)
    for path in paths.shipped_paths():
        loaded = file.read(path, defaults_of)
        related = loaded.table is not None and loaded.table.device.kind == device.kind and device.sm is not None
        if related and loaded.table is not None and loaded.table.device.sm == device.sm and not loaded.table.device.same(device):
            yield _source("borrowed", path, loaded)


@functools.lru_cache(maxsize=16)
def sources(machine: Machine) -> tuple[Source, ...]:
    """Every table that may answer for a machine, first come first served."""
    return tuple(_sources(machine))


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
