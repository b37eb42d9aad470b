"""What `tune` shows while it measures: a bar with the time left on a terminal, plain lines elsewhere. Everything goes to stderr.

It only reads the tuner's events; nothing here decides or waits.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from titans_backends.cli.keys import place
from titans_backends.reporting import numbers
from titans_backends.tuning.events import (
    BackendProbed,
    BucketDone,
    BucketFailed,
    BucketStarted,
    CandidateDone,
    CompiledAhead,
    Event,
    OnEvent,
    Planned,
    Refining,
    Remaining,
    Skipped,
    Unpaired,
    Unrefined,
)

__all__ = ["Estimate", "showing"]


@dataclass(slots=True)
class Estimate:
    """How far a tune is, and the time left at the pace so far; `now` is a clock in seconds."""

    now: Callable[[], float]
    to_measure: int = 0
    done: float = 0.0
    _start: float = field(init=False)

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Counts from now: what came before says nothing about the pace."""
        self._start = self.now()

    @property
    def left_s(self) -> float | None:
        """None before there is anything to judge by."""
        if self.done <= 0 or not self.to_measure:
            return None
        return max(0.0, (self.now() - self._start) / self.done * (self.to_measure - self.done))

    @property
    def left(self) -> str:
        """For people; empty while nothing is known."""
        wait = self.left_s
        return "" if wait is None else f"about {numbers.seconds(wait)} left"


@contextlib.contextmanager
def showing(to: Console) -> Iterator[OnEvent]:
    """A listener for the tuner's events, for as long as the tune lasts."""
    if not to.is_terminal:
        yield _Lines(to).on_event
        return
    estimate = Estimate(time.monotonic)
    described = TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
    bar = Progress(
        SpinnerColumn(), BarColumn(bar_width=12), MofNCompleteColumn(), _Left(estimate), described, console=to, transient=True, expand=True
    )
    with bar:
        yield _Bar(bar, estimate).on_event


class _Left(ProgressColumn):
    """The time left."""

    def __init__(self, estimate: Estimate) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._estimate = estimate

    def render(self, task: Task) -> Text:
        return Text(self._estimate.left or "estimating", style="cyan")


class _Lines:
    """One line per finished bucket."""

    def __init__(self, to: Console) -> None:
        self._to = to
        self._estimate = Estimate(time.monotonic)

    def on_event(self, event: Event) -> None:
        """Prints what is worth a line."""
        estimate = self._estimate
        if isinstance(event, Planned):
            estimate.to_measure = event.to_measure
        if isinstance(event, Refining):
            estimate.to_measure += len(event.buckets)
        if isinstance(event, CompiledAhead):
            estimate.begin()
        if isinstance(event, (BucketDone, BucketFailed)):
            estimate.done += 1
        line = finished_line(event)
        if line is not None:
            left = f"  ({estimate.left})" if isinstance(event, (BucketDone, BucketFailed)) and estimate.done < estimate.to_measure else ""
            counted = f"[{estimate.done:.0f}/{estimate.to_measure}] " if isinstance(event, (BucketDone, BucketFailed)) else ""
            self._to.print(Text(counted) + line + Text(left), soft_wrap=True)


class _Bar:
    """Finished buckets above, the bar below."""

    def __init__(self, bar: Progress, estimate: Estimate) -> None:
        self._bar, self._estimate = bar, estimate
        self._task = bar.add_task("", total=None)
        self._finished = 0
        self._expected, self._seen = 1, 0

    def on_event(self, event: Event) -> None:
        """Moves the bar by whole buckets; the estimate counts a bucket's candidates too."""
        line = finished_line(event)
        if line is not None:
            self._bar.console.print(line, overflow="fold")
        if isinstance(event, Planned):
            self._estimate.to_measure = event.to_measure
            self._bar.update(self._task, total=event.to_measure, description="preparing" if event.to_measure else "")
        elif isinstance(event, Refining):
            self._estimate.to_measure += len(event.buckets)
            self._bar.update(self._task, total=self._estimate.to_measure)
        elif isinstance(event, CompiledAhead):
            self._estimate.begin()
        elif isinstance(event, BucketStarted):
            self._expected, self._seen = max(1, len(event.candidates)), 0
            self._bar.update(self._task, description=place(event.bucket))
        elif isinstance(event, CandidateDone):
            self._seen += 1
            self._estimate.done = self._finished + min(0.9, self._seen / self._expected)
            self._bar.update(self._task, description=f"{event.bucket.op} {event.bucket.seq_len} · {event.label}")
        elif isinstance(event, (BucketDone, BucketFailed)):
            self._finished += 1
            self._estimate.done = self._finished
            self._bar.update(self._task, completed=self._finished)


def finished_line(event: Event) -> Text | None:
    """The line of an event that is worth one: a finished bucket, a candidate that was wrong, a backend that is not usable."""
    if isinstance(event, BucketDone):
        return Text.assemble(
            ("✓ ", "green"), place(event.bucket), ": ", (event.entry.label, "green"), f" {numbers.time_us(event.entry.us)}",
            _gain(event), (_doubt(event), "yellow"), (f"  in {numbers.seconds(event.seconds)}", "dim"),
        )  # fmt: skip
    if isinstance(event, BucketFailed):
        return Text.assemble(("✗ ", "red"), place(event.bucket), f": {event.reason}")
    if isinstance(event, CandidateDone) and event.status == "failed":
        return Text.assemble(("! ", "yellow"), f"{event.bucket.op} {event.bucket.seq_len}: {event.label} ({event.direction}) failed: {event.detail}")
    if isinstance(event, CompiledAhead):
        done = f"compiled {_counted(event.candidates, 'candidate')} ahead in {_counted(event.processes, 'process')}, {numbers.seconds(event.seconds)}"
        return Text(f"{done}; {event.failed} not: {event.reason}" if event.failed else done, style="dim")
    if isinstance(event, Unpaired):
        return Text.assemble(("! ", "yellow"), f"{event.op}: {event.label} ({event.direction}) does not race: {event.reason}")
    if isinstance(event, BackendProbed) and event.state in ("broken", "refused"):
        return Text.assemble(("! ", "yellow"), f"backend {event.backend} is {event.state}: {event.reason}")
    if isinstance(event, Refining):
        return Text(
            f"{numbers.amount(len(event.buckets), 'midpoint')} of neighbours that chose differently, or whose row there holds no longer: their choices alone meet there",
            style="dim",
        )
    if isinstance(event, (BackendProbed, BucketStarted, CandidateDone, Planned, Remaining, Skipped, Unrefined)):
        return None
    raise TypeError(f"unknown event {event!r}")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


def _doubt(event: BucketDone) -> str:
    doubt = event.entry.doubt
    return f"; noise: another may save up to {numbers.percent(doubt)}" if doubt is not None else ""


def _gain(event: BucketDone) -> str:
    over = numbers.gain(event.default_us, event.entry.us)
    return f", {over} the default" if over not in ("", "1.00×") else ""
