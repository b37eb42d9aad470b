"""Between two neighbouring lengths that chose differently: up to which the shorter one's choice is likely the faster, from the times of both at either.

Pure. Each choice's time is taken to follow a straight line between its two lengths in logarithms of both; where the lines cross, the choice changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise

from titans_backends.buckets import Bucket
from titans_backends.cache.schema import Entry
from titans_backends.offers import Pair
from titans_backends.tuning.standing import Standing, same_choice

__all__ = ["crossing", "switches"]

Times = tuple[float, float]
"""Microseconds of the shorter length's choice and of the longer one's."""


def crossing(shorter: int, longer: int, at_shorter: Times, at_longer: Times) -> int | None:
    """The last length for which the shorter one's choice is taken; None where either length finds the two equally fast.

    A choice that is slower at its own length, kept for its simplicity or as the default, counts as equally fast there.
    """
    here, there = max(0.0, math.log(at_shorter[1] / at_shorter[0])), max(0.0, math.log(at_longer[0] / at_longer[1]))
    if here + there == 0.0:
        return None
    crossed = shorter * math.pow(longer / shorter, here / (here + there))
    return min(longer - 1, max(shorter, math.floor(crossed + 1e-6)))


def switches(
    rows: Mapping[Bucket, Entry], of: Callable[[Bucket], bool], standing: Callable[[Bucket], Standing | None]
) -> dict[Bucket, tuple[int, int] | None]:
    """What `until` is to be in each row that has a longer neighbour and whose key `of` accepts, where that differs from what it is.

    None for neighbours with one choice and for rows that were not chosen by time alone. Where a choice is not offered here today, or was not timed at both
    with what is installed, what stands there stays: whoever writes one of the two rows drops it.
    """
    lengths: dict[Bucket, list[int]] = {}
    for bucket in rows:
        if of(bucket):
            lengths.setdefault(bucket._replace(seq_len=0), []).append(bucket.seq_len)
    found: dict[Bucket, tuple[int, int] | None] = {}
    for key, group in lengths.items():
        ends = sorted(group)
        for shorter, longer in pairwise(ends):
            one, other = key._replace(seq_len=shorter), key._replace(seq_len=longer)
            found[one] = _until(one, other, rows, standing)
        found[key._replace(seq_len=ends[-1])] = None
    return {bucket: until for bucket, until in found.items() if rows[bucket].until != until}


def _until(one: Bucket, other: Bucket, rows: Mapping[Bucket, Entry], standing: Callable[[Bucket], Standing | None]) -> tuple[int, int] | None:
    if not (_by_time(rows[one]) and _by_time(rows[other])) or same_choice(rows[one], rows[other]):
        return None
    timed = _timed(one, other, rows, standing)
    if timed is None:
        known = rows[one].until
        return known if known is not None and known[0] == other.seq_len else None
    last = crossing(one.seq_len, other.seq_len, *timed)
    return None if last is None else (other.seq_len, last)


def _timed(one: Bucket, other: Bucket, rows: Mapping[Bucket, Entry], standing: Callable[[Bucket], Standing | None]) -> tuple[Times, Times] | None:
    """What both choices take at either length; None where one is not offered here today, or was not timed at both with what is installed."""
    here, there = standing(one), standing(other)
    if here is None or there is None:
        return None
    chosen = here.named_by(rows[one]), there.named_by(rows[other])
    if chosen[0] is None or chosen[1] is None:
        return None
    at_shorter, at_longer = _times(here, chosen[0], chosen[1]), _times(there, chosen[0], chosen[1])
    return None if at_shorter is None or at_longer is None else (at_shorter, at_longer)


def _by_time(entry: Entry) -> bool:
    """Whether nothing but time decided: a limit of memory may have kept the faster choice out, between the two lengths as well."""
    return entry.objective == "time" and entry.max_memory_mib is None


def _times(standing: Standing, one: Pair, other: Pair) -> Times | None:
    """What two choices take there; None where one was not timed, or did not pass."""
    us = {contender.pair: contender.us for contender in standing.contenders()}
    return (us[one], us[other]) if us.get(one) and us.get(other) else None
