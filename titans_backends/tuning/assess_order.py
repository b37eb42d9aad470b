"""Which buckets an assessment looks at, the midpoints between them too, and in which order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from titans_backends.buckets import Bucket, defaults_of

__all__ = ["in_order", "midpoints", "spread_out"]


def spread_out(buckets: Sequence[Bucket], limit: int | None) -> tuple[Bucket, ...]:
    """The first buckets of a plan, the lengths of one key together and one key of each op in turn, so that few of them show much."""
    groups: dict[str, dict[object, list[Bucket]]] = {}
    for bucket in buckets:
        groups.setdefault(bucket.op, {}).setdefault(bucket.when, []).append(bucket)
    keys = {op: list(by_when.values()) for op, by_when in groups.items()}
    turns = max(map(len, keys.values()), default=0)
    ordered = [bucket for turn in range(turns) for by_op in keys.values() if turn < len(by_op) for bucket in by_op[turn]]
    return tuple(ordered[:limit])


def midpoints(buckets: Sequence[Bucket]) -> tuple[tuple[Bucket, tuple[int, int]], ...]:
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


def in_order(buckets: Sequence[Bucket]) -> list[tuple[Bucket, tuple[int, int] | None]]:
    """The buckets of each key, then the midpoints between them, so that a budget that ends early has seen both."""
    groups: dict[tuple[str, object], list[Bucket]] = {}
    for bucket in buckets:
        groups.setdefault((bucket.op, bucket.when), []).append(bucket)
    found: list[tuple[Bucket, tuple[int, int] | None]] = []
    for group in groups.values():
        found += [(bucket, None) for bucket in group]
        found += midpoints(group)
    return found


def _middle(shorter: Bucket, longer: Bucket) -> int:
    """For `fused_uw` a whole number of matrices."""
    middle = round(math.sqrt(shorter.seq_len * longer.seq_len))
    if shorter.op != "fused_uw":
        return middle
    chunk = dict(shorter.when).get("chunk_size", defaults_of("fused_uw")["chunk_size"])
    assert isinstance(chunk, int)
    return max(1, round(middle / chunk)) * chunk
