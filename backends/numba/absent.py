"""What stands for a tensor that was not given: one number that is read wherever the kernel looks (all strides are 0).

So a kernel has no branch for an absent gate, decay or state. The numbers are made once per device and never written.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["given_or", "nothing", "unity"]


def nothing(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A zero read as a tensor of that shape, on the device of `like`."""
    return _number(0, dtype, like.device).expand(shape)


def unity(like: Tensor, *shape: int) -> Tensor:
    """A one read as a tensor of that shape, on the device of `like`."""
    return _number(1, torch.float32, like.device).expand(shape)


def given_or(given: Tensor | None, instead: Tensor) -> Tensor:
    """The tensor in float32, or what stands for it."""
    return instead if given is None else given.float()


def _number(value: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _made(value, dtype, device)  # this memory is the graph's own, and goes with it
    return _remembered(value, dtype, device)


def _made(value: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=dtype, device=device)


_remembered = functools.lru_cache(maxsize=64)(_made)
