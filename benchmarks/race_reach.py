"""Which candidates a race measures: those that could win, by what the shipped timings say of the nearest calls. Pure.

Every candidate of every case would take half an hour of a card, most of it compiling what is known to lose. What dispatch chooses, each backend's untuned
default and what no alike row has timed always race. Where nothing is known of a head_dim, a backend's first candidates do, which it puts first for a reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from race_cells import Group

from titans_backends.backend import Candidate
from titans_backends.buckets import Bucket, field
from titans_backends.cache.timings import Measurement
from titans_backends.offers import Offer, Pair

__all__ = ["members", "racing"]

Rows = Mapping[Bucket, Sequence[Measurement]]
NEAREST = 2
"""Rows that are asked."""
WITHIN, MOST = 1.10, 3
"""Of a row, a backend's candidates up to so many times its best, and no more than so many; where there is no row, so many and one."""


def members(pair: Pair) -> tuple[Candidate, ...]:
    """A pair's candidates."""
    return (pair.forward,) if pair.backward is None else (pair.forward, pair.backward)


def racing(
    offers: Sequence[Offer], available: Sequence[Pair], group: Group, named: Iterable[Candidate], bucket: Bucket, rows: Rows | None
) -> tuple[list[Candidate], list[Candidate]]:
    """Forward and backward candidates, in the offers' order. `named` race whatever is known; `rows` None: every candidate does."""
    kept = set(named)
    for one in offers:
        for side in (one.forward, one.backward):
            if one.backend.name not in group.backends:
                continue
            if group.slow or one.backend.name in group.first_only:
                kept |= set(side[:1])
            else:
                kept |= set(side) if rows is None else _reaching(side, bucket, rows)
    usable = {candidate for pair in available for candidate in members(pair)} & kept
    forward = [candidate for one in offers for candidate in one.forward if candidate in usable]
    return forward, [candidate for one in offers for candidate in one.backward if candidate in usable]


def _reaching(side: Sequence[Candidate], bucket: Bucket, rows: Rows) -> set[Candidate]:
    """A backend's candidates of one direction that the nearest rows have near its best; both of those that save states and of those that do not."""
    kept = set(side[:1])
    known = {(one.name, tuple(sorted(one.params)), one.direction, one.saves_states): one for one in side}
    backends = {one.backend for one in side}
    alike = [other for other in rows if _alike(other, bucket)]
    timed = {(one.candidate, tuple(sorted(one.params)), one.direction, one.saves_states) for row in alike for one in rows[row]}
    asked = 0
    for row in sorted(alike, key=lambda other: _distance(other, bucket)):
        found = [one for one in rows[row] if one.us is not None and one.candidate.partition("/")[0] in backends]
        mine = [
            (known[key], one.us) for one in found if (key := (one.candidate, tuple(sorted(one.params)), one.direction, one.saves_states)) in known
        ]
        for saves in (False, True):
            ranked = sorted(((us, candidate) for candidate, us in mine if candidate.saves_states == saves), key=lambda item: item[0])
            kept |= {candidate for us, candidate in ranked[:MOST] if us <= WITHIN * ranked[0][0]}
        asked += bool(mine)
        if asked == NEAREST:
            break
    return kept | ({one for key, one in known.items() if key not in timed} if asked else set(side[: MOST + 1]))


def _alike(row: Bucket, bucket: Bucket) -> bool:
    return row.op == bucket.op and all(field(row, name) == field(bucket, name) for name in ("dtype", "head_dim", "regime", "packed", "g"))


def _distance(row: Bucket, bucket: Bucket) -> float:
    """Doublings of length and of streams; another launch counts for one."""

    def doublings(one: object, other: object) -> float:
        return abs(math.log2(one / other)) if isinstance(one, int) and isinstance(other, int) else 0.0

    apart = doublings(row.seq_len, bucket.seq_len) + doublings(field(row, "streams"), field(bucket, "streams"))
    return apart + (field(row, "launch") != field(bucket, "launch"))
