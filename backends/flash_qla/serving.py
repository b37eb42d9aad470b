"""What the adapter of FlashQLA refuses: its kernels are of one head_dim and of certain cards, and nvcc compiles them at their first use."""

from __future__ import annotations

from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import ACCEPTED, Verdict, refused

from ..peers import (
    missing_nvcc,
    refuse_card,
    refuse_dtype,
    refuse_empty,
    refuse_head_dim,
    refuse_hip,
    refuse_packed_graph,
    refuse_scale_zero,
    refuse_version,
)

__all__ = ["DISTRIBUTIONS", "serves"]

DISTRIBUTIONS = ("flash-qla", "tilelang")

_HEAD_DIM = 128
_CARDS = (90, 100, 103)
_INSTALL = "pip install 'flash-qla>=0.1.3,<0.2'"


def serves(signature: Signature, machine: Machine) -> Verdict:
    """Version, compiler, dtype, head_dims, card, captured graphs; every reason."""
    return (
        refuse_version("flash_qla", DISTRIBUTIONS[0], (0, 1, 3), (0, 2), _INSTALL)
        & refuse_hip()
        & refuse_card(machine, _CARDS, "compute capability 9.0, 10.0 and 10.3")
        & _refuse_without_nvcc()
        & refuse_dtype(signature)
        & refuse_head_dim(signature, _HEAD_DIM)
        & refuse_empty(signature)
        & refuse_scale_zero(signature)
        & refuse_packed_graph(signature)
    )


def _refuse_without_nvcc() -> Verdict:
    why = missing_nvcc()
    return refused(f"TileLang compiles its kernels with nvcc, and {why}; install a CUDA toolkit and set CUDA_HOME to it") if why else ACCEPTED
