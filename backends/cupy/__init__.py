"""The CuPy backend's manifest: CUDA C++ in `cuda/`, compiled by NVRTC for the card at hand and kept on disk, launched with raw pointers."""

from __future__ import annotations

from titans_backends.backend import Backend

_PACKAGE = "titans_backends.backends.cupy"
_OPS = ("dual_core", "fast_core", "fused_uw", "gated_delta_rule", "gated_delta_step", "slow_core", "uw_transform")
_BACKWARD = ("delta_backward", "dual_backward", "fast_core_gradients", "fused_uw_gradients", "slow_core_gradients", "uw_transform_gradients")

BACKEND = Backend(
    name="cupy",
    summary="CUDA C++ through CuPy's NVRTC: mma.sync from sm_80 on, cubins kept on disk, launches of few microseconds",
    contract_version=1,
    ops={op: f"{_PACKAGE}.{op}" for op in _OPS},
    simplicity=3,
    rank={"cuda": 1},
    requires=("cupy",),
    backward=tuple(f"{_PACKAGE}.{name}" for name in _BACKWARD),
    install="pip install 'titans-backends[cuda13]' (or [cuda12], as torch.version.cuda says)",
    probe=f"{_PACKAGE}.probe",
)
