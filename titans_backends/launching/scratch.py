"""Where a recorded call's scratch lies: one block, in which pieces that no launch needs at the same time share a place."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["PAGE", "places"]

PAGE = 256
"""What a piece's address is a multiple of, in bytes, as torch's own allocations are at least."""


def places(sizes: Sequence[int], spans: Sequence[range]) -> tuple[list[int], int]:
    """Where each piece lies, and the block's size, in bytes; `spans` says between which launches a piece is needed, an empty one never.

    The largest first, each at the lowest address that is free while it is needed. Launches of one stream run one after the other (a backend that launches a kernel
    before the one ahead of it has ended must not share).
    """
    found, end = [0] * len(sizes), 0
    laid: list[int] = []
    for piece in sorted((index for index, span in enumerate(spans) if span), key=lambda index: -sizes[index]):
        beside = [one for one in laid if spans[one].start < spans[piece].stop and spans[piece].start < spans[one].stop]
        place = 0
        for one in sorted(beside, key=found.__getitem__):
            if place + sizes[piece] <= found[one]:
                break
            place = max(place, -(-(found[one] + sizes[one]) // PAGE) * PAGE)
        found[piece], end = place, max(end, place + sizes[piece])
        laid.append(piece)
    return found, end
