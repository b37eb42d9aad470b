"""Rows for traced graphs, which save inputs only: which row stands beside one, and whether both say the same. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from titans_backends.cache.schema import Bucket, Entry

__all__ = ["repeats", "twin_of"]


def twin_of(bucket: Bucket) -> Bucket:
    """The bucket of the same call where states may be saved: both rows of a training call come from its measurements."""
    return bucket._replace(when=tuple((name, value) for name, value in bucket.when if name != "saves"))


def repeats(bucket: Bucket, entry: Entry, rows: Mapping[Bucket, Entry]) -> bool:
    """Whether it is a row for traced graphs and names what the row beside it names, at the same time."""
    twin = rows.get(twin_of(bucket)) if dict(bucket.when).get("saves") == "inputs" else None
    return twin is not None and (twin.label, twin.us, twin.tuned_with) == (entry.label, entry.us, entry.tuned_with)
