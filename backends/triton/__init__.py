"""The Triton backend's manifest: every op forward, all but decode backward, for any GPU that Triton serves; measured on Hopper."""

from __future__ import annotations

from titans_backends.backend import Backend

_OPS = ("fast_core", "fused_uw", "uw_transform", "slow_core", "gated_delta_rule", "gated_delta_step", "dual_core")

BACKEND = Backend(
    name="triton",
    summary="Triton kernels: the state stays on chip, several schedules of the recurrence; all but decode train too",
    contract_version=1,
    ops={op: f"titans_backends.backends.triton.{op}" for op in _OPS},
    simplicity=2,
    rank={"cuda": 0},
    requires=("triton",),
    install="pip install 'titans-backends[triton]'",
    probe="titans_backends.backends.triton.probe",
)
