"""Which buckets an assessment looks at, the midpoints between them too, and in which order: little of everything first, neighbouring lengths together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from titans_backends.buckets import Bucket
from titans_backends.tuning.midpoints import Ends, midpoints

__all__ = ["in_order", "spread_out", "units"]

_FOREMOST = ("gated_delta_rule", "dual_core")
"""The ops that are a whole layer's core: most is chosen there, and a wrong choice costs most."""
_TOGETHER = 2


def spread_out(buckets: Sequence[Bucket], limit: int | None = None) -> tuple[Bucket, ...]:
    """The first buckets of a plan: two neighbouring lengths of one key together and an op after the other in turn, so that few of them show much.

    `gated_delta_rule` and `dual_core` come first, the other ops as they come in the plan; so do the keys of an op, each whole before the next.
    """
    return tuple(bucket for unit in units(buckets) for bucket in unit)[:limit]


def units(buckets: Sequence[Bucket]) -> tuple[tuple[Bucket, ...], ...]:
    """The same buckets as what is taken on together."""
    groups: dict[str, dict[object, list[Bucket]]] = {op: {} for op in _FOREMOST}
    for bucket in buckets:
        groups.setdefault(bucket.op, {}).setdefault(bucket.when, []).append(bucket)
    by_op = [[pair for key in by_when.values() for pair in _pairs(key)] for by_when in groups.values()]
    return tuple(found for turn in zip_longest(*by_op) for found in turn if found is not None)


def _pairs(lengths: Sequence[Bucket]) -> list[tuple[Bucket, ...]]:
    ordered = sorted(lengths, key=lambda bucket: bucket.seq_len)
    return [tuple(ordered[first : first + _TOGETHER]) for first in range(0, len(ordered), _TOGETHER)]


def in_order(buckets: Sequence[Bucket], refined: Sequence[Bucket] = ()) -> list[tuple[Bucket, Ends | None]]:
    """The buckets of each key, then the midpoints between the rows that there are: these, and those of `refined`."""
    groups: dict[tuple[str, object], list[Bucket]] = {}
    for bucket in buckets:
        groups.setdefault((bucket.op, bucket.when), []).append(bucket)
    found: list[tuple[Bucket, Ends | None]] = []
    for key, group in groups.items():
        found += [(bucket, None) for bucket in group]
        found += midpoints((*group, *(one for one in refined if (one.op, one.when) == key)))
    return found
