"""The Numba backend for processors: every op but fused_uw and coupled_core forward, in float32; its kernels are compiled at the first call and kept on disk."""

from __future__ import annotations

from titans_backends.backend import Backend

_PACKAGE = "titans_backends.backends.numba_cpu"
_OPS = ("fast_core", "uw_transform", "slow_core", "gated_delta_rule", "gated_delta_step", "dual_core")

BACKEND = Backend(
    name="numba_cpu",
    summary="Numba on the CPU: explicit vectors, states in the nearest cache, threads over sequences, heads and columns; float32, forward",
    contract_version=1,
    ops={op: f"{_PACKAGE}.{op}" for op in _OPS},
    simplicity=3,
    rank={"cpu": 0},
    requires=("numba",),
    install="pip install 'titans-backends[numba]'",
    probe=f"{_PACKAGE}.probe",
)
