"""What an op and its backward return, as shapes and dtypes alone: what a tracer runs in place of a kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from titans_backends.contracts.chunks import chunk_rows
from titans_backends.contracts.contract import Contract, state_dtype
from titans_backends.contracts.validate import check_devices
from titans_backends.op_schema import unflatten
from titans_backends.plan import Outputs

__all__ = ["fake_backward", "fake_forward"]


def fake_forward(op: Contract) -> Callable[..., Outputs]:
    def fake(*flat: object) -> Outputs:
        made = unflatten(op, flat[:-4])
        tensors = op.tensors(made)
        check_devices(op, tensors)  # one tensor on meta among others brings the call here, and nothing would be computed
        sizes, first = _sizes(op, tensors), tensors[op.operands[0]]
        if any("Z" in output.dims.split() for output in op.outputs):
            sizes["Z"] = chunk_rows(first.shape[1], made.chunk_size, sizes["N"] if "cu_seqlens" in tensors else None)  # type: ignore[attr-defined, arg-type]
        outputs: list[Tensor | None] = []
        for output, asked in zip(op.outputs, op.asked(made), strict=True):
            dtype = tensors[output.like].dtype if output.like else state_dtype(first.dtype)
            if output.like is None and output.name in tensors:
                dtype = tensors[output.name].dtype
            outputs.append(first.new_empty(_shape(output.dims, sizes), dtype=dtype) if asked else None)
        return (*outputs, None)

    return fake


def fake_backward(op: Contract) -> Callable[..., Outputs]:
    count = len(op.outputs)

    def fake(*flat: object) -> Outputs:
        made, needs = unflatten(op, flat[count:-4]), flat[-3]
        assert isinstance(needs, (list, tuple))
        tensors = op.tensors(made)
        return tuple(
            torch.empty_like(tensors[name], memory_format=torch.contiguous_format) if need and name in tensors else None
            for name, need in zip(op.differentiable, needs, strict=True)
        )

    return fake


def _sizes(op: Contract, tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """The contract's letters, symbolic or not."""
    sizes: dict[str, object] = {}
    for name, tensor in tensors.items():
        layout = next(d for d in op.argument_by_name[name].dims if d.startswith("*") or len(d.split()) == tensor.dim())
        letters = layout.split()
        if letters and letters[0] == "*":
            sizes.setdefault("*", tuple(tensor.shape[: 1 - len(letters)]))
            letters = letters[1:]
        tail = tuple(tensor.shape)[tensor.dim() - len(letters) :]
        for letter, size in zip(letters, tail, strict=True):
            sizes.setdefault(letter, size)
    sizes["N"] = tensors["cu_seqlens"].shape[0] - 1 if "cu_seqlens" in tensors else sizes.get("B")
    return sizes


def _shape(layout: str, sizes: Mapping[str, object]) -> list[int]:
    shape: list[int] = []
    for letter in layout.split():
        size = sizes[letter]
        if isinstance(size, tuple):
            shape.extend(size)
        else:
            shape.append(size)  # type: ignore[arg-type]  # an int, or a tracer's SymInt
    return shape
