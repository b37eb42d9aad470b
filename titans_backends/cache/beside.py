"""Which of two rows speaks, where the library's shipped table and a backend's own both have one for a call: the earlier, unless the later is clearly faster.

Pure. The rows were measured apart, so what a row must gain is more than in one race: the default's margin, outside the noise of both.
"""

from __future__ import annotations

from titans_backends.cache.lookup import Hit

__all__ = ["GAIN", "displaces"]

GAIN = 0.03
"""What the later row must save of the earlier one's time; the tuner asks as much of what replaces the default."""


def displaces(later: Hit, earlier: Hit) -> bool:
    """Whether the later table's row takes the place of the earlier one's.

    A row of exactly this bucket goes before a nearest one, and before one for which a sibling stands. Times are compared only where both are of one bucket.
    """
    if later.exact != earlier.exact:
        return later.exact
    if later.bucket != earlier.bucket:
        return False
    slowest = later.entry.us * (1 + later.entry.spread)
    fastest = earlier.entry.us * (1 - earlier.entry.spread)
    return later.entry.us <= (1 - GAIN) * earlier.entry.us and slowest < fastest
