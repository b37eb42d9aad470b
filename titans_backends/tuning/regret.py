"""How good choices were, from numbers alone: what the tuner chose against what an exhaustive measurement of the same bucket says of every choice.

Pure. The best of many noisy medians is a little too good, so that a regret errs on the high side; `beyond_noise` says which are more than that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from titans_backends.buckets import Bucket
from titans_backends.offers import Pair
from titans_backends.tuning.select import GAIN, NOISE, TIE, Contender

__all__ = ["Assessed", "Choice", "Flip", "Summary", "flip_of", "judged", "summary"]

Within = Literal["same", "tie", "margin", "outside"]


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice by its exhaustive time. `regret`: what it costs over the best, as a share of the best's time."""

    label: str
    us: float
    spread: float
    regret: float
    beyond_noise: bool


@dataclass(frozen=True, slots=True)
class Flip:
    """Two fresh tunes' choices. `within`: why they may differ: a tie, or the margin that a default is replaced by; `cost`: the slower's time over the faster's."""

    within: Within
    cost: float


@dataclass(frozen=True, slots=True)
class Assessed:
    """A bucket measured exhaustively. `choices`: those of the two tunes, or the one that lookup gives between its neighbours `between`."""

    bucket: Bucket
    best: str
    best_us: float
    best_spread: float
    candidates: int
    choices: tuple[Choice, ...]
    flip: Flip | None = None
    between: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """A run's figures; None where nothing was assessed. `worst_beyond_noise`: the worst regret of those that are more than noise, 0 where none is.

    `refined`: rows between neighbours that chose differently, for which two choices raced; they are neither buckets nor midpoints.
    """

    buckets: int
    mean_regret: float | None
    worst_regret: float | None
    worst_beyond_noise: float | None
    flips: int
    flips_outside: int
    worst_flip_cost: float | None
    midpoints: int
    midpoints_within: float | None
    worst_midpoint_regret: float | None
    refined: int = 0
    worst_refined_regret: float | None = None


MIDPOINT_BAND = 0.05
"""The regret at a midpoint that counts as within."""


def judged(pair: Pair, contenders: Mapping[Pair, Contender]) -> Choice | None:
    """A choice against the best of a bucket's contenders; None where it did not pass the exhaustive measurement."""
    chosen = contenders.get(pair)
    if chosen is None:
        return None
    best = min(contenders.values(), key=lambda one: (one.us, one.order))
    noise = math.hypot(chosen.margin_us, best.margin_us)
    regret = chosen.us / best.us - 1
    return Choice(pair.label, chosen.us, chosen.spread, regret, chosen is not best and chosen.us - best.us > noise)


def flip_of(first: Pair, second: Pair, contenders: Mapping[Pair, Contender]) -> Flip | None:
    """What it costs that one tune chose the one and another the other."""
    if first == second:
        return Flip("same", 0.0)
    one, other = contenders.get(first), contenders.get(second)
    if one is None or other is None:
        return None
    fast, slow = sorted((one, other), key=lambda contender: contender.us)
    difference, noise = slow.us - fast.us, math.hypot(fast.margin_us, slow.margin_us)
    within: Within = "outside"
    if difference <= min(max(TIE * fast.us, noise), NOISE * fast.us):
        within = "tie"
    elif 0 in (one.order, other.order) and difference <= GAIN * slow.us + min(noise, NOISE * fast.us):
        within = "margin"
    return Flip(within, slow.us / fast.us - 1)


def summary(tuned: Sequence[Assessed], midpoints: Sequence[Assessed], refined: Sequence[Assessed] = ()) -> Summary:
    """The figures of a run: every choice of every tune counts."""
    regrets = [choice.regret for one in tuned for choice in one.choices]
    flips = [one.flip for one in tuned if one.flip is not None and one.flip.within != "same"]
    between = [choice.regret for one in midpoints for choice in one.choices]
    return Summary(
        buckets=len(tuned),
        mean_regret=sum(regrets) / len(regrets) if regrets else None,
        worst_regret=max(regrets, default=None),
        worst_beyond_noise=max((choice.regret if choice.beyond_noise else 0.0 for one in tuned for choice in one.choices), default=None),
        flips=len(flips),
        flips_outside=sum(flip.within == "outside" for flip in flips),
        worst_flip_cost=max((flip.cost for flip in flips), default=None),
        midpoints=len(between),
        midpoints_within=sum(regret <= MIDPOINT_BAND for regret in between) / len(between) if between else None,
        worst_midpoint_regret=max(between, default=None),
        refined=len(refined),
        worst_refined_regret=max((choice.regret for one in refined for choice in one.choices), default=None),
    )
