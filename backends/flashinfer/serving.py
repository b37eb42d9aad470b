"""What the adapter of FlashInfer refuses: its kernels are of one head_dim and of certain cards, and its compiler wants a CUDA that the driver knows."""

from __future__ import annotations

import torch

from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.tables import current_environment
from titans_backends.verdict import ACCEPTED, Verdict, refused

from ..peers import (
    numbers,
    refuse_card,
    refuse_dtype,
    refuse_empty,
    refuse_head_dim,
    refuse_hip,
    refuse_scale_zero,
    refuse_version,
    version_of,
)

__all__ = ["DISTRIBUTIONS", "serves"]

DISTRIBUTIONS = ("flashinfer-python", "nvidia-cutlass-dsl")

_HEAD_DIM = 128
_HOPPER = 90
_CARDS = (_HOPPER, 100, 103, 120, 121)
_INSTALL = "pip install 'flashinfer-python>=0.7,<0.8'"
_CUDA_13, _CUDA_13_DRIVER = 13, 580


def serves(signature: Signature, machine: Machine) -> Verdict:
    """Version, dtype, head_dims, card, CUDA and driver; every reason."""
    return (
        refuse_version("flashinfer", DISTRIBUTIONS[0], (0, 7), (0, 8), _INSTALL)
        & refuse_hip()
        & refuse_card(machine, _CARDS, "compute capability 9.0, 10.0, 10.3, 12.0 and 12.1")
        & _refuse_cuda(machine)
        & _refuse_driver(current_environment("cuda").driver)
        & refuse_dtype(signature)
        & refuse_head_dim(signature, _HEAD_DIM)
        & refuse_empty(signature)
        & refuse_scale_zero(signature)
    )


def _refuse_cuda(machine: Machine) -> Verdict:
    """Its Blackwell kernels want torch for CUDA 13."""
    found = torch.version.cuda
    if machine.sm in (None, _HOPPER) or found is None or numbers(found) >= (_CUDA_13,):
        return ACCEPTED
    return refused(f"its kernels for {machine.name} want torch for CUDA 13, and this one is for CUDA {found}; install torch for CUDA 13")


def _refuse_driver(driver: str | None) -> Verdict:
    """What CuTe DSL compiles with CUDA 13's libraries, an older driver does not load."""
    libraries = version_of("nvidia-cutlass-dsl-libs-cu13")
    if libraries is None or driver is None or numbers(driver) >= (_CUDA_13_DRIVER,):
        return ACCEPTED
    return refused(
        f"CuTe DSL's libraries for CUDA 13 ({libraries}) are installed, which want driver {_CUDA_13_DRIVER} or later, and this one is {driver}; "
        "install the libraries for CUDA 12: pip install nvidia-cutlass-dsl, or a newer driver"
    )
