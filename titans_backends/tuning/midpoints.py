"""Lengths between tuned ones: which lie in the middle, in log2, and where the two neighbours chose differently, so that their choices are to meet there.

Pure. A call between two rows gets the choice of one of them, by their times or as the nearer one, and neither was measured there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from titans_backends.buckets import Bucket, defaults_of
from titans_backends.cache.schema import Entry
from titans_backends.offers import Pair
from titans_backends.tuning.standing import Standing, same_choice

__all__ = ["Ends", "Midpoint", "disagreeing", "midpoints", "outlived"]

Ends = tuple[int, int]
"""The two neighbouring lengths."""


@dataclass(frozen=True, slots=True)
class Midpoint:
    """A length between two that chose differently, and the choices, the shorter length's first. `swing`: by how much who is the faster changes from the one
    length to the other, the sum of what each choice gains over the other's at its own, in natural logarithms."""

    bucket: Bucket
    ends: Ends
    choices: tuple[Pair, Pair]
    swing: float


def midpoints(buckets: Sequence[Bucket]) -> tuple[tuple[Bucket, Ends], ...]:
    """The lengths in the middle, in log2, of neighbours that differ in nothing else; where there is a whole number between them."""
    lengths: dict[tuple[str, object], list[Bucket]] = {}
    for bucket in buckets:
        lengths.setdefault((bucket.op, bucket.when), []).append(bucket)
    found = []
    for group in lengths.values():
        ordered = sorted(group, key=lambda bucket: bucket.seq_len)
        for shorter, longer in pairwise(ordered):
            middle = _middle(shorter, longer)
            if shorter.seq_len < middle < longer.seq_len:
                found.append((shorter._replace(seq_len=middle), (shorter.seq_len, longer.seq_len)))
    return tuple(found)


def disagreeing(
    asked: Sequence[Bucket], beside: Sequence[Bucket], rows: Mapping[Bucket, Entry], standing: Callable[[Bucket], Standing | None]
) -> tuple[Midpoint, ...]:
    """The midpoints of neighbours whose rows name different choices, those that swing most first: between two of `asked`, or one of them and one of `beside`.

    Not where a row lies between the two elsewhere than in the middle: it is nearer to what is left and right of it.
    """
    found, known = [], {*asked}
    for middle, ends in midpoints(tuple(dict.fromkeys((*asked, *beside)))):
        shorter, longer = (middle._replace(seq_len=length) for length in ends)
        if not {shorter, longer} & known or shorter not in rows or longer not in rows or same_choice(rows[shorter], rows[longer]):
            continue
        if any(row[:2] == middle[:2] and ends[0] < row.seq_len < ends[1] and row != middle for row in rows):
            continue
        here, there = standing(shorter), standing(longer)
        if here is None or there is None:
            continue
        one, other = here.named_by(rows[shorter]), there.named_by(rows[longer])
        if one is not None and other is not None and one != other:
            found.append(Midpoint(middle, ends, (one, other), _gain(here, one, other) + _gain(there, other, one)))
    return tuple(sorted(found, key=lambda one: -one.swing))


def outlived(asked: Sequence[Bucket], rows: Mapping[Bucket, Entry], standing: Callable[[Bucket], Standing | None]) -> tuple[Midpoint, ...]:
    """The rows in the middle of two of `asked` that agree today, where the row's own choice is gone or its code has changed since: no call takes such a row,
    and those that are nearest to it would get the untuned default. What both neighbours chose is to be measured there."""
    found = []
    for middle, ends in midpoints(asked):
        shorter, longer = (rows.get(middle._replace(seq_len=length)) for length in ends)
        if middle in asked or middle not in rows or shorter is None or longer is None or not same_choice(shorter, longer):
            continue
        there = standing(middle)
        named, chosen = (None, None) if there is None else (there.named_by(rows[middle]), there.named_by(shorter))
        if there is not None and chosen is not None and (named is None or there.source(named) != rows[middle].source):
            found.append(Midpoint(middle, ends, (chosen, chosen), 0.0))
    return tuple(found)


def _gain(standing: Standing, chosen: Pair, other: Pair) -> float:
    """How much longer the other takes there, in logarithms; 0 where it was not timed, or is the faster one."""
    us = {one.pair: one.us for one in standing.contenders()}
    return max(0.0, math.log(us[other] / us[chosen])) if us.get(chosen) and us.get(other) else 0.0


def _middle(shorter: Bucket, longer: Bucket) -> int:
    """For `fused_uw` a whole number of matrices."""
    middle = round(math.sqrt(shorter.seq_len * longer.seq_len))
    if shorter.op != "fused_uw":
        return middle
    chunk = dict(shorter.when).get("chunk_size", defaults_of("fused_uw")["chunk_size"])
    assert isinstance(chunk, int)
    return max(1, round(middle / chunk)) * chunk
