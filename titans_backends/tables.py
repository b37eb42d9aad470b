"""The tuned tables in the order in which they are asked, each loaded once: a named file, the user's, the shipped, a relative's.

Says which files there are and what is wrong with them; which row answers is `cache.lookup`'s to say, what to do with it dispatch's.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from titans_backends import switches
from titans_backends.buckets import defaults_of
from titans_backends.cache import file, paths
from titans_backends.cache.schema import Environment, Table, device_of
from titans_backends.machine import Machine

__all__ = ["Source", "current_environment", "invalidate", "sources"]

SourceKind = Literal["named", "user", "shipped", "borrowed"]


@dataclass(frozen=True, slots=True)
class Source:
    """One file: its table, or why it is not used. borrowed: the shipped table of another device of the same architecture."""

    kind: SourceKind
    path: Path
    table: Table | None
    problem: str = ""
    world_writable: bool = False

    @property
    def described(self) -> str:
        """For people: which of the places this is, and where."""
        names = {"named": f"{switches.PREFIX}CACHE", "user": "user cache", "shipped": "shipped table", "borrowed": "borrowed table"}
        return f"{names[self.kind]} {self.path}"


def _source(kind: SourceKind, path: Path, loaded: file.Loaded[Table]) -> Source:
    problem = loaded.problem.message if loaded.problem is not None else "" if loaded.table is not None else "there is no such file"
    return Source(kind, path, loaded.table, problem, loaded.world_writable)


def _sources(machine: Machine) -> Iterator[Source]:
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
    shipped = [(path, file.read(path, defaults_of)) for path in paths.shipped_paths()]
    for path, loaded in shipped:
        if loaded.table is None or loaded.table.device.same(device):
            yield _source("shipped", path, loaded)
    for path, loaded in shipped:
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


def invalidate() -> None:
    """Forgets the loaded tables, so that the next miss reads them again."""
    sources.cache_clear()
    current_environment.cache_clear()
