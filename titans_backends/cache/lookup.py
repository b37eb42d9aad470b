"""Which row of a table answers a call: the exact bucket, else one of the two beside it inside what was tuned, else none, with the reason.

Pure, and never a guess beyond the measured range: that is the manifests' default to make.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from titans_backends.cache.schema import Bucket, Entry, Table, When, WhenValue, canonical_when, full_when

__all__ = ["Difference", "Hit", "Miss", "Near", "lookup"]

_STREAMS_FACTOR = 2.0
_SHOWN = 3
_ABSENT = "(no such field)"


@dataclass(frozen=True, slots=True)
class Hit:
    """A row that answers; its bucket is the tuned one, which `kind` nearest says is not the one that was asked for. `why`: what decided between two lengths,
    where that was not their distance. `other`: the row on the other side of the length that was asked for. `by_sibling`: the call is offered the row's variants with
    other numbers alone, which nobody timed."""

    kind: Literal["exact", "nearest"]
    bucket: Bucket
    entry: Entry
    why: str = ""
    other: Bucket | None = None
    by_sibling: bool = False

    @property
    def exact(self) -> bool:
        """Whether what the row names was timed at the bucket that was asked for, and runs."""
        return self.kind == "exact" and not self.by_sibling

    @property
    def seq_len(self) -> int:
        """The tuned sequence length."""
        return self.bucket.seq_len

    @property
    def streams(self) -> int:
        """The tuned number of streams, sequences × v heads."""
        return _streams(self.bucket.when)


@dataclass(frozen=True, slots=True)
class Difference:
    """One field in which a tuned row is not what was asked for."""

    field: str
    asked: WhenValue
    tuned: WhenValue


@dataclass(frozen=True, slots=True)
class Near:
    """A tuned `when` that came close: where it differs (defaults filled in), and at which lengths it was tuned."""

    when: When
    differences: tuple[Difference, ...]
    seq_lens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Miss:
    """No row answers: the reason as a sentence, and what was asked of which table."""

    reason: str
    asked: Bucket
    table: Table
    defaults: Mapping[str, WhenValue]

    @property
    def closest(self) -> tuple[Near, ...]:
        """The op's keys that came close, the closest first; sought where somebody wants to read them, which no call does."""
        return _closest(self.asked.when, _lengths(self.table, self.asked.op), self.defaults)


def lookup(table: Table, op: str, when: Mapping[str, WhenValue] | When, seq_len: int, defaults: Mapping[str, WhenValue] | None = None) -> Hit | Miss:
    """The row for a call; `when` is full or canonical, the rows' are canonical for the same `defaults`.

    Streams: the nearest tuned within a factor of 2. Then seq_len, between the shortest and the longest tuned there: of the two rows beside it the one that
    the shorter's `until` says, else the nearest in log2. A tie goes to the larger.
    """
    defaults = defaults or {}
    asked = canonical_when(when, defaults)
    exact = Bucket(op, asked, seq_len)
    if exact in table.rows:
        return Hit("exact", exact, table.rows[exact])
    tuned = _lengths(table, op)
    if not tuned:
        return Miss(f"no row for {op}", exact, table, defaults)
    others = _without_streams(asked)
    by_streams = {_streams(known): known for known in tuned if _without_streams(known) == others}
    if not by_streams:
        return Miss("no row with this key", exact, table, defaults)
    near = [count for count in by_streams if _ratio(count, _streams(asked)) <= _STREAMS_FACTOR]
    if not near:
        known = ", ".join(map(str, sorted(by_streams)))
        return Miss(f"streams {_streams(asked)} is not within a factor of 2 of a tuned one ({known})", exact, table, defaults)
    row = by_streams[_nearest(near, _streams(asked))]
    shortest, longest = min(tuned[row]), max(tuned[row])
    if not shortest <= seq_len <= longest:
        told = f"seq_len {seq_len} is outside the tuned range, {shortest} to {longest} at streams {_streams(row)}"
        return Miss(told, exact, table, defaults)
    bucket, other, why = _beside(table, Bucket(op, row, seq_len), tuned[row])
    return Hit("nearest", bucket, table.rows[bucket], why, other)


def _lengths(table: Table, op: str) -> dict[When, list[int]]:
    """The tuned lengths of each of an op's keys."""
    tuned: dict[When, list[int]] = {}
    for bucket in table.rows:
        if bucket.op == op:
            tuned.setdefault(bucket.when, []).append(bucket.seq_len)
    return tuned


def _beside(table: Table, asked: Bucket, lengths: Collection[int]) -> tuple[Bucket, Bucket | None, str]:
    """The row that speaks for a length inside the tuned ones, the one on its other side, and why where their times say so."""
    if asked.seq_len in lengths:
        return asked, None, ""
    shorter = asked._replace(seq_len=max(length for length in lengths if length < asked.seq_len))
    longer = asked._replace(seq_len=min(length for length in lengths if length > asked.seq_len))
    until = table.rows[shorter].until
    if until is None or until[0] != longer.seq_len or until[1] < shorter.seq_len:  # another row's, or written by hand
        near = asked._replace(seq_len=_nearest((shorter.seq_len, longer.seq_len), asked.seq_len))
        return near, longer if near == shorter else shorter, ""
    chosen, other = (shorter, longer) if asked.seq_len <= until[1] else (longer, shorter)
    return chosen, other, f"between {shorter.seq_len} and {longer.seq_len} the choice changes after {until[1]}, by the times of both at either"


def _nearest(tuned: Collection[int], asked: int) -> int:
    return min(tuned, key=lambda value: (_ratio(value, asked), -value))


def _ratio(one: int, other: int) -> float:
    """How far apart in log2, without its rounding: equal distances are equal numbers."""
    return max(one, other) / min(one, other) if min(one, other) > 0 else float("inf")


def _streams(when: When) -> int:
    value = dict(when).get("streams")
    return value if isinstance(value, int) else 1


def _without_streams(when: When) -> When:
    return tuple((name, value) for name, value in when if name != "streams")


def _closest(asked: When, tuned: Mapping[When, list[int]], defaults: Mapping[str, WhenValue]) -> tuple[Near, ...]:
    near = [Near(when, _differences(asked, when, defaults), tuple(sorted(lengths))) for when, lengths in tuned.items()]
    near.sort(key=lambda row: (_weight(row), _ratio(_streams(row.when), _streams(asked)), -_streams(row.when)))
    return tuple(near[:_SHOWN])


def _weight(row: Near) -> int:
    """Fields that must agree; streams only need to be close."""
    return sum(difference.field != "streams" for difference in row.differences)


def _differences(asked: When, tuned: When, defaults: Mapping[str, WhenValue]) -> tuple[Difference, ...]:
    left, right = dict(full_when(asked, defaults)), dict(full_when(tuned, defaults))
    pairs = ((name, left.get(name, _ABSENT), right.get(name, _ABSENT)) for name in sorted({*left, *right}))
    return tuple(Difference(name, mine, theirs) for name, mine, theirs in pairs if mine != theirs)
