"""A registered op under `torch.func`: its gradient by the op's own formula, `vmap` by a call for each slice, forward mode refused by a sentence.

Entered only while a transform is active, so that no other call pays for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

import torch
from torch import Tensor

__all__ = ["NO_FORWARD_MODE", "one_slice", "transformable"]

Outputs = tuple[Tensor | None, ...]
_NO_SLICE = "{}: torch.func.vmap over a dimension of size 0 has nothing to run; leave the call out there"
NO_FORWARD_MODE = "{}: it has no forward-mode derivative (dual tensors, jvp, jacfwd); use reverse mode: torch.autograd.grad, torch.func.grad, jacrev"


def one_slice(op: str, tensor: Tensor) -> Tensor:
    """What a kernel would be given of a tensor that transforms have wrapped: the first slice of what is mapped, without what tracks its gradient.

    ValueError where there is no slice.
    """
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        inner, place = functorch.get_unwrapped(tensor), functorch.maybe_get_bdim(tensor) if functorch.is_batchedtensor(tensor) else None
        if place is not None and not inner.shape[place]:
            raise ValueError(_NO_SLICE.format(op))
        tensor = inner if place is None else inner.select(place, 0)
    return tensor


class _Mapped(Protocol):
    """What functorch says of a mapped dimension."""

    @property
    def batch_size(self) -> int:
        """Its size."""


def transformable(name: str, setup: Callable[..., None], backward: Callable[..., object]) -> type[torch.autograd.Function]:
    """The op of that name as an autograd function that functorch can transform; `torch.library`'s own formula it cannot."""
    told = name.removesuffix("_backward")

    def forward(*flat: object) -> object:
        return getattr(torch.ops.titans_backends, name)(*flat)

    def vmap(info: _Mapped, in_dims: Sequence[object], *flat: object) -> tuple[Outputs, tuple[int | None, ...]]:
        if not info.batch_size:
            raise ValueError(_NO_SLICE.format(told))
        slices: list[Outputs] = [made.apply(*_slice(flat, in_dims, index)) for index in range(info.batch_size)]
        outputs = tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*slices, strict=True))  # None in all, or in none
        return outputs, tuple(None if output is None else 0 for output in outputs)

    def jvp(ctx: object, *tangents: object) -> NoReturn:
        raise NotImplementedError(NO_FORWARD_MODE.format(told))

    loop = torch.compiler.disable(vmap)  # a frame of its own, which Dynamo would take up behind a broken graph, and cannot
    rules: dict[str, Callable[..., object]] = {"forward": forward, "setup_context": setup, "backward": backward, "vmap": loop, "jvp": jvp}
    made: type[torch.autograd.Function] = type(f"{name}_functorch", (torch.autograd.Function,), {key: staticmethod(rules[key]) for key in rules})
    return made


def _slice(flat: Sequence[object], in_dims: Sequence[object], index: int) -> list[object]:
    """The arguments of one slice; what is not mapped is the same in all of them."""
    return [
        value.select(dim, index) if isinstance(value, Tensor) and isinstance(dim, int) else value for value, dim in zip(flat, in_dims, strict=True)
    ]
