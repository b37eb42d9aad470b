"""One row per bucket: who won, by how much over whom, at what share of the floor, and what became of every candidate. Pure functions of facts."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from titans_backends.buckets import Bucket
from titans_backends.cache.schema import Entry
from titans_backends.cache.timings import Measurement
from titans_backends.reporting.facts import Ceilings, Identity, MachineFacts, Measured, Origin, Refusal, State
from titans_backends.reporting.place import Place, place_of
from titans_backends.tuning.select import combined
from titans_backends.tuning.standing import REFERENCE

__all__ = ["EAGER", "Floor", "Row", "Timed", "Tried", "row_of", "rows_of"]

EAGER = "eager"
_NAME = re.compile(r"(?:^|\+ )([\w.-]+)/")


@dataclass(frozen=True, slots=True)
class Timed:
    """One choice with its time: a candidate, or in training a forward with its backward. `backends` are one, or two that differ."""

    label: str
    backends: tuple[str, ...]
    us: float
    spread: float | None = None
    peak_mib: float | None = None

    @property
    def who(self) -> str:
        """For people: `triton`, or `cupy + triton`."""
        return " + ".join(self.backends)


@dataclass(frozen=True, slots=True)
class Tried:
    """What came of one candidate in one direction: its time, or why it has none; the largest error that the gate saw."""

    label: str
    backend: str
    direction: str
    status: str
    us: float | None
    spread: float | None
    peak_mib: float | None
    error: float | None
    reason: str
    saves_states: bool


@dataclass(frozen=True, slots=True)
class Floor:
    """The least time that the machine's ceilings allow, and which of them sets it."""

    us: float
    bound: str


@dataclass(frozen=True, slots=True)
class Row:
    """One bucket. `winner` is the row's, or, where no table has one, the fastest that was timed (`decided` says which).

    `best` holds each backend's fastest, the fastest first, a training pair within one backend; `rival` the fastest of those that are not the
    winner's own; `fastest` is the least median of all, which the rule of choice need not take. Gains are factors: how many times the winner's
    time the other takes. `renew` is the command that measures the bucket again; `tuned_with` the options by which not time alone decided.
    """

    place: Place
    bucket: Bucket
    origin: Origin
    winner: Timed | None
    decided: bool
    best: tuple[Timed, ...]
    fastest: Timed | None
    tried: tuple[Tried, ...]
    default: Timed | None
    default_reason: str
    reference_us: float | None
    floor: Floor | None
    state: State
    refusals: tuple[Refusal, ...]
    renew: str = ""
    tuned_with: str = ""

    @property
    def rival(self) -> Timed | None:
        """The fastest of another backend; of a mixed pair's, the fastest pair within one."""
        return None if self.winner is None else next((one for one in self.best if one.backends != self.winner.backends), None)

    @property
    def over_default(self) -> float | None:
        """What tuning bought; None where no table has decided."""
        return self._factor(self.default) if self.decided else None

    @property
    def kept_default(self) -> bool:
        """Whether the winner is the untuned default."""
        return self.decided and self.winner is not None and self.default is not None and self.winner.label == self.default.label

    @property
    def over_eager(self) -> float | None:
        """Over the fastest candidate of plain torch, which eager launches and `backend="eager"` would run."""
        return self._factor(next((one for one in self.best if one.backends == (EAGER,)), None))

    @property
    def over_rival(self) -> float | None:
        """Over the next backend."""
        return self._factor(self.rival)

    @property
    def behind(self) -> float | None:
        """How many times the least median of the race the winner's is: above 1 where the rule of choice passed a faster one over. None where memory decided."""
        if self.tuned_with:
            return None
        if self.winner is None or self.fastest is None or not self.decided or self.fastest.us <= 0:
            return None
        return max(1.0, self.winner.us / self.fastest.us)

    @property
    def share(self) -> float | None:
        """The floor over the winner's time: 1 is as fast as the ceilings allow."""
        return self.floor.us / self.winner.us if self.floor is not None and self.winner is not None and self.winner.us > 0 else None

    def _factor(self, other: Timed | None) -> float | None:
        return other.us / self.winner.us if other is not None and self.winner is not None and self.winner.us > 0 else None


def rows_of(machine: MachineFacts) -> list[Row]:
    """Every bucket of a machine, sorted by op, setting, size and length."""
    return sorted((row_of(cell, machine.ceilings) for cell in machine.cells), key=_order)


