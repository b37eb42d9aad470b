"""The Numba CUDA backend's manifest: seven ops in plain Python kernels, to be read beside the formulas in their contracts; the teaching copy."""

from __future__ import annotations

from titans_backends.backend import Backend

_PACKAGE = "titans_backends.backends.numba"
_OPS = ("fast_core", "fused_uw", "uw_transform", "slow_core", "gated_delta_rule", "gated_delta_step", "dual_core")
_BACKWARD = ("chunk_gradients", "slow_gradients", "state_reverse", "uw_gradients")

BACKEND = Backend(
    name="numba",
    summary="Numba CUDA kernels in Python, float32 arithmetic, to be read beside the ops' formulas; four ops train too",
    contract_version=1,
    ops={op: f"{_PACKAGE}.{op}" for op in _OPS},
    simplicity=3,
    rank={"cuda": 2},
    requires=("numba", "numba_cuda"),
    install="pip install 'titans-backends[cuda13]' (or [cuda12])",
    backward=tuple(f"{_PACKAGE}.{name}" for name in _BACKWARD),
    probe=f"{_PACKAGE}.probe",
)
