"""FlashInfer's manifest: its CuTe DSL kernels for the gated delta rule, forward only. No kernel of ours."""

from __future__ import annotations

from titans_backends.backend import Backend

_PACKAGE = "titans_backends.backends.flashinfer"

BACKEND = Backend(
    name="flashinfer",
    summary="FlashInfer's CuTe DSL kernels, an adapter: head_dim 128, 16 bits, forward only",
    contract_version=1,
    ops={"gated_delta_rule": f"{_PACKAGE}.gated_delta_rule"},
    simplicity=6,
    rank={"cuda": 9},
    requires=("flashinfer", "cutlass"),
    install="pip install 'flashinfer-python>=0.7,<0.8'",
    probe=f"{_PACKAGE}.probe",
    quick=False,
)
