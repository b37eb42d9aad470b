"""One of an assessment's two fresh tunes, batch after batch: into a file of its own, by a process of its own in each."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from titans_backends.buckets import Bucket
from titans_backends.tuning.events import BucketStarted, Event
from titans_backends.tuning.host import Host
from titans_backends.tuning.report import TuneInterrupted, TuneReport
from titans_backends.tuning.request import TuneRequest
from titans_backends.tuning.run import tune

__all__ = ["Done", "Tunes"]


@dataclass(frozen=True, slots=True)
class Done:
    """A batch's tune. `there`: the buckets that have a row; `failed`: why others have none; `start_s`: the seconds before its first bucket began."""

    there: tuple[Bucket, ...]
    failed: Mapping[Bucket, str]
    seconds: float
    start_s: float


@dataclass(slots=True)
class Tunes:
    """Its file, what it took and reached so far, and the rows between neighbours that it made beside.

    The file holds what the batches before wrote, of other buckets: a tune reads nothing but its own.
    """

    name: str
    path: Path
    request: TuneRequest
    seconds: float = 0.0
    reached: list[Bucket] = field(default_factory=list)
    refined: dict[Bucket, tuple[int, int]] = field(default_factory=dict)

    def run(self, buckets: tuple[Bucket, ...], host: Host, budget_s: float | None) -> Done:
        """Tunes these by the rules that `tune` has; TuneInterrupted at Ctrl-C."""
        begun, started = time.monotonic(), list[float]()

        def heard(event: Event) -> None:
            if isinstance(event, BucketStarted):
                started.append(time.monotonic() - begun)

        asked = replace(self.request, buckets=buckets, output=self.path, force=False, budget_s=budget_s, ahead=False, beside=tuple(self.reached))
        try:
            report = tune(asked, heard, host)
        except TuneInterrupted as stop:
            self._count(stop.report)
            raise
        self._count(report)
        there = tuple(row.bucket for row in report.rows if row.entry is not None)
        failed = {row.bucket: f"the {self.name} tune found no winner: {row.reason}" for row in report.rows if row.entry is None}
        return Done(there, failed, report.seconds, started[0] if started else 0.0)

    def _count(self, report: TuneReport) -> None:
        self.seconds += report.seconds
        self.refined |= {row.bucket: row.between for row in report.midpoints if row.entry is not None and row.between is not None}
        self.reached += [row.bucket for row in report.rows if row.entry is not None and row.bucket not in self.reached]
