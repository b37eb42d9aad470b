"""FLA's manifest: flash-linear-attention's Triton kernels for the delta rules, called below its own dispatch. No kernel of ours."""

from __future__ import annotations

from titans_backends.backend import Backend

_PACKAGE = "titans_backends.backends.fla"

BACKEND = Backend(
    name="fla",
    summary="flash-linear-attention's Triton kernels, an adapter: chunks of 64, any head_dim to 256, decode",
    contract_version=1,
    ops={op: f"{_PACKAGE}.{op}" for op in ("gated_delta_rule", "gated_delta_step")},
    simplicity=5,
    rank={"cuda": 9},
    requires=("fla", "einops", "triton"),
    install="pip install 'fla-core>=0.6,<0.7'",
    probe=f"{_PACKAGE}.probe",
    quick=False,
    backward=(f"{_PACKAGE}.gradients",),
)
