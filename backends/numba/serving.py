"""What every op of this backend refuses, and the one door that 16-bit operands come in by: they are widened to float32, and results narrowed again."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import ACCEPTED, Verdict, refused

from .settings import power_of_two
from .target import SIMULATED

__all__ = ["gradients", "refuse_chunk", "refuse_training", "serves", "wide"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST = 256
_OLDEST_SM = 70
_MOST_HEADS = 65535


def serves(signature: Signature, machine: Machine) -> Verdict:
    """Dtype, head_dim, card, and not in the simulator; every reason, each with what would do."""
    verdict = ACCEPTED
    if SIMULATED:
        verdict &= refused("NUMBA_ENABLE_CUDASIM is set, so its kernels would run in Python on the CPU; unset it, or pass backend='eager'")
    if signature.dtype not in _DTYPES:
        verdict &= refused(f"dtype {str(signature.dtype).removeprefix('torch.')} is not in {{bfloat16, float16, float32}}; use backend='eager'")
    if machine.sm is not None and machine.sm < _OLDEST_SM:
        verdict &= refused(f"it needs compute capability 7.0, and {machine.name} has {machine.sm // 10}.{machine.sm % 10}")
    sizes = dict(signature.dims)
    for letter in "KV":
        if not 1 <= sizes.get(letter, 1) <= _WIDEST:
            verdict &= refused(f"head_dim {letter}={sizes[letter]} is not in 1 to {_WIDEST}; use backend='eager'")
    if sizes.get("H", 0) > _MOST_HEADS:
        verdict &= refused(f"H={sizes['H']} heads are above {_MOST_HEADS}; use backend='eager'")
    return verdict


def refuse_chunk(signature: Signature, largest: int) -> Verdict:
    """Refuses a chunk whose triangle would not fit a block's shared memory."""
    asked = int(signature.option("chunk_size") or 0)
    if power_of_two(max(1, min(asked, signature.dim("T")))) > largest:
        return refused(
            f"chunk_size={asked} over T={signature.dim('T')}: the triangle of a chunk has to fit a block's 48 KiB of shared memory; "
            f"pass chunk_size={largest} or less, or backend='eager'"
        )
    return ACCEPTED


def refuse_training(signature: Signature, **present: bool) -> Verdict:
    """Refuses to train with the options named, where they are there."""
    found = [name for name, here in present.items() if here]
    if signature.regime == "training" and found:
        return refused(f"its backward does not take {', '.join(found)}; use backend='eager' to train")
    return ACCEPTED


def wide(x: Tensor) -> Tensor:
    """The tensor in float32: itself, or a copy of 16-bit numbers."""
    return x.detach().float()


def gradients(call: object, names: tuple[str, ...], found: dict[str, Tensor], needs: frozenset[str]) -> tuple[Tensor | None, ...]:
    """The gradients in that order and in their inputs' dtypes; None for what `needs` leaves out."""
    return tuple(found[name].to(getattr(call, name).dtype) if name in needs else None for name in names)
