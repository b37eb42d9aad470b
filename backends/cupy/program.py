"""What a call launches, remembered: the second call of the same shapes runs the kernels without the Python that decided on them.

The first call of a key runs as written and is recorded: its launches, the memory that it took and the views of it. A call that did anything else
with a tensor (a copy of a strided input, say) is not replayed, and one whose launches are only collected is not recorded. A replay allocates, fills
in the addresses and launches on the current stream.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from titans_backends.backend import Candidate

from . import launch

__all__ = ["Again", "AgainBackward", "Remember", "RememberBackward", "Run", "RunBackward", "remembering", "remembering_backward"]

Outputs = tuple[Tensor | None, ...]
Run = Callable[[Any, Candidate], Outputs]
Again = Callable[[Any], Outputs]
Remember = Callable[[Any, Candidate], tuple[Outputs, Again | None]]
RunBackward = Callable[[Any, Outputs, Tensor | None, frozenset[str], Candidate], Outputs]
AgainBackward = Callable[[Any, Outputs, Tensor | None], Outputs]
RememberBackward = Callable[[Any, Outputs, Tensor | None, frozenset[str], Candidate], tuple[Outputs, AgainBackward | None]]
Address = tuple[int, int]
"""Whose memory (what was given in order, then outputs and scratch in the order taken), and the offset in bytes."""

_PAGE = 256
_VIEWS = frozenset(
    ["view", "_unsafe_view", "slice", "select", "split", "as_strided", "expand", "unsqueeze", "squeeze", "transpose", "permute", "alias", "detach",
     "unbind", "_reshape_alias", "unflatten", "narrow", "split_with_sizes", "t"]
)  # fmt: skip
_EMPTY = frozenset(["empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"])


def remembering(run: Run) -> Remember:
    """An op module's `remember`, from its `run`."""

    def remember(call: Any, candidate: Candidate) -> tuple[Outputs, Again | None]:
        """The outputs, and what repeats the call for other tensors of the same facts: None where it cannot be told from the launches alone."""
        getter = operator.attrgetter(*(field.name for field in fields(call.__class__)))
        outputs, program = _record(lambda: run(call, candidate), getter(call))
        return outputs, None if program is None else lambda later: program(getter(later))

    return remember


def remembering_backward(run_backward: RunBackward) -> RememberBackward:
    """An op module's `remember_backward`, from its `run_backward`."""

    def remember_backward(
        call: Any, grads: Outputs, states: Tensor | None, needs: frozenset[str], candidate: Candidate
    ) -> tuple[Outputs, AgainBackward | None]:
        """The gradients, and what repeats them for other tensors of the same facts and the same needs, or None."""
        getter = operator.attrgetter(*(field.name for field in fields(call.__class__)))
        found, program = _record(lambda: run_backward(call, grads, states, needs, candidate), (*getter(call), *grads, states))
        return found, None if program is None else lambda later, arriving, saved: program((*getter(later), *arriving, saved))

    return remember_backward


@dataclass(frozen=True, slots=True)
class Output:
    """A result: one of the call's own tensors, or memory of ours as it was shaped."""

    owner: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    whole: bool


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: the loaded form, its shape, its values with holes, and what fills them: position, owner, offset in bytes."""

    loaded: launch.Loaded
    blocks: launch.Blocks
    threads: int
    shared: int
    layout: struct.Struct
    template: tuple[object, ...]
    holes: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Program:
    """A recorded call. Owners: the tensors that it was given, then `kept` allocations, then one piece of scratch.

    Of an allocation its shape, its dtype and the given tensor that is like it, or None: `empty_like` costs half of what `empty` does.
    """

    given: tuple[int, ...]
    kept: tuple[tuple[tuple[int, ...], torch.dtype, int | None], ...]
    scratch: int
    device: torch.device
    stream: Callable[[int], int]
    launches: tuple[Launch, ...]
    outputs: tuple[Output | None, ...]

    def __call__(self, values: tuple[object, ...]) -> Outputs:
        """The outputs of the same kernels on these tensors."""
        owners: list[Any] = [values[index] for index in self.given]
        for shape, dtype, like in self.kept:
            owners.append(torch.empty(shape, dtype=dtype, device=self.device) if like is None else torch.empty_like(owners[like]))
        if self.scratch:
            owners.append(torch.empty(self.scratch, dtype=torch.uint8, device=self.device))
        base = [owner.data_ptr() for owner in owners]
        stream = self.stream(self.device.index)
        for step in self.launches:
            packed = list(step.template)
            for position, owner, offset in step.holes:
                packed[position] = base[owner] + offset
            step.loaded(step.blocks, step.threads, step.shared, stream, step.layout, packed)
        return tuple([None if out is None else _made(owners[out.owner], out) for out in self.outputs])


def _made(owner: Tensor, out: Output) -> Tensor:
    return owner if out.whole else owner.as_strided(out.shape, out.stride, out.offset)


class _Watch(TorchDispatchMode):
    """Sees every torch operation of a recorded call: memory taken is noted, views pass, anything else ends the recording."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[Tensor] = []
        self.plain = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in _EMPTY:
            self.taken.append(result)
        elif name not in _VIEWS:
            self.plain = False
        return result


