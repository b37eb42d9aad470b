"""What is to be said about the cache files that a machine would read: there or not, sound or not, and which rows no longer hold. Touches nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from titans_backends import switches
from titans_backends.buckets import defaults_of
from titans_backends.cache import file, paths
from titans_backends.cache.schema import device_of
from titans_backends.cli.row_state import Renewal, renewals, row_state
from titans_backends.machine import Machine
from titans_backends.reporting import numbers
from titans_backends.tables import shipped_paths

__all__ = ["CacheReport", "check_caches"]


@dataclass(frozen=True, slots=True)
class CacheReport:
    """One file: its rows, or the problem, without the path; what its modes allow; rows to renew; damaged copies that were set aside beside it."""

    kind: str
    path: Path
    exists: bool
    rows: int
    problem: str
    writable: bool
    world_writable: bool
    renewals: tuple[Renewal, ...]
    damaged: tuple[Path, ...]

    @property
    def described(self) -> str:
        """One sentence."""
        if self.problem:
            return self.problem
        if not self.exists:
            return "there is no such file"
        worn = sum(one.rows for one in self.renewals)
        return numbers.amount(self.rows, "row") + (f", {worn} of them stale or ignored" if worn else "") + ("" if self.writable else ", read-only")


def check_caches(machine: Machine) -> Iterator[CacheReport]:
    """The files in the order in which a call asks them."""
    named = switches.current().cache
    if named is not None:
        yield _report(f"{switches.PREFIX}CACHE", named, machine)
    yield _report("user cache", paths.user_cache_path(machine.slug), machine)
    for owner, path in shipped_paths():
        found = file.read(path, defaults_of).table
        if found is None or found.device.same(device_of(machine)):
            yield _report(f"backend {owner}" if owner else "shipped", path, machine)


def _report(kind: str, path: Path, machine: Machine) -> CacheReport:
    loaded = file.read(path, defaults_of, device_of(machine))
    beside = paths.timings_path(path)
    timings = file.read_timings(beside, defaults_of, device_of(machine))
    problems = [told for told in (loaded.reason, timings.reason and f"its timings {beside.name}, {timings.reason}") if told]
    rows = {} if loaded.table is None else loaded.table.rows
    states = {bucket: row_state(machine, loaded.table, bucket, entry) for bucket, entry in rows.items()} if loaded.table is not None else {}
    damaged = file.set_aside(path, beside)
    return CacheReport(
        kind,
        path,
        path.exists(),
        len(rows),
        "; ".join(problems),
        loaded.writable,
        loaded.world_writable or timings.world_writable,
        tuple(renewals(states)),
        tuple(damaged),
    )
