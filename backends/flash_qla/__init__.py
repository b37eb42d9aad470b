"""FlashQLA's manifest: the Qwen team's TileLang kernels for the gated delta rule on Hopper and Blackwell. No kernel of ours."""

from __future__ import annotations

from titans_backends.backend import Backend

_PACKAGE = "titans_backends.backends.flash_qla"

BACKEND = Backend(
    name="flash_qla",
    summary="FlashQLA's TileLang kernels, an adapter: head_dim 128, 16 bits, forward and backward, compiled by nvcc at their first use",
    contract_version=1,
    ops={"gated_delta_rule": f"{_PACKAGE}.gated_delta_rule"},
    simplicity=6,
    rank={"cuda": 9},
    requires=("flash_qla", "tilelang"),
    install="pip install 'flash-qla>=0.1.3,<0.2'",
    probe=f"{_PACKAGE}.probe",
    quick=False,
    backward=(f"{_PACKAGE}.gradients",),
)
