"""The ops: one file each, with formula, reference, work, cases. This is the mathematics' only home; no backend is known here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from titans_backends.contracts import (
    chunk_flux,
    coupled_core,
    deep_core,
    deep_core_step,
    dual_core,
    dual_core_step,
    fast_core,
    fused_uw,
    gated_delta_rule,
    gated_delta_step,
    gated_rms_norm,
    qkv_prepare,
    short_conv,
    slow_core,
    token_flux,
    uw_transform,
)
from titans_backends.contracts.contract import Contract
from titans_backends.errors import unknown

__all__ = ["CONTRACTS", "contract"]

CONTRACTS: Mapping[str, Contract] = MappingProxyType(
    {
        module.CONTRACT.name: module.CONTRACT
        for module in (
            fast_core,
            fused_uw,
            uw_transform,
            slow_core,
            gated_delta_rule,
            gated_delta_step,
            dual_core,
            dual_core_step,
            coupled_core,
            deep_core,
            deep_core_step,
            short_conv,
            qkv_prepare,
            gated_rms_norm,
            token_flux,
            chunk_flux,
        )
    }
)
"""Every op's contract by name."""


def contract(name: str) -> Contract:
    """One op's contract; an unknown name lists the known ones."""
    try:
        return CONTRACTS[name]
    except KeyError:
        raise unknown("op", name, CONTRACTS) from None
