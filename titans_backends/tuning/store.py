"""The two cache files as the tuner uses them: what they say about a bucket, and writing a finished one at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from titans_backends import registry
from titans_backends.buckets import Bucket, defaults_of
from titans_backends.cache import file
from titans_backends.cache.environment import current_environment
from titans_backends.cache.file import CacheError
from titans_backends.cache.paths import timings_path, user_cache_path
from titans_backends.cache.schema import Device, Entry, Environment, Table, device_of
from titans_backends.cache.staleness import grade
from titans_backends.cache.timings import Measurement, Timings
from titans_backends.machine import Machine
from titans_backends.verdict import Verdict

__all__ = ["Store"]


@dataclass(slots=True)
class Store:
    """One table with its timings, and the versions that a measurement taken now has."""

    path: Path
    device: Device
    environment: Environment
    table: Table | None
    timings: Timings | None

    @classmethod
    def opened(cls, machine: Machine, output: Path | None) -> Store:
        """The files as they are; damaged ones are set aside by the first write."""
        path, device = output if output is not None else user_cache_path(machine.slug), device_of(machine)
        table = file.read(path, defaults_of, device).table
        timings = file.read_timings(timings_path(path), defaults_of, device).table
        return cls(path, device, current_environment(machine.kind), table, timings)

    def is_writable(self) -> Verdict:
        """Whether the rows, and the timings beside them, may be written, with every reason against it."""
        return file.check_writable(self.path, device=self.device, defaults_of=defaults_of)

    def require_writable(self) -> None:
        """CacheError with every reason where a write of the rows, or of the timings beside them, would be refused."""
        verdict = self.is_writable()
        if not verdict:
            raise CacheError(f"tune: the result could not be written: {verdict}")

    def entry(self, bucket: Bucket) -> Entry | None:
        """A bucket's row, whatever its age."""
        return None if self.table is None else self.table.rows.get(bucket)

    def fresh(self, bucket: Bucket, source: str | None) -> bool:
        """Whether a bucket has a row that needs no renewal; `source` is its winner's hash today."""
        entry = self.entry(bucket)
        if entry is None or self.table is None:
            return False
        return grade(bucket, entry, self.table.environment(entry), self.environment, source).kind == "fresh"

    def measurements(self, bucket: Bucket) -> tuple[Measurement, ...]:
        """A bucket's measurements, those of other versions left out."""
        if self.timings is None:
            return ()
        found = self.timings.rows.get(bucket, ())
        return tuple(one for one in found if grade(bucket, one, self.timings.environment(one), self.environment, one.source).kind == "fresh")

    def write(self, bucket: Bucket, measurements: Sequence[Measurement], entries: Mapping[Bucket, Entry]) -> None:
        """The measurements first, so that a kill in between costs no measuring."""
        raced = measurements or (() if self.timings is None else self.timings.rows.get(bucket, ()))
        common = {"device": self.device, "environment": self.environment.of_race(_packages(raced)), "defaults_of": defaults_of}
        if measurements:
            self.timings = file.update_timings(timings_path(self.path), changes={bucket: measurements}, **common)  # type: ignore[arg-type]
        if entries:
            self.table = file.update(self.path, changes=entries, **common)  # type: ignore[arg-type]

    def switch(self, changes: Mapping[Bucket, tuple[int, int] | None]) -> None:
        """Writes up to where rows speak towards their longer neighbours; not where another process has changed one of the two since."""
        known = {} if self.table is None else self.table.rows

        def changed(table: Table) -> Table:
            same = {bucket for bucket, entry in table.rows.items() if known.get(bucket) == entry}
            wanted = {b: until for b, until in changes.items() if b in same and (until is None or b._replace(seq_len=until[0]) in same)}
            return replace(table, rows={b: replace(e, until=wanted[b]) if b in wanted else e for b, e in table.rows.items()})

        self.table = file.edit(self.path, changed, device=self.device, defaults_of=defaults_of)


def _packages(raced: Sequence[Measurement]) -> frozenset[str]:
    """What the backends of a race need; one that was refused did not run."""
    known = registry.known()
    names = {one.candidate.partition("/")[0] for one in raced if one.status != "refused"}
    return frozenset(package for name in names if name in known for package in known[name].requires)
