"""What came of a tune: a row for each bucket, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from titans_backends.buckets import Bucket
from titans_backends.cache.schema import Entry

__all__ = ["Row", "TuneInterrupted", "TuneReport"]


@dataclass(frozen=True, slots=True)
class Row:
    """One bucket of a report: its entry (None where it has none, with the reason), and what there is to compare it with.

    `choices`: how many passed and were chosen among. `between`: of a midpoint, the two lengths whose choices alone raced there.
    """

    bucket: Bucket
    entry: Entry | None
    default_us: float | None = None
    reference_us: float | None = None
    measured: bool = False
    reason: str = ""
    choices: int = 0
    between: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class TuneReport:
    """What came of a tune, in the order of the request; `path` is the file that holds the rows, `remaining` what the budget did not reach.

    `midpoints` are rows that nobody asked for, between neighbours that chose differently; `unrefined` are those that the budget did not reach.
    """

    path: Path
    rows: tuple[Row, ...]
    remaining: tuple[Bucket, ...]
    seconds: float
    midpoints: tuple[Row, ...] = ()
    unrefined: tuple[Bucket, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every planned bucket has a row: exit status 0."""
        return not self.remaining and all(row.entry is not None for row in self.rows)

    @property
    def nothing_to_do(self) -> bool:
        """Whether everything was current already."""
        return self.complete and not self.unrefined and not any(row.measured for row in self.rows) and not self.midpoints


class TuneInterrupted(KeyboardInterrupt):
    """Ctrl-C during a tune: the child is gone, every finished bucket is in the file and in `report`."""

    def __init__(self, report: TuneReport) -> None:
        super().__init__("tuning was interrupted; every finished bucket is kept")
        self.report = report
