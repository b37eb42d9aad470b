"""Whether a row of eager calls may answer a call in a captured graph, for which no row of graphs speaks: the last thing asked before the untuned default.

Pure. An eager time holds what the host takes beside the kernels; where that is most of it, the row says nothing of a graph.
"""

from __future__ import annotations

from collections.abc import Mapping

from titans_backends.cache.lookup import Hit
from titans_backends.cache.schema import Bucket, WhenValue, canonical_when

__all__ = ["LEAST_US", "NEIGHBOUR", "eager_bucket", "silent"]

LEAST_US = 100.0
"""A direction's eager median from which it says more of the kernels than of the host. Shorter rows' winners were up to 2.3 times as slow in a graph as the
untuned default, on an H100; from here on 3 % (`docs/cache.md` has the figures, of inference)."""

NEIGHBOUR = "neighbour (eager row)"
"""What such an answer is called wherever it is told."""


def eager_bucket(bucket: Bucket, defaults: Mapping[str, WhenValue]) -> Bucket | None:
    """The bucket of the same call launched eagerly; None where it is launched so."""
    values = dict(bucket.when)
    if values.get("launch", defaults.get("launch")) != "graph":
        return None
    return Bucket(bucket.op, canonical_when({**values, "launch": "eager"}, defaults), bucket.seq_len)


def silent(found: Hit) -> str:
    """Why an eager row says nothing of a graph; empty where it speaks. A training row's time is of two directions."""
    least = LEAST_US * (1 if found.entry.backward is None else 2)
    return "" if found.entry.us >= least else f"below {least:g} us an eager time is mostly the host's, and says little of a graph"
