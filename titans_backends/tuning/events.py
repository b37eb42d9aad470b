"""What the tuner says while it works, as values: the command line turns them into a progress bar, tests compare them.

Every tune begins with one `Planned`, after which any number of `Unpaired` and one `CompiledAhead` may come; then each bucket is `Skipped` (nothing to measure), or
`BucketStarted`, any number of `CandidateDone` and one `BucketDone` or `BucketFailed`; where the budget ended first, one `Remaining` closes it. Otherwise one
`Refining` may follow, and the same for each of its buckets, which nobody asked for; where the budget ended among them, one `Unrefined` closes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from titans_backends.buckets import Bucket
from titans_backends.cache.schema import Entry

__all__ = [
    "BackendProbed",
    "BucketDone",
    "BucketFailed",
    "BucketStarted",
    "CandidateDone",
    "CompiledAhead",
    "Event",
    "OnEvent",
    "Planned",
    "Refining",
    "Remaining",
    "Skipped",
    "Unpaired",
    "Unrefined",
    "ignore",
]


@dataclass(frozen=True, slots=True)
class Planned:
    """How many buckets there are, and how many of them have to be measured."""

    total: int
    to_measure: int


@dataclass(frozen=True, slots=True)
class Unpaired:
    """A candidate that is in no pair and so does not race: the other direction names its residual otherwise. Told once, however many buckets have it."""

    op: str
    label: str
    direction: Literal["forward", "backward"]
    reason: str


@dataclass(frozen=True, slots=True)
class CompiledAhead:
    """What is to be measured was compiled side by side: how many candidates over all buckets, and in how many processes.

    `failed` of them were not, the first for `reason`: no verdict, each is compiled again where it is measured.
    """

    candidates: int
    processes: int
    seconds: float
    failed: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class BackendProbed:
    """A backend ran its smallest case in the child process, once per tune; only a usable or importable one races."""

    backend: str
    state: Literal["usable", "importable", "refused", "broken"]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class BucketStarted:
    """A bucket begins: its place among the planned ones (from 0), the labels that will be timed, and each backend's refusal."""

    bucket: Bucket
    index: int
    candidates: tuple[str, ...]
    refusals: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class CandidateDone:
    """One candidate's result in the bucket at hand: ok with its time, or failed or refused with the reason."""

    bucket: Bucket
    label: str
    direction: Literal["forward", "backward"]
    status: Literal["ok", "failed", "refused"]
    detail: str = ""
    us: float | None = None
    spread: float | None = None


@dataclass(frozen=True, slots=True)
class BucketDone:
    """A bucket's row is written. `default_us`: the untuned default's time; `reference_us`: the contract's plain reference, where it was timed."""

    bucket: Bucket
    entry: Entry
    default_us: float | None
    reference_us: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class BucketFailed:
    """A bucket ends without a row: no candidate is left, or its inputs could not be made."""

    bucket: Bucket
    reason: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Skipped:
    """A bucket whose row and measurements are all current."""

    bucket: Bucket
    entry: Entry
    default_us: float | None = None
    reference_us: float | None = None


@dataclass(frozen=True, slots=True)
class Remaining:
    """What the budget did not reach."""

    buckets: tuple[Bucket, ...]


@dataclass(frozen=True, slots=True)
class Refining:
    """Everything asked for has been seen to; the midpoints of neighbours that chose differently follow, where the two choices alone race."""

    buckets: tuple[Bucket, ...]


@dataclass(frozen=True, slots=True)
class Unrefined:
    """The midpoints that the budget did not reach."""

    buckets: tuple[Bucket, ...]


Told = Planned | Unpaired | CompiledAhead | BackendProbed | Remaining | Refining | Unrefined
Event = Told | BucketStarted | CandidateDone | BucketDone | BucketFailed | Skipped
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Says nothing."""
