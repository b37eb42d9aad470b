"""The eager backend's manifest: every op in plain torch, on any device that torch runs on.

It is the reference for speed and the last resort of every choice; it refuses next to nothing.
"""

from __future__ import annotations

from titans_backends.backend import Backend

_OPS = (
    "fast_core",
    "fused_uw",
    "uw_transform",
    "slow_core",
    "gated_delta_rule",
    "gated_delta_step",
    "dual_core",
    "dual_core_step",
    "coupled_core",
    "deep_core",
    "deep_core_step",
    "short_conv",
    "qkv_prepare",
    "gated_rms_norm",
    "token_flux",
    "chunk_flux",
)

BACKEND = Backend(
    name="eager",
    summary="plain torch: chunk-parallel products in slabs of chunks, a loop for the state alone",
    contract_version=1,
    ops={op: f"titans_backends.backends.eager.{op}" for op in _OPS},
    simplicity=0,
    rank={"cpu": 1, "cuda": 4, "*": 0},
)
