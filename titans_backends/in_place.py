"""What a call that rewrites its states must keep to: no gradient, no two states in one memory, and autograd told of the change."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from titans_backends.contracts.contract import Call, Contract

__all__ = ["NO_GRADIENT", "NO_TRANSFORM", "announce_change", "expect_apart", "refuse_in_place"]

NO_GRADIENT = "{}: inplace=True takes no gradient, but an input requires one; pass inplace=False, or call it under torch.no_grad()"
NO_TRANSFORM = "{}: inplace=True takes no gradient, and no other transform of torch.func; pass inplace=False"


def refuse_in_place(op: Contract, call: Call, wrong: bool, why: str = NO_GRADIENT) -> None:
    """ValueError, with this reason, where a call is in place and something is `wrong`."""
    if wrong and getattr(call, "inplace", False):
        raise ValueError(why.format(op.name))


def announce_change(op: str, state: Tensor, name: str = "state") -> None:
    """Tells autograd that a kernel writes this tensor, which it cannot see: what was saved of it for a backward is refused there."""
    if not state.is_inference():
        torch.autograd.graph.increment_version(state)
    elif not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{op}: inplace=True would change an inference tensor outside torch.inference_mode(); pass {name}.clone(), or inplace=False"
        )


def expect_apart(op: str, states: list[Tensor]) -> None:
    """ValueError where two tensors that a call rewrites begin at one place, or one that is dense reaches into another. Interleaved slices may."""
    spans = sorted((state.data_ptr(), state.data_ptr() + (state.nbytes if state.is_contiguous() else 1)) for state in states if state.numel())
    if any(later < end for (_, end), (later, _) in pairwise(spans)):
        raise ValueError(f"{op}: two of the tensors that inplace=True would rewrite share memory; pass clones, or inplace=False")
