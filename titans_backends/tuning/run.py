"""Tunes: decides what has to be measured, has it measured in a child process, and writes every bucket as soon as it is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from titans_backends.buckets import Bucket
from titans_backends.cache.schema import Entry
from titans_backends.contracts.contract import Call, Contract
from titans_backends.signature import Signature
from titans_backends.tuning.events import OnEvent, ignore

__all__ = ["TuneInterrupted", "TuneReport", "TuneRequest", "tune", "tune_call"]


@dataclass(frozen=True, slots=True)
class TuneRequest:
    """What to tune. `buckets` come from `plan.plan`.

    `backends` limits the race (None: all; with `quick` those whose manifest says quick). `budget_s` limits the whole, `bucket_s` one
    bucket's timing, `timeout_s` one candidate's compilation and check. `output` names another file than the user's cache.
    `force` measures what is current too.
    """

    buckets: tuple[Bucket, ...]
    device: str = "cpu"
    quick: bool = True
    backends: tuple[str, ...] | None = None
    objective: Literal["time", "memory"] = "time"
    max_memory_mib: float | None = None
    budget_s: float | None = None
    bucket_s: float | None = None
    timeout_s: float = 60.0
    output: Path | None = None
    force: bool = False
    heads: int | None = None


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


def tune(request: TuneRequest, on_event: OnEvent = ignore) -> TuneReport:
    """Measures what is not current and writes it. CacheError before anything is measured where the file cannot be written."""
    raise NotImplementedError


def tune_call(contract: Contract, call: Call, signature: Signature, budget_s: float, on_event: OnEvent = ignore) -> TuneReport:
    """Tunes the one bucket of a call, for `with titans_backends.autotune():`."""
    raise NotImplementedError
