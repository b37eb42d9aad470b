"""The last pass of gated_delta_rule's backward by Hopper's own products: every input's gradient from what the walks left (kernel in cuda/delta_gradients_hopper.cu).

Heads of 128 keys and values in bfloat16 or float16, compute capability 9.0. It computes every gradient of its; where one of its operands is not there
(frozen inputs, no gradient of o), or rows lie where no 16-byte copy takes them, the pass of every card serves instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.machine import Machine
from titans_backends.signature import Signature

from .delta_prepare import Rule
from .launch import DTYPES, Arg, Kernel
from .strides import aligned_rows

__all__ = ["SIDE", "SOURCE", "is_offered", "launch", "serves"]

SOURCE = "delta_gradients_hopper.cu"
HOPPER = Kernel(SOURCE, "delta_gradients_hopper", "17P21q10if")
SIDE = 64
"""Tokens of a block."""
_SM, _WIDTH, _THREADS = 90, 128, 384
_BYTES = 2 * 8 * 8192 + 4 * 16384 + 2 * 8192 + (2 * 1040 + 6 * 64) * 4
"""Dynamic shared memory of a block: two stages, rows of q and k, as they are and weighed, two squares, lines."""


def is_offered(signature: Signature, machine: Machine) -> bool:
    """Whether a card has it for a call's heads and dtype."""
    wide = signature.dim("K") == signature.dim("V") == _WIDTH and signature.dtype in (torch.bfloat16, torch.float16)
    return wide and machine.sm == _SM and (machine.shared_memory_bytes or 0) >= _BYTES


def serves(x: Rule, d_o: Tensor | None, kept: tuple[Tensor | None, ...]) -> bool:
    """Whether a call has all that it reads, where it can read it."""
    return d_o is not None and all(one is not None for one in kept) and all(aligned_rows(one, whole=True) for one in (x.q, x.k, x.v, d_o))


def launch(x: Rule, blocks: int, operands: tuple[Arg, ...], numbers: tuple[Arg, ...]) -> None:
    """One launch of at most `blocks` blocks. `operands`: the pointers and strides of the other pass, `numbers` what follows them in both."""
    items = x.places // x.group
    HOPPER(
        (min(items, blocks), 1, 1),
        _THREADS,
        (("DTYPE", DTYPES[x.v.dtype]), ("NORMALIZED", x.l2norm)),
        (*operands, *numbers, items, x.scale),
        _BYTES,
    )
