"""sliced: a backend written with torch. The manifest is read whenever the library looks for backends, so it imports nothing heavy."""

from __future__ import annotations

from titans_backends import CONTRACT_VERSION, Backend

BACKEND = Backend(
    "sliced",
    "a backend written with torch",
    CONTRACT_VERSION,
    ops={"fused_uw": "sliced.fused_uw"},
    simplicity=9,  # breaks ties in the tuner: the simpler wins
    # the untuned order per kind of device; a kind left out is not served
    rank={"cpu": 9, "cuda": 9},
)
