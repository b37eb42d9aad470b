"""How many buckets an assessment takes on at a time: what a batch is going to cost, by what the ones before it took, and whom there is room for.

Pure. Depth goes before breadth: a bucket that is tuned and never measured fully says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from titans_backends.buckets import Bucket

__all__ = ["OPENING", "Cost", "Costs", "Piece", "Rate", "Unit", "chosen"]

OPENING = 6
"""A bucket's inputs, its references and what is asked once count as so many candidates."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A bucket with its work, in candidates: `tuned` in each of the two tunes, `timed` in the compiling and the full measurement, its midpoint's too."""

    bucket: Bucket
    tuned: int
    timed: int


Unit = tuple[Piece, ...]
"""Neighbouring lengths of one key, which are taken on together so that the midpoint between them can be measured."""


@dataclass(slots=True)
class Rate:
    """Seconds for one piece of work: what was expected until some was seen."""

    expected: float
    seconds: float = 0.0
    work: float = 0.0

    @property
    def each(self) -> float:
        """The mean of what was seen."""
        return self.seconds / self.work if self.work else self.expected

    def saw(self, seconds: float, work: float) -> None:
        """Some was done."""
        self.seconds, self.work = self.seconds + max(0.0, seconds), self.work + work


@dataclass(slots=True)
class Costs:
    """What a batch costs. `start`: the processes of one batch; `ahead`, `tune` (both tunes) and `full` for a candidate. Expected is what an H100's host took."""

    start: Rate = field(default_factory=lambda: Rate(12.0))
    ahead: Rate = field(default_factory=lambda: Rate(0.045))
    tune: Rate = field(default_factory=lambda: Rate(0.2))
    full: Rate = field(default_factory=lambda: Rate(0.13))

    def of(self, units: Sequence[Unit]) -> float:
        """The seconds of a batch of these."""
        return self.start.each + self.ahead.each * sum(piece.timed for unit in units for piece in unit) + self.tuning(units)

    def tuning(self, units: Sequence[Unit]) -> float:
        """What they cost once the processes are there."""
        return self.tune.each / 2 * sum(piece.tuned for unit in units for piece in unit) + self.again(units)

    def again(self, units: Sequence[Unit]) -> float:
        """What they cost after the first tune."""
        pieces = [piece for unit in units for piece in unit]
        return self.tune.each / 2 * sum(piece.tuned for piece in pieces) + self.full.each * sum(piece.timed for piece in pieces)


Cost = Callable[[Sequence[Unit]], float]


def chosen(pending: Sequence[Unit], cost: Cost, room_s: float, most_s: float, *, some: bool) -> tuple[list[Unit], list[Unit]]:
    """The units that fit into `room_s`, in their order, and the rest.

    The first may take up to `most_s`, and where it does not fit whole its first buckets are taken on; `some`: one of them at least, fit or not.
    """
    taken, rest = list[Unit](), list[Unit]()

    def fitting(unit: Unit) -> int:
        if taken:
            return len(unit) if cost([*taken, unit]) <= room_s else 0
        return next((n for n in range(len(unit), 0, -1) if cost([unit[:n]]) <= most_s), int(some))

    for unit in pending:
        count = fitting(unit)
        taken += [unit[:count]] if count else []
        rest += [unit[count:]] if count < len(unit) else []
    return taken, rest
