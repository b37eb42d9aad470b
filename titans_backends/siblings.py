"""What runs where a row's pair is not among a call's candidates, but its backend offers the same variants with other numbers.

Some numbers follow the card or a call's sizes, as how many processors the work is laid out for: then the row says which variant, and the backend which number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from titans_backends.backend import Candidate, Param
from titans_backends.cache.schema import Entry
from titans_backends.offers import Pair

__all__ = ["sibling"]


def sibling(entry: Entry, available: Sequence[Pair]) -> Pair | None:
    """The pair of a row's variants and parameters that differs from it in the fewest numbers, and in nothing else; None where no one pair does."""
    found: dict[int, list[Pair]] = {}
    for pair in available:
        count = _differing(entry, pair)
        if count is not None:
            found.setdefault(count, []).append(pair)
    nearest = found[min(found)] if found else []
    return nearest[0] if len(nearest) == 1 else None


def _differing(entry: Entry, pair: Pair) -> int | None:
    """In how many numbers a pair is another than a row's; None where more than numbers differ."""
    if pair.forward.saves_states != entry.saves_states or (pair.backward is None) != (entry.backward is None):
        return None
    counts = [_between(entry.use, entry.params, pair.forward)]
    if pair.backward is not None and entry.backward is not None:
        counts.append(_between(entry.backward, entry.backward_params, pair.backward))
    told = [count for count in counts if count is not None]
    return sum(told) if len(told) == len(counts) else None


def _between(name: str, params: Iterable[tuple[str, Param]], candidate: Candidate) -> int | None:
    was, now = dict(params), dict(candidate.params)
    if name != candidate.name or list(was) != list(now):
        return None
    other = [key for key in was if (was[key], type(was[key])) != (now[key], type(now[key]))]
    return len(other) if all(type(value) is int for key in other for value in (was[key], now[key])) else None
