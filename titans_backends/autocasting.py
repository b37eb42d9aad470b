"""Which tensors of a call torch.autocast changes: its operands, and gates of half precision."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from titans_backends.contracts.contract import Call, Contract

__all__ = ["autocast", "cast_tensors"]


def autocast(op: Contract, call: Call) -> Call:
    """Under torch.autocast the operands take its dtype, float64 excepted; gates, decays and states stay as they are."""
    changed = cast_tensors(op, op.tensors(call))
    return op.with_tensors(call, changed) if changed else call


def cast_tensors(op: Contract, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that autocast changes; plain enough for a tracer to follow."""
    first = tensors.get(op.operands[0])
    if first is None or not torch.is_autocast_enabled(first.device.type):
        return {}
    dtype = torch.get_autocast_dtype(first.device.type)
    changed = {}
    for name, tensor in tensors.items():
        role = op.argument_by_name[name].role
        if role == "operand" and tensor.is_floating_point() and tensor.dtype != torch.float64:
            changed[name] = tensor.to(dtype)
        elif role == "gate" and tensor.dtype in (torch.float16, torch.bfloat16) and tensor.dtype != dtype:
            changed[name] = tensor.float()
    return changed