def _record(run: Callable[[], Outputs], values: tuple[object, ...]) -> tuple[Outputs, Program | None]:
    """One run as written, on `values`, with the program that repeats it on others, or None."""
    given = [id(value) for value in values if isinstance(value, Tensor)]
    if launch.is_collecting() or len(set(given)) < len(given):  # one tensor for two inputs: which of them an address came from could not be told
        return run(), None
    with launch.taping() as tape, _Watch() as watch:
        outputs = run()
    if not watch.plain or not tape.launches:
        return outputs, None
    return outputs, _program(tape.launches, watch.taken, values, outputs)


def _program(launches: list[launch.Taped], taken: list[Tensor], values: tuple[object, ...], outputs: Outputs) -> Program | None:
    given = [index for index, value in enumerate(values) if isinstance(value, Tensor)]
    tensors = [value for value in values if isinstance(value, Tensor)]
    kept: list[Tensor] = []
    for out in outputs:
        if out is None or any(out is tensor for tensor in tensors):
            continue
        base = next((one for one in taken if _same_memory(one, out)), None)
        if base is None or not base.is_contiguous():
            return None
        if not any(base is one for one in kept):
            kept.append(base)
    inner, scratch = [one for one in taken if not any(one is held for held in kept)], 0
    places: list[int] = []
    for one in inner:
        places.append(scratch)
        scratch += -(-one.untyped_storage().nbytes() // _PAGE) * _PAGE
    owners, last = [*tensors, *kept], len(tensors) + len(kept)

    def address(tensor: Tensor) -> Address | None:
        for index, owner in enumerate(owners):
            if tensor is owner:
                return index, 0
        sharing = [index for index, owner in enumerate(owners) if _same_memory(owner, tensor)]
        if len(sharing) == 1:
            return sharing[0], tensor.data_ptr() - owners[sharing[0]].data_ptr()
        for one, place in zip(inner, places, strict=True):
            if _same_memory(one, tensor):
                return last, place + tensor.data_ptr() - one.data_ptr()
        return None

    steps: list[Launch] = []
    for taped in launches:
        template: list[object] = []
        holes: list[tuple[int, int, int]] = []
        for position, arg in enumerate(taped.values):
            if isinstance(arg, Tensor):
                found = address(arg)
                if found is None:
                    return None
                holes.append((position, *found))
                template.append(0)
            else:
                template.append(arg or 0)
        steps.append(Launch(taped.loaded, taped.blocks, taped.threads, taped.shared, taped.layout, tuple(template), tuple(holes)))
    results: list[Output | None] = []
    for out in outputs:
        if out is None:
            results.append(None)
            continue
        index = next((i for i, owner in enumerate(owners) if out is owner), None)
        if index is None:
            index = next(i for i, owner in enumerate(owners) if i >= len(tensors) and _same_memory(owner, out))
        owner = owners[index]
        whole = out.shape == owner.shape and out.stride() == owner.stride() and out.dtype == owner.dtype
        if not whole and out.dtype != owner.dtype:
            return None
        results.append(Output(index, tuple(out.shape), out.stride(), out.storage_offset(), whole))
    shapes = tuple((tuple(one.shape), one.dtype, _like(one, tensors)) for one in kept)
    return Program(tuple(given), shapes, scratch, tensors[0].device, launch.current().stream, tuple(steps), tuple(results))


def _like(made: Tensor, tensors: list[Tensor]) -> int | None:
    """The first tensor whose `empty_like` is what was made."""
    plain = [one.is_contiguous() and (one.shape, one.dtype, one.device) == (made.shape, made.dtype, made.device) for one in tensors]
    return plain.index(True) if made.is_contiguous() and True in plain else None


def _same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are views of one piece of memory."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() and one.untyped_storage().nbytes() > 0
