"""A recorded call: its launches with holes where addresses go, the memory that it takes, and which of it is handed out.

A replay allocates, fills in the addresses and launches on the current stream.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titans_backends.launching.scratch import places
from titans_backends.launching.tape import Outputs, Taped

__all__ = ["Program", "program_of"]

Args = tuple[object, ...]
_ADDRESS = Tensor.data_ptr

Address = tuple[int, int]
"""Whose memory (what was given in order, then outputs and scratch in the order taken), and the offset in bytes."""


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
    """One launch: what makes it, its arguments with holes, and what fills them: position, owner, offset in bytes."""

    launch: Callable[[int, Args], None]
    template: tuple[object, ...]
    holes: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Program:
    """A recorded call. Owners: the tensors that it was given, then `kept` allocations, then one piece of scratch.

    Of an allocation its shape, its dtype and the given tensor that is like it, or None: `empty_like` costs less than `empty` does. A call lays out one
    table: every owner's address, the addresses within owners that `shifted` lists as (owner, bytes), and the numbers; a launch picks its arguments there.
    """

    given: tuple[int, ...]
    kept: tuple[tuple[tuple[int, ...], torch.dtype, int | None], ...]
    scratch: int
    device: torch.device
    stream: Callable[[int], int]
    shifted: tuple[Address, ...]
    numbers: tuple[object, ...]
    launches: tuple[tuple[Callable[[int, Args], None], Callable[[list[Any]], Args]], ...]
    outputs: tuple[Output | None, ...]

    def __call__(self, values: Sequence[object]) -> Outputs:
        """The outputs of the same kernels on these tensors."""
        owners: list[Any] = [values[index] for index in self.given]
        for shape, dtype, like in self.kept:
            owners.append(torch.empty(shape, dtype=dtype, device=self.device) if like is None else torch.empty_like(owners[like]))
        if self.scratch:
            owners.append(torch.empty(self.scratch, dtype=torch.uint8, device=self.device))
        table: list[Any] = list(map(_ADDRESS, owners))
        if self.shifted:
            table += [table[owner] + offset for owner, offset in self.shifted]
        table += self.numbers
        stream = self.stream(self.device.index)
        for launch, pick in self.launches:
            launch(stream, pick(table))
        return tuple([None if out is None else owners[out.owner] if out.whole else _view(owners[out.owner], out) for out in self.outputs])


def _view(owner: Tensor, out: Output) -> Tensor:
    return owner.as_strided(out.shape, out.stride, out.offset)


def program_of(
    launches: Sequence[Taped], taken: Sequence[Tensor], values: Sequence[object], outputs: Outputs, stream: Callable[[int], int]
) -> Program | None:
    """The program of a call that was given `values`, took the memory `taken` and returned `outputs`; None where its addresses cannot be told."""
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
    inner = [one for one in taken if not any(one is held for held in kept)]
    owners, last = [*tensors, *kept], len(tensors) + len(kept)
    steps = _steps(launches, owners, inner)
    results = _results(outputs, owners, len(tensors))
    if steps is None or results is None:
        return None
    spans = [_span(steps, last + piece) for piece in range(len(inner))]
    laid, scratch = places([one.untyped_storage().nbytes() for one in inner], spans)

    def moved(owner: int, offset: int) -> Address:
        return (owner, offset) if owner < last else (last, laid[owner - last] + offset)

    steps = [Launch(step.launch, step.template, tuple((at, *moved(owner, offset)) for at, owner, offset in step.holes)) for step in steps]
    given = tuple(index for index, value in enumerate(values) if isinstance(value, Tensor))
    shapes = tuple((tuple(one.shape), one.dtype, _like(one, tensors)) for one in kept)
    count = last + bool(scratch)
    shifted = tuple(dict.fromkeys((owner, offset) for step in steps for _, owner, offset in step.holes if offset))
    entries: dict[object, int] = {(owner, 0): owner for owner in range(count)}
    entries |= {address: count + index for index, address in enumerate(shifted)}
    numbers: list[object] = []
    picks = tuple((step.launch, _picking(step, entries, numbers, count + len(shifted))) for step in steps)
    return Program(given, shapes, scratch, tensors[0].device, stream, shifted, tuple(numbers), picks, results)


def _picking(step: Launch, entries: dict[object, int], numbers: list[object], first: int) -> Callable[[list[Any]], Args]:
    """What takes a launch's arguments from the table; numbers that are new there are added, from entry `first` on."""
    filled = {position: entries[owner, offset] for position, owner, offset in step.holes}
    order = []
    for position, number in enumerate(step.template):
        if position not in filled:
            key = (type(number), repr(number))  # 1 is not 1.0, nor 0.0 -0.0
            if key not in entries:
                entries[key] = first + len(numbers)
                numbers.append(number)
            filled[position] = entries[key]
        order.append(filled[position])
    if len(order) > 1:
        return operator.itemgetter(*order)
    return lambda table: tuple(table[entry] for entry in order)


def _steps(launches: Sequence[Taped], owners: Sequence[Tensor], inner: Sequence[Tensor]) -> list[Launch] | None:
    """The launches with holes for addresses; each piece of scratch is an owner of its own as yet."""
    steps = []
    for taped in launches:
        template: list[object] = list(taped.args)
        holes: list[tuple[int, int, int]] = []
        for position, arg in enumerate(taped.args):
            if isinstance(arg, Tensor):
                found = _address(arg, owners, inner)
                if found is None:
                    return None
                holes.append((position, *found))
                template[position] = 0
        steps.append(Launch(taped.launch, tuple(template), tuple(holes)))
    return steps


def _address(tensor: Tensor, owners: Sequence[Tensor], inner: Sequence[Tensor]) -> Address | None:
    for index, owner in enumerate(owners):
        if tensor is owner:
            return index, 0
    sharing = [index for index, owner in enumerate(owners) if _same_memory(owner, tensor)]
    if len(sharing) == 1:
        return sharing[0], tensor.data_ptr() - owners[sharing[0]].data_ptr()
    for index, one in enumerate(inner):
        if _same_memory(one, tensor):
            return len(owners) + index, tensor.data_ptr() - one.data_ptr()
    return None


def _results(outputs: Outputs, owners: Sequence[Tensor], given: int) -> tuple[Output | None, ...] | None:
    results: list[Output | None] = []
    for out in outputs:
        if out is None:
            results.append(None)
            continue
        index = next((i for i, owner in enumerate(owners) if out is owner), None)
        if index is None:
            index = next(i for i, owner in enumerate(owners) if i >= given and _same_memory(owner, out))
        owner = owners[index]
        if out.dtype != owner.dtype:
            return None
        whole = out.shape == owner.shape and out.stride() == owner.stride()
        results.append(Output(index, tuple(out.shape), out.stride(), int(out.storage_offset()), whole))
    return tuple(results)


def _span(steps: Sequence[Launch], owner: int) -> range:
    """Between which launches a piece of scratch is needed."""
    used = [index for index, step in enumerate(steps) if any(one == owner for _, one, _ in step.holes)]
    return range(used[0], used[-1] + 1) if used else range(0)


def _like(made: Tensor, tensors: Sequence[Tensor]) -> int | None:
    """The first tensor whose `empty_like` is what was made."""
    plain = [one.is_contiguous() and (one.shape, one.dtype, one.device) == (made.shape, made.dtype, made.device) for one in tensors]
    return plain.index(True) if made.is_contiguous() and True in plain else None


def _same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are views of one piece of memory."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() and one.untyped_storage().nbytes() > 0
