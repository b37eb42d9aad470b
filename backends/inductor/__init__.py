"""The inductor backend's manifest: the chunk-parallel part of an op through torch.compile, the loop over the state in plain torch.

Forward only. It needs what torch.compile needs: a C++ compiler on a CPU, Triton on a GPU.
"""

from __future__ import annotations

from titans_backends.backend import Backend

_OPS = ("fast_core", "uw_transform", "slow_core", "gated_delta_rule")

BACKEND = Backend(
    name="inductor",
    summary="torch.compile on what is parallel over chunks (products, decay mask, u and w), the state's loop in plain torch; forward only",
    contract_version=1,
    ops={op: f"titans_backends.backends.inductor.{op}" for op in _OPS},
    simplicity=1,
    rank={"cpu": 2, "cuda": 2},
    probe="titans_backends.backends.inductor.probe",
    quick=False,
)
