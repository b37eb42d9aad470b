"""The walk back of gated_delta_rule's backward by Hopper's own products: the state's gradient in a warpgroup's registers (kernel in cuda/delta_reverse_hopper.cu).

Heads of 128 keys and values in bfloat16 or float16, compute capability 9.0, blocks of 64 tokens, rows that 16-byte copies can take.
"""

from __future__ import annotations

from torch import Tensor

from .delta_prepare import Rule
from .launch import DTYPES, Arg, Kernel
from .strides import aligned_rows

__all__ = ["SOURCE", "launch", "serves"]

SOURCE = "delta_reverse_hopper.cu"
REVERSE = Kernel(SOURCE, "delta_reverse_hopper", "12P9q5i")
_SQUARE, _LINES, _GROUP = 8192, 1152, 128
_STAGES = {1: 3, 2: 2}


def serves(x: Rule, d_o: Tensor | None) -> bool:
    """Whether a gradient of o arrives, and all rows lie where copies can take them."""
    return d_o is not None and all(aligned_rows(one, whole=True) for one in (x.q, x.k, d_o))


def launch(x: Rule, carriers: int, operands: tuple[Arg, ...], numbers: tuple[Arg, ...]) -> None:
    """One launch. `carriers`: 2 have a head's values together, 1 has half of them; `operands`: the pointers and strides of the other walk, then its numbers."""
    stages = _STAGES[carriers]
    REVERSE(
        (x.slots.sequences * x.heads * 2 // carriers, 1, 1),
        _GROUP * (1 + carriers),
        (("DTYPE", DTYPES[x.v.dtype]), ("CARRIERS", carriers)),
        (*operands, *numbers),
        stages * ((6 + carriers) * _SQUARE + _LINES) + carriers * 4 * _SQUARE,
    )
