"""How far a stored row still holds: fresh, stale (used, and marked), or ignored; with the sentence and the command that renews it.

cupy and numba-cuda count where the row names one and another is here: a race without them, or the loss of a loser, changes nothing, and a winner that cannot run
is not offered. Another device or schema never comes here: such a file is not read. The driver alone does not make a row stale. Pure: who calls it gathers the
current versions and source hashes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from titans_backends.cache.schema import IF_RACED

if TYPE_CHECKING:
    from titans_backends.cache.schema import Bucket, Entry, Environment
    from titans_backends.cache.timings import Measurement

__all__ = ["Staleness", "grade"]


@dataclass(frozen=True, slots=True)
class Staleness:
    """A grade with its reason; `command` renews the row, and is empty where nothing needs renewing. `options`: those of its words that the bucket does not say."""

    kind: Literal["fresh", "stale", "ignored"]
    reason: str = ""
    command: str = ""
    options: str = ""

    @property
    def usable(self) -> bool:
        """Whether the row may still decide a call."""
        return self.kind != "ignored"

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}. Renew with: {self.command}" if self.command else self.kind


def grade(bucket: Bucket, entry: Entry | Measurement, environment: Environment, current: Environment, current_source: str | None) -> Staleness:
    """The grade of one row; `current_source` is its candidate's source hash today (a pair's joined by "+"), None if it is gone."""
    options = getattr(entry, "tuned_with", "")  # a row's; a measurement serves every objective
    command = f"titans-backends tune --op {bucket.op} --seq-lens {bucket.seq_len}{f' {options}' if options else ''}"
    if current_source is None:
        return Staleness("ignored", f"{entry.label} is no longer there", command, options)
    if current_source != entry.source:
        was = f"source {entry.source}, now {current_source}" if entry.source else f"no source hash stored, now {current_source}"
        return Staleness("ignored", f"{entry.label} has changed since ({was})", command, options)
    versions = [
        ("torch", environment.torch, current.torch),
        ("triton", environment.triton, current.triton),
        ("numba", environment.numba, current.numba),
    ]
    raced = [(name, getattr(environment, name), getattr(current, name)) for name in IF_RACED]
    versions += [(name, was, now) for name, was, now in raced if was is not None and now is not None]
    changed = [f"{name} {was or 'absent'}, now {now or 'absent'}" for name, was, now in versions if was != now]
    if changed:
        return Staleness("stale", f"measured with {'; '.join(changed)}", command, options)
    return Staleness("fresh")
