"""What a bucket's measurements leave open: who may be faster than the choice by more than noise is allowed to decide, and the race that settles it.

Where the intervals of two medians leave room for a gain of more than 5 %, the choice was noise's. Those candidates, the choice and the default meet once
more, in more rounds and without early drops. What is open after that is written into the row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from titans_backends.backend import Candidate
from titans_backends.buckets import Bucket, field
from titans_backends.machine import Machine
from titans_backends.offers import offers
from titans_backends.tuning.problem import signature_of_bucket
from titans_backends.tuning.select import NOISE, Contender, Objective
from titans_backends.tuning.standing import Standing, is_training, members
from titans_backends.tuning.store import Store
from titans_backends.tuning.timing import RaceRules

__all__ = ["Doubt", "affordable", "contested", "deciding", "doubt_of", "doubtful", "room"]

LEAST_ROUNDS = 15
"""Fewer rounds than this decide nothing that the first race did not."""


@dataclass(frozen=True, slots=True)
class Doubt:
    """The choice and those whom the noise leaves room beside it, the widest first. `share`: of the choice's time that the first of them may save."""

    chosen: Contender
    rivals: tuple[Contender, ...]
    share: float


def room(chosen: Contender, other: Contender) -> float:
    """The share of the choice's time that another may save: by the medians, and as far as both intervals go; at most all of it."""
    return min(1.0, (chosen.us - other.us + math.hypot(chosen.margin_us, other.margin_us)) / chosen.us) if chosen.us > 0 else 0.0


def doubt_of(standing: Standing, objective: Objective = "time", max_memory_mib: float | None = None, *, without_states: bool = False) -> Doubt | None:
    """What is open about a selection; None where nothing won, where nobody may save more than 5 %, or where time is not what decides."""
    chosen = standing.select(objective, max_memory_mib, without_states=without_states).winner
    if chosen is None or objective != "time":
        return None
    found = [
        (room(chosen, other), other)
        for other in standing.contenders()
        if other.pair != chosen.pair
        and not (without_states and other.pair.forward.saves_states)
        and (max_memory_mib is None or other.peak_mib <= max_memory_mib)
    ]
    rivals = sorted(((share, other) for share, other in found if share > NOISE), key=lambda one: (-one[0], one[1].order))
    return Doubt(chosen, tuple(other for _, other in rivals), rivals[0][0]) if rivals else None


def contested(standing: Standing, objective: Objective = "time", max_memory_mib: float | None = None) -> list[Candidate]:
    """Whom to race again, in the order of the offers: the choices of the bucket's rows, their rivals and the default; nobody where nothing is open."""
    plains = (False, True) if is_training(standing.bucket) else (False,)
    doubts = [found for plain in plains if (found := doubt_of(standing, objective, max_memory_mib, without_states=plain)) is not None]
    if not doubts:
        return []
    default = [pair for pair in standing.pairs[:1] if standing.ok(pair)]
    pairs = [*default, *(one.pair for found in doubts for one in (found.chosen, *found.rivals))]
    meeting = {candidate for pair in pairs for candidate in members(pair)}
    return [candidate for candidate in standing.candidates if candidate in meeting]


def affordable(standing: Standing, group: Sequence[Candidate], budget_s: float) -> list[Candidate]:
    """Of the contested of one direction the fastest, as many as have time for rounds enough; nobody where they are fewer than two."""
    kept, round_us = list[Candidate](), 0.0
    for candidate in sorted(group, key=lambda one: standing.current[one].us or 0.0):
        round_us += standing.current[candidate].us or 0.0
        if round_us * LEAST_ROUNDS > 1e6 * budget_s:
            break
        kept.append(candidate)
    return [candidate for candidate in group if candidate in kept] if len(kept) > 1 else []


def deciding(rules: RaceRules) -> RaceRules:
    """The rules of the race that settles it, within the time of the first one."""
    return replace(
        rules,
        least_rounds=LEAST_ROUNDS,
        min_rounds=30,
        max_rounds=1000,
        rounds_before_drop=LEAST_ROUNDS,
        drop_factor=1.5,
        hopeless_factor=math.inf,
        target_spread=0.02,
        final_band=math.inf,
        final_rounds=0,
    )


def doubtful(store: Store, machine: Machine, device: str, max_memory_mib: float | None = None) -> tuple[tuple[Bucket, float], ...]:
    """The buckets of a table whose choice its measurements leave open, with the share that a rival may save; the widest first.

    Only of rows that time chose, within the limit `max_memory_mib`: by another measure none of the others would be in doubt.
    """
    shares: dict[Bucket, float] = {}
    for bucket, entry in () if store.table is None else tuple(store.table.rows.items()):
        if (entry.objective, entry.max_memory_mib) != ("time", max_memory_mib):
            continue
        if is_training(bucket) and field(bucket, "saves") == "inputs":  # measured with the row for calls that may save states
            continue
        signature = signature_of_bucket(bucket, device)
        found = doubt_of(Standing.of(bucket, signature, offers(signature, machine), store.measurements(bucket)), "time", max_memory_mib)
        if found is not None:
            shares[bucket] = found.share
    return tuple(sorted(shares.items(), key=lambda item: -item[1]))
