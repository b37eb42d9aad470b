"""The Triton backend's manifest: every op forward, all but decode backward, for any GPU that Triton serves; measured on Hopper."""

from __future__ import annotations

from titans_backends.backend import Backend

_PACKAGE = "titans_backends.backends.triton"
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
_BACKWARD = (
    "chunk_gradients",
    "conv_gradients",
    "coupled_gradients",
    "coupled_inputs",
    "deep_backward",
    "deep_gradients",
    "delta_backward",
    "delta_backward_plans",
    "delta_gradients",
    "delta_reverse",
    "delta_together",
    "delta_updates",
    "dual_backward",
    "dual_joins",
    "fast_backward",
    "fast_edges",
    "fast_gradients",
    "flux_gradients",
    "partial_sums",
    "rms_gradients",
    "uw_gradients",
    "uw_product_gradients",
)

BACKEND = Backend(
    name="triton",
    summary="Triton kernels: the state stays on chip, several schedules of the recurrence; all but decode train too",
    contract_version=1,
    ops={op: f"{_PACKAGE}.{op}" for op in _OPS},
    simplicity=2,
    rank={"cuda": 0},
    requires=("triton",),
    install="pip install 'titans-backends[triton]'",
    backward=tuple(f"{_PACKAGE}.{name}" for name in _BACKWARD),
    probe=f"{_PACKAGE}.probe",
)
