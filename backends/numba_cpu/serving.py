"""Which calls the Numba kernels serve: float32 on a CPU, forward, within the scratch of a chunk's square matrices. Every refusal says what to type."""

from __future__ import annotations

import torch

from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import ACCEPTED, Verdict, refused

__all__ = ["LARGEST_CHUNK", "refuse_chunk", "serves", "tokens_are_less"]

LARGEST_CHUNK = 512
"""Tokens of the largest chunk whose C x C matrices one worker keeps: three of them take 3 MiB."""


def serves(signature: Signature, machine: Machine) -> Verdict:
    """float32 tensors on a CPU, in 32-bit steps."""
    verdict = ACCEPTED
    if machine.kind != "cpu":
        verdict &= refused(f"it runs on cpu, not on {machine.kind}")
    wrong = [f"{name} is {_name(facts.dtype)}" for name, facts in signature.tensors if facts.dtype.is_floating_point and facts.dtype != torch.float32]
    if wrong:
        verdict &= refused(f"its kernels are written for float32 and {', '.join(wrong)}: convert with .float(), or pass backend='eager'")
    return verdict


def _longest_chunk(signature: Signature) -> int:
    """Tokens of the longest chunk: under batch invariance the asked ones, since T is what shares the batch."""
    asked = int(signature.option("chunk_size") or 0)
    return asked if signature.batch_invariant else min(asked, signature.dim("T"))


def refuse_chunk(signature: Signature) -> Verdict:
    """Refuses a chunk whose square matrices would not fit a worker's scratch."""
    asked = int(signature.option("chunk_size") or 0)
    if _longest_chunk(signature) > LARGEST_CHUNK:
        return refused(
            f"chunk_size={asked} over T={signature.dim('T')}: these options need a matrix of chunk_size x chunk_size, here at most "
            f"{LARGEST_CHUNK} x {LARGEST_CHUNK}; pass chunk_size={LARGEST_CHUNK} or less, or backend='eager'"
        )
    return ACCEPTED


def tokens_are_less(signature: Signature) -> bool:
    """Whether S_fast is less work as a running state, 5 K V FLOP per token, than as a chunk's products, C (K + V)."""
    keys, values = signature.dim("K"), signature.dim("V")
    return 5 * keys * values < _longest_chunk(signature) * (keys + values)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