def row_of(cell: Measured, ceilings: Ceilings | None) -> Row:
    """The row of one bucket."""
    measured = [one for one in cell.measurements if one.candidate != REFERENCE]
    training = dict(cell.bucket.when).get("regime") == "training"
    timed = [one for one in measured if one.status == "ok" and one.us is not None]
    choices = _pairs(timed) if training else [_choice([one]) for one in timed]
    best = _best(choices) if measured else _known_of(cell.entry)
    chosen = _winner(cell.entry) if cell.entry is not None else min(choices, key=lambda one: one.us, default=None)
    reference = next((one.us for one in cell.measurements if one.candidate == REFERENCE and one.us is not None), None)
    return Row(
        place=place_of(cell.bucket),
        bucket=cell.bucket,
        origin=cell.origin,
        winner=chosen,
        decided=cell.entry is not None,
        best=tuple(best),
        fastest=min(choices or best, key=lambda one: one.us, default=None),
        tried=tuple(_tried(one) for one in sorted(measured, key=_by_time)),
        default=_named(cell.default, timed),
        default_reason=cell.default_reason,
        reference_us=reference,
        floor=_floor(cell, ceilings),
        state=cell.state,
        refusals=cell.refusals,
        renew=cell.renew,
        tuned_with="" if cell.entry is None else cell.entry.tuned_with,
    )


def _order(row: Row) -> tuple[object, ...]:
    place = row.place
    return (place.op, place.regime, place.launch, place.dtype, place.options, place.streams, place.size, place.seq_len)


def _backends(label: str) -> tuple[str, ...]:
    """The backends that a label names, each once."""
    return tuple(dict.fromkeys(_NAME.findall(label)))


def _choice(members: Sequence[Measurement]) -> Timed:
    label = " + ".join(one.label for one in members)
    us, spread = combined([(one.us or 0.0, one.spread or 0.0) for one in members])
    known = None if any(one.samples == 1 for one in members) else spread
    peaks = [one.peak_mib for one in members if one.peak_mib is not None]
    return Timed(label, _backends(label), us, known, max(peaks, default=None))


def _pairs(timed: Collection[Measurement]) -> list[Timed]:
    """Every forward with every backward that reads what it saves. Each direction is timed once, so a pair's time is their sum."""
    forward = [one for one in timed if one.direction == "forward"]
    backward = [one for one in timed if one.direction == "backward"]
    return [_choice([f, b]) for f in forward for b in backward if (f.saves_states, f.residual) == (b.saves_states, b.residual)]


def _best(choices: Collection[Timed]) -> list[Timed]:
    """The fastest choice within each backend, the fastest first."""
    found: dict[tuple[str, ...], Timed] = {}
    for one in sorted(choices, key=lambda one: (one.us, one.label)):
        if len(one.backends) == 1:
            found.setdefault(one.backends, one)
    return list(found.values())


def _known_of(entry: Entry | None) -> list[Timed]:
    """What a row alone says: the winner and the runner-up, one a backend."""
    if entry is None:
        return []
    second = [] if entry.next is None or entry.next_us is None else [Timed(entry.next, _backends(entry.next), entry.next_us)]
    return _best([_winner(entry), *second])


def _winner(entry: Entry) -> Timed:
    return Timed(entry.label, _backends(entry.label), entry.us, entry.spread, entry.peak_mib)


def _named(identities: tuple[Identity, ...] | None, timed: Collection[Measurement]) -> Timed | None:
    by_identity = {one.identity: one for one in timed}
    if identities is None or any(identity not in by_identity for identity in identities):
        return None
    return _choice([by_identity[identity] for identity in identities])


def _floor(cell: Measured, ceilings: Ceilings | None) -> Floor | None:
    """Bytes at the copy's rate, or products at the dtype's, whichever takes longer."""
    if cell.work is None or ceilings is None or ceilings.copy is None:
        return None
    given = dict(cell.bucket.when)
    rate = ceilings.flop_per_s(str(given.get("dtype")), str(given.get("float32", "highest")))
    if rate is None:
        return None
    us = cell.work.floor_us(rate, ceilings.copy)
    return Floor(us, "bytes" if cell.work.bytes / ceilings.copy >= cell.work.flop / rate else "products")


def _tried(one: Measurement) -> Tried:
    worst = max((error for _, error in one.errors if math.isfinite(error)), default=None)
    if any(not math.isfinite(error) for _, error in one.errors):
        worst = math.inf
    backend = one.candidate.partition("/")[0]
    us, spread = (one.us, one.spread) if one.status == "ok" else (None, None)
    spread = None if one.samples == 1 else spread  # one run has no spread
    return Tried(one.label, backend, one.direction, one.status, us, spread, one.peak_mib, worst, one.reason, one.saves_states)


def _by_time(one: Measurement) -> tuple[object, ...]:
    return one.direction != "forward", one.status != "ok", one.us if one.us is not None else math.inf, one.label
