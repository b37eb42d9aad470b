"""How good the tuner is, measured: two fresh tunes of the same buckets, then every candidate of each timed fully, there and between the buckets.

In batches, each of them complete before the next begins. Nothing that a call reads is written: the tunes write files of their own, which are gone
afterwards. Within a budget; what it does not reach is said.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from titans_backends.buckets import Bucket
from titans_backends.machine import Machine, detect
from titans_backends.tables import sources
from titans_backends.tuning.ahead import Limits, Target, compile_ahead, hooked, jobs, processes
from titans_backends.tuning.assess_full import Full, NotMeasured
from titans_backends.tuning.assess_order import in_order, units
from titans_backends.tuning.assess_plan import OPENING, Cost, Costs, Piece, Unit, chosen
from titans_backends.tuning.assess_tunes import Tunes
from titans_backends.tuning.events import CompiledAhead
from titans_backends.tuning.first_use import TIMEOUT_S, FirstUse, first_use
from titans_backends.tuning.host import Host
from titans_backends.tuning.regret import Assessed, Summary, summary
from titans_backends.tuning.request import TuneRequest
from titans_backends.tuning.run import AHEAD_S

__all__ = ["Assessment", "FirstUse", "Progress", "assess"]

Progress = Callable[[str], None]
_FIRST_SHARE, _SHARE, _BATCH_S = 0.5, 0.9, 150.0
"""A batch is to cost so much of what is left at most, and so many seconds: the first, whose costs are a guess, unless it is of one unit; and those after it."""
_AHEAD_SHARE, _TUNE_SHARE, _AGAIN_SHARE = 0.35, 0.4, 0.5
"""Of what is left of the budget a batch's compiling ahead may take so much, then its first tune, then its second at most."""
_CAP_SHARE, _LEAST_CAP_S, _MOST_CAP_S = 1 / 60, 0.4, 6.0
"""The cap of a bucket's full measurement: this share of the budget, and within what."""
_USE_SHARE, _USE_S = 1 / 8, 15.0
"""What is kept of the budget for the first use at the end: this share, so many seconds at most."""

_INTERRUPTED = "it was interrupted"


@dataclass(frozen=True, slots=True)
class Assessment:
    """What came of it. `tune_s`: seconds of each of the two tunes over all batches, of `tuned_buckets` each; `left`: buckets and midpoints that have no
    figures, with reasons; `planned`: how many of each there were; `interrupted`: by Ctrl-C. `refined`: the rows that the first tune made between neighbours
    that chose differently, of `planned_refined`; `midpoints` lie between any two neighbouring rows that there are with them.

    `compiled`: what was compiled side by side before them, midpoints too; None where nothing was, and the first tune compiled what it measured.
    """

    tuned: tuple[Assessed, ...]
    midpoints: tuple[Assessed, ...]
    tune_s: tuple[float, float]
    tuned_buckets: tuple[int, int]
    first_uses: tuple[FirstUse, ...]
    left: tuple[tuple[Bucket, str], ...]
    seconds: float
    compiled: CompiledAhead | None = None
    batches: int = 1
    planned: tuple[int, int] = (0, 0)
    interrupted: bool = False
    refined: tuple[Assessed, ...] = ()
    planned_refined: int = 0

    @property
    def summary(self) -> Summary:
        """Its figures."""
        return summary(self.tuned, self.midpoints, self.refined)


Keep = Callable[[Assessment], None]


def assess(
    request: TuneRequest, budget_s: float | None = None, progress: Progress = lambda said: None, keep: Keep = lambda found: None
) -> Assessment:
    """Assesses the tuner on the request's buckets; `progress` hears what is done next, `keep` what there is after each bucket.

    The request's own file is left alone. Ctrl-C ends it with what there is.
    """
    with tempfile.TemporaryDirectory(prefix="titans_backends_assess_") as folder, Host(request.device) as host:
        machine = detect(request.device)
        full = Full(host, request, machine, Path(folder))
        first, second = (Tunes(name, full.path(name), request) for name in ("first", "second"))
        return _Run(request, budget_s, progress, keep, machine, full, first, second, time.monotonic()).all()


