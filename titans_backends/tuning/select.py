"""Who wins: a pure rule over measurements, so that two runs, and two ranks, agree.

argmin over noise is no rule. The default is replaced only by what is at least 3 % faster, outside the noise; among those within the tie
band of the fastest, a fixed order of simplicity decides. But noise never speaks for more than 5 %: nothing wins whose median is further above the fastest's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from titans_backends.cache.schema import Objective
from titans_backends.offers import Pair

__all__ = ["GAIN", "NOISE", "TIE", "Contender", "Objective", "Selection", "combined", "select"]

GAIN = 0.03
"""What a challenger must save of the default's time."""
TIE = 0.02
"""Medians this close are equal."""
NOISE = 0.05
"""The joint margin makes a tie no wider than this, and protects the default from nothing that gains more."""
_MEMORY_TIE_MIB = 1.0


@dataclass(frozen=True, slots=True)
class Contender:
    """A choice with its numbers. `simplicity` and `order` decide ties, smaller first; the default has the smallest order."""

    pair: Pair
    us: float
    spread: float
    peak_mib: float
    simplicity: int
    order: int

    @property
    def margin_us(self) -> float:
        """The half-width of the median's interval."""
        return self.us * self.spread


@dataclass(frozen=True, slots=True)
class Selection:
    """The winner and the fastest of the others, or neither, with the reason."""

    winner: Contender | None
    runner_up: Contender | None = None
    reason: str = ""


def combined(times: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The sum of medians, each with its spread, and the spread of the sum; the parts vary independently."""
    total = sum(us for us, _ in times)
    return total, math.hypot(*(us * spread for us, spread in times)) / total if total > 0 else 0.0


def select(contenders: Sequence[Contender], objective: Objective = "time", max_memory_mib: float | None = None) -> Selection:
    """The winner among contenders whose first is the default; none where nothing is left or nothing fits the memory."""
    if not contenders:
        return Selection(None, reason="no candidate is left")
    fitting = [c for c in contenders if max_memory_mib is None or c.peak_mib <= max_memory_mib]
    if not fitting:
        least = min(contenders, key=lambda c: (c.peak_mib, c.order))
        reason = f"no candidate stays within {max_memory_mib:g} MiB; the least is {least.pair.label} with {least.peak_mib:.4g} MiB"
        return Selection(None, reason=reason)
    pool = fitting if objective == "time" else _smallest(fitting)
    winner = _fastest(pool)
    others = [c for c in fitting if c is not winner]
    return Selection(winner, min(others, key=lambda c: (c.us, c.order), default=None))


def _smallest(contenders: Sequence[Contender]) -> list[Contender]:
    """Those whose peak is the least, within the tie band or one MiB."""
    least = min(c.peak_mib for c in contenders)
    return [c for c in contenders if c.peak_mib <= max(least * (1 + TIE), least + _MEMORY_TIE_MIB)]


def _fastest(contenders: Sequence[Contender]) -> Contender:
    default = min(contenders, key=lambda c: c.order)
    better = [c for c in contenders if _beats(c, default)]
    if not better:
        return default
    best = min(better, key=lambda c: (c.us, c.order))
    tied = [c for c in better if c.us - best.us <= _tie_us(c, best)]
    return min(tied, key=lambda c: (c.simplicity, c.order))


def _beats(challenger: Contender, default: Contender) -> bool:
    saved, noise = default.us - challenger.us, math.hypot(challenger.margin_us, default.margin_us)
    return saved >= GAIN * default.us and saved > min(noise, NOISE * challenger.us)


def _tie_us(one: Contender, best: Contender) -> float:
    """The tie band, or the joint margin where that is wider, but never so wide that noise hides a real difference."""
    return min(max(TIE * best.us, math.hypot(one.margin_us, best.margin_us)), NOISE * best.us)
