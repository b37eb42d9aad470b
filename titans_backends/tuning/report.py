"""What came of a tune: a row for each bucket, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from titans_backends.buckets import Bucket
from titans_backends.cache.schema import Entry

__all__ = ["Row", "TuneInterrupted", "TuneReport"]


@dataclass(frozen=True, slots=True)
class Row:
    """One bucket of a report: its entry (None where it has none, with the reason), and what there is to compare it with."""

    bucket: Bucket
    entry: Entry | None
    default_us: float | None = None
    reference_us: float | None = None
    measured: bool = False
    reason: str = ""


@dataclass(frozen=True, slots=True)
class TuneReport:
    """What came of a tune, in the order of the request; `path` is the file that holds the rows, `remaining` what the budget did not reach."""

    path: Path
    rows: tuple[Row, ...]
    remaining: tuple[Bucket, ...]
    seconds: float

    @property
    def complete(self) -> bool:
        """Whether every planned bucket has a row: exit status 0."""
        return not self.remaining and all(row.entry is not None for row in self.rows)

    @property
    def nothing_to_do(self) -> bool:
        """Whether everything was current already."""
        return self.complete and not any(row.measured for row in self.rows)


class TuneInterrupted(KeyboardInterrupt):
    """Ctrl-C during a tune: the child is gone, every finished bucket is in the file and in `report`."""

    def __init__(self, report: TuneReport) -> None:
        super().__init__("tuning was interrupted; every finished bucket is kept")
        self.report = report