@dataclass(slots=True)
class _Run:
    """One assessment."""

    request: TuneRequest
    budget_s: float | None
    progress: Progress
    keep: Keep
    machine: Machine
    full: Full
    first: Tunes
    second: Tunes
    begun: float
    costs: Costs = field(default_factory=Costs)
    tuned: list[Assessed] = field(default_factory=list)
    between: list[Assessed] = field(default_factory=list)
    refined: list[Assessed] = field(default_factory=list)
    uses: list[FirstUse] = field(default_factory=list)
    failed: dict[Bucket, str] = field(default_factory=dict)
    unused: list[tuple[Bucket, str]] = field(default_factory=list)
    again: set[Bucket] = field(default_factory=set)
    compiled: CompiledAhead | None = None
    batches: int = 0
    starting: float = 0.0

    def all(self) -> Assessment:
        """Batch after batch while there is time for one."""
        why = "the budget ended before its turn"
        try:
            pending = [tuple(map(self._piece, unit)) for unit in units(self.request.buckets)]
            while pending and self._left_s() > 0:
                batch, pending = self._next(pending)
                if not batch:
                    break
                pending = [*self._batch(batch, pending), *pending]
            self._first_use()
        except KeyboardInterrupt:
            why = _INTERRUPTED
        return self._found(why)

    def _found(self, why: str) -> Assessment:
        """What there is; whatever has no figures and no reason of its own has none because of `why`."""
        done = {one.bucket for one in (*self.tuned, *self.between, *self.refined)}
        plan = in_order(self.request.buckets, tuple(self.first.refined))
        left = [(bucket, self._why(bucket, ends) or why) for bucket, ends in (*plan, *self.first.refined.items()) if bucket not in done]
        return Assessment(
            tuple(self.tuned),
            tuple(self.between),
            (self.first.seconds, self.second.seconds),
            (len(self.first.reached), len(self.second.reached)),
            tuple(self.uses),
            (*left, *self.unused),
            time.monotonic() - self.begun,
            self.compiled,
            self.batches,
            (len(self.request.buckets), len(plan) - len(self.request.buckets)),
            why == _INTERRUPTED,
            tuple(self.refined),
            len(self.first.refined),
        )

    def _why(self, bucket: Bucket, ends: tuple[int, int] | None) -> str:
        """Its own reason to have no figures; of a midpoint a neighbour's lack of them too."""
        lost = [length for length in ends or () if bucket._replace(seq_len=length) in self.failed]
        return self.failed.get(bucket, f"its neighbour of seq_len {lost[0]} has no figures" if lost else "")

    def _left_s(self) -> float:
        """Until what is kept for the first use."""
        return self._whole_left_s() - min(_USE_S, _USE_SHARE * (self.budget_s or 0.0))

    def _whole_left_s(self) -> float:
        return math.inf if self.budget_s is None else self.budget_s - (time.monotonic() - self.begun)

    def _work(self, bucket: Bucket) -> int:
        return OPENING + len(self.full.racing(bucket))

    def _piece(self, bucket: Bucket) -> Piece:
        """A bucket with the midpoint below it, where there is one."""
        below = any(other.seq_len < bucket.seq_len for other in self.request.buckets if other[:2] == bucket[:2])
        work = self._work(bucket)
        return Piece(bucket, work, work * (1 + below))

    def _next(self, pending: Sequence[Unit]) -> tuple[list[Unit], list[Unit]]:
        most_s = min(_BATCH_S, self._left_s() * _SHARE)
        room_s = most_s if self.batches else min(_BATCH_S, self._left_s() * _FIRST_SHARE)
        return chosen(pending, self.costs.of, room_s, most_s, some=not self.batches or self.budget_s is None)

    def _batch(self, batch: Sequence[Unit], pending: Sequence[Unit]) -> list[Unit]:
        """Compiles, tunes twice and measures fully; what the tunes did not reach, once more to be taken on."""
        self.batches += 1
        buckets = tuple(piece.bucket for unit in batch for piece in unit)
        ready = self._midpoints({*self.second.reached, *buckets})
        later = sum(map(len, pending))
        self.progress(f"batch {self.batches}: {len(buckets)} buckets, {len(ready)} midpoints; {later} buckets after it")
        with Host(self.request.device) as one, Host(self.request.device) as other:
            hosts = (self.full.host, one, other)
            for host in hosts:
                host.begin()  # they import while others compile, and are there before anything is timed
            self._compile_ahead([*buckets, *(bucket for bucket, _ in ready)])
            begun = time.monotonic()
            for host in hosts:
                host.ready()
            self.starting = time.monotonic() - begun
            asked = self._fitting(batch, self.costs.tuning)
            there = self._tune(self.first, asked, one, _TUNE_SHARE)
            twice = self._fitting([tuple(piece for piece in unit if piece.bucket in there) for unit in batch], self.costs.again)
            self._tune(self.second, twice, other, _AGAIN_SHARE)
            self.costs.start.saw(self.starting, 1)
        for unit in batch:
            for piece in unit:
                if piece.bucket in self.second.reached:
                    self._measure(piece.bucket, None, self.tuned)
            for bucket, neighbours in self._midpoints(one.bucket for one in self.tuned):
                self._measure(bucket, neighbours, self.between)
        self._measure_between()
        return self._unreached(batch, {*twice, *(bucket for bucket in asked if bucket not in there)})

    def _measure_between(self) -> None:
        """The rows that nobody asked for, and the midpoints beside them: after all that was tuned, which says nothing before it is measured."""
        for bucket, neighbours in self._midpoints((*(one.bucket for one in self.tuned), *self.first.refined)):
            self._measure(bucket, neighbours, self.between)
        for bucket, neighbours in self.first.refined.items():
            if bucket not in self.failed and bucket not in {one.bucket for one in self.refined}:
                self._measure(bucket, neighbours, self.refined)

    def _fitting(self, batch: Sequence[Unit], cost: Cost) -> tuple[Bucket, ...]:
        """Those of a batch for which there is time still: it was planned by what things were expected to take, and more is known by now."""
        most_s = self._left_s() * _SHARE
        fits, _ = chosen([unit for unit in batch if unit], cost, most_s, most_s, some=True)
        return tuple(piece.bucket for unit in fits for piece in unit)

    def _unreached(self, batch: Sequence[Unit], asked: set[Bucket]) -> list[Unit]:
        """What the tunes of a batch did not come to, to be taken on again; that for which one was `asked` in vain once more, then it is left with the reason."""
        found = [tuple(p for p in unit if p.bucket not in self.second.reached and p.bucket not in self.failed) for unit in batch]
        missed = [piece.bucket for unit in found for piece in unit if piece.bucket in asked]
        for bucket in missed:
            if bucket in self.again:
                self.failed[bucket] = f"the {'second' if bucket in self.first.reached else 'first'} tune did not reach it"
        self.again |= {*missed}
        return [unit for unit in (tuple(p for p in unit if p.bucket not in self.failed) for unit in found) if unit]

    def _midpoints(self, there: Iterable[Bucket]) -> list[tuple[Bucket, tuple[int, int]]]:
        """Those between two of these that are neighbours, and that have no figures yet."""
        known = {*there}
        done = {*self.failed, *(one.bucket for one in self.between)}
        rows = in_order(self.request.buckets, tuple(self.first.refined))
        plan = [(bucket, ends) for bucket, ends in rows if ends is not None and bucket not in done]
        return [(bucket, ends) for bucket, ends in plan if all(bucket._replace(seq_len=length) in known for length in ends)]

    def _compile_ahead(self, buckets: Sequence[Bucket]) -> None:
        """What the batch is going to run, in one go; what is refused later was compiled for nothing."""
        most = processes()
        work = [(bucket, hooked(self.full.standing(bucket).offers, self.full.racing(bucket))) for bucket in buckets] if most else []
        todo = jobs(work)
        done = None
        if todo:
            self.progress(f"compiling ahead, {len(todo)} candidates")
            limits = Limits(min(AHEAD_S, self._left_s() * _AHEAD_SHARE), self.request.timeout_s)
            done = compile_ahead(todo, Target(self.machine, self.request.device, self.request.heads_of), limits, most)
            self.compiled = done if self.compiled is None else _both(self.compiled, done)
        self.costs.ahead.saw(0.0 if done is None else done.seconds, sum(map(self._work, buckets)))

    def _tune(self, which: Tunes, buckets: tuple[Bucket, ...], host: Host, share: float) -> tuple[Bucket, ...]:
        """A tune that knows nothing of any other, in a process of its own: the buckets that have a row now."""
        self.progress(f"the {which.name} tune, of {len(buckets)} buckets")
        left = self._left_s()
        done = which.run(buckets, host, None if left == math.inf else max(1.0, left * share))
        self.failed |= done.failed
        self.costs.tune.saw(done.seconds - done.start_s, sum(map(self._work, done.there)) / 2)
        self.starting += done.start_s
        return done.there

    def _measure(self, bucket: Bucket, neighbours: tuple[int, int] | None, to: list[Assessed]) -> None:
        """A bucket's full measurement, where there is time for it; `neighbours`: of a length between them, where lookup says what the first tune chose."""
        left, work = self._left_s(), self._work(bucket)
        if left <= 0 or left < self.costs.full.each * work:
            return
        cap_s = _MOST_CAP_S if self.budget_s is None else min(_MOST_CAP_S, max(_LEAST_CAP_S, _CAP_SHARE * self.budget_s))
        what = "" if neighbours is None else ", a midpoint" if to is self.between else ", where two neighbours' choices met"
        self.progress(f"every candidate of {bucket.op} at seq_len {bucket.seq_len}{what}")
        begun = time.monotonic()
        try:
            found = self.full.measured(bucket, neighbours, min(cap_s, left))
        except NotMeasured as error:
            self.failed[bucket] = str(error)
            return
        self.costs.full.saw(time.monotonic() - begun, work)
        to.append(found)
        self.keep(self._found("it was not finished when this was written"))

    def _first_use(self) -> None:
        """A bucket in a fresh process that has the shipped tables alone; where they know none of them, that finds the first tune's file."""
        reached = self.first.reached
        shipped = next((bucket for bucket in reversed(reached) if self._ships(bucket)), None)
        made = [(shipped, None)] if shipped is not None else [(bucket, self.full.path("first")) for bucket in reached[-1:]]
        for bucket, table in made:
            left = self._whole_left_s()
            if left <= 0:
                self.unused.append((bucket, "its first use: the budget ended before its turn"))
                return
            self.progress(f"the first call of {bucket.op} in a fresh process")
            found = first_use(bucket, self.request.device, self.request.heads_of(bucket), table, min(left, TIMEOUT_S))
            if isinstance(found, FirstUse):
                self.uses.append(found)
            else:
                self.unused.append((bucket, f"its first use in a fresh process failed: {found}"))

    def _ships(self, bucket: Bucket) -> bool:
        return any(source.kind == "shipped" and source.table is not None and bucket in source.table.rows for source in sources(self.machine))


def _both(one: CompiledAhead, other: CompiledAhead) -> CompiledAhead:
    """What two batches compiled."""
    most = max(one.processes, other.processes)
    seconds, failed = one.seconds + other.seconds, one.failed + other.failed
    return CompiledAhead(one.candidates + other.candidates, most, seconds, failed, one.reason or other.reason)
