"""Whether a row of the other launch may answer a call for whose own launch no row speaks: the last thing asked before the untuned default.

Pure. An eager time holds what the host takes beside the kernels, a graph's does not: where the host is most of it, the one says nothing of the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from titans_backends.cache.lookup import Hit
from titans_backends.cache.schema import Bucket, WhenValue, canonical_when

__all__ = ["LEAST_US", "Launch", "named", "other_launch", "silent"]

Launch = Literal["eager", "graph"]

LEAST_US = 100.0
"""A direction's median from which a row says more of the kernels than of the host, whichever way. On an H100 the other launch's
winner costs nothing over the untuned default from here on, and up to 129 % below (`docs/cache.md` has the figures)."""

_WHY: dict[Launch, str] = {
    "eager": "an eager time is mostly the host's, and says little of a graph",
    "graph": "an eager call waits for its host, of which a graph's time says nothing",
}


def named(launch: Launch) -> str:
    """What an answer by a row of that launch is called wherever it is told."""
    return f"neighbour ({launch} row)"


def other_launch(bucket: Bucket, defaults: Mapping[str, WhenValue]) -> tuple[Bucket, Launch]:
    """The bucket of the same call launched the other way, and that way."""
    values = dict(bucket.when)
    other: Launch = "eager" if values.get("launch", defaults.get("launch")) == "graph" else "graph"
    return Bucket(bucket.op, canonical_when({**values, "launch": other}, defaults), bucket.seq_len), other


def silent(found: Hit, launch: Launch) -> str:
    """Why a row of that launch says nothing of the other; empty where it speaks. A training row's time is of two directions."""
    least = LEAST_US * (1 if found.entry.backward is None else 2)
    return "" if found.entry.us >= least else f"below {least:g} us {_WHY[launch]}"
