"""The machines that the Triton backend's tests stand on: a card per architecture, as the driver describes it."""

from __future__ import annotations

from titans_backends.machine import Machine

__all__ = ["CARDS", "H100"]

H100 = Machine("cuda", "NVIDIA H100 80GB HBM3", "nvidia_h100_80gb_hbm3", sm=90, sms=132, shared_memory_bytes=227 * 1024)

CARDS = {
    90: H100,
    80: Machine("cuda", "NVIDIA A100-SXM4-80GB", "nvidia_a100_sxm4_80gb", sm=80, sms=108, shared_memory_bytes=163 * 1024),
    89: Machine("cuda", "NVIDIA GeForce RTX 4090", "nvidia_geforce_rtx_4090", sm=89, sms=128, shared_memory_bytes=99 * 1024),
    120: Machine("cuda", "NVIDIA GeForce RTX 5090", "nvidia_geforce_rtx_5090", sm=120, sms=170, shared_memory_bytes=99 * 1024),
}
"""By compute capability as one number; `shared_memory_bytes` is what a block may ask for."""
