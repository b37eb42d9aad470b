"""What a call launches, remembered: the second call of the same shapes runs the kernels without the Python that decided on them.

The first call of a key runs as written and is recorded: its launches, the memory that it took and the views of it. A call that did anything else
with a tensor (a copy of a strided input, say) is not replayed, and one whose launches are only collected is not recorded. A replay allocates, fills
in the addresses and launches on the current stream. Its scratch is one block, in which pieces that no launch needs at the same time share a place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
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
        outputs, program = _record(lambda: run(call, candidate), _values(call))
        if program is None:
            return outputs, None
        getter = _GETTERS[call.__class__]
        return outputs, lambda later: program(getter(later))

    return remember


def remembering_backward(run_backward: RunBackward) -> RememberBackward:
    """An op module's `remember_backward`, from its `run_backward`."""

    def remember_backward(
        call: Any, grads: Outputs, states: Tensor | None, needs: frozenset[str], candidate: Candidate
    ) -> tuple[Outputs, AgainBackward | None]:
        """The gradients, and what repeats them for other tensors of the same facts and the same needs, or None."""
        found, program = _record(lambda: run_backward(call, grads, states, needs, candidate), (*_values(call), *grads, states))
        if program is None:
            return found, None
        getter = _GETTERS[call.__class__]
        return found, lambda later, arriving, saved: program((*getter(later), *arriving, saved))

    return remember_backward


_GETTERS: dict[type, Callable[[object], tuple[object, ...]]] = {}


def _values(call: Any) -> tuple[object, ...]:
    kind = call.__class__
    getter = _GETTERS.get(kind)
    if getter is None:
        getter = _GETTERS[kind] = operator.attrgetter(*(field.name for field in fields(kind)))
    return getter(call)


def _repeated(values: tuple[object, ...]) -> bool:
    """Whether one tensor stands for two inputs: which of them an address came from could not be told, and the key does not say it."""
    tensors = [id(value) for value in values if isinstance(value, Tensor)]
    return len(set(tensors)) < len(tensors)


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
    """One launch: the compiled form, its blocks, its arguments with holes, and what fills them: position, owner, offset in bytes."""

    form: launch.Loaded
    blocks: int
    template: tuple[object, ...]
    holes: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Program:
    """A recorded call. Owners: the tensors that it was given, then `kept` allocations, then one piece of scratch."""

    given: tuple[int, ...]
    kept: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    scratch: int
    device: torch.device
    launches: tuple[Launch, ...]
    outputs: tuple[Output | None, ...]

    def __call__(self, values: tuple[object, ...]) -> Outputs:
        """The outputs of the same kernels on these tensors."""
        owners: list[Any] = [values[index] for index in self.given]
        owners += [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in self.kept]
        if self.scratch:
            owners.append(torch.empty(self.scratch, dtype=torch.uint8, device=self.device))
        base = [owner.data_ptr() for owner in owners]
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        for step in self.launches:
            run, function, packed = step.form
            args = list(step.template)
            for position, owner, offset in step.holes:
                args[position] = base[owner] + offset
            run(step.blocks, 1, 1, stream, function, packed, None, None, None, *args)
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
    if launch.is_collecting() or _repeated(values):
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
        if base is None:
            return None
        if not any(base is one for one in kept):
            kept.append(base)
    inner = [one for one in taken if not any(one is held for held in kept)]
    owners, last = [*tensors, *kept], len(tensors) + len(kept)

    def address(tensor: Tensor) -> Address | None:
        for index, owner in enumerate(owners):
            if tensor is owner:
                return index, 0
        sharing = [index for index, owner in enumerate(owners) if _same_memory(owner, tensor)]
        if len(sharing) == 1:
            return sharing[0], tensor.data_ptr() - owners[sharing[0]].data_ptr()
        for index, one in enumerate(inner):
            if _same_memory(one, tensor):
                return last + index, tensor.data_ptr() - one.data_ptr()
        return None

    steps: list[Launch] = []
    for taped in launches:
        template: list[object] = []
        holes: list[tuple[int, int, int]] = []
        for position, arg in enumerate(taped.args):
            if isinstance(arg, Tensor):
                found = address(arg)
                if found is None:
                    return None
                holes.append((position, *found))
                template.append(None)
            else:
                template.append(arg)
        steps.append(Launch(taped.form, taped.blocks, (*template, *taped.unused), tuple(holes)))
    places, scratch = _packed([one.untyped_storage().nbytes() for one in inner], _spans(steps, last, len(inner)))
    steps = [replace(step, holes=tuple((at, *_moved(owner, offset, last, places)) for at, owner, offset in step.holes)) for step in steps]
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
    device = tensors[0].device
    shapes = tuple((tuple(one.shape), one.dtype) for one in kept)
    if any(not one.is_contiguous() for one in kept):
        return None
    return Program(tuple(given), shapes, scratch, device, tuple(steps), tuple(results))


def _spans(steps: list[Launch], last: int, count: int) -> list[range]:
    """Between which launches each piece of scratch is needed: owners from `last` on."""
    used = [[index for index, step in enumerate(steps) if any(owner == last + piece for _, owner, _ in step.holes)] for piece in range(count)]
    return [range(found[0], found[-1] + 1) if found else range(0) for found in used]


def _packed(sizes: list[int], spans: list[range]) -> tuple[list[int], int]:
    """Where each piece lies in one block of scratch, and the block's size: pieces that no launch needs both of may lie in the same place.

    The largest first, each at the lowest address that is free while it is needed. Launches of one stream run one after the other.
    """
    places, end = [0] * len(sizes), 0
    laid: list[int] = []
    for piece in sorted((index for index, span in enumerate(spans) if span), key=lambda index: -sizes[index]):
        beside = [one for one in laid if spans[one].start < spans[piece].stop and spans[piece].start < spans[one].stop]
        place = 0
        for one in sorted(beside, key=places.__getitem__):
            if place + sizes[piece] <= places[one]:
                break
            place = max(place, -(-(places[one] + sizes[one]) // _PAGE) * _PAGE)
        places[piece], end = place, max(end, place + sizes[piece])
        laid.append(piece)
    return places, end


def _moved(owner: int, offset: int, last: int, places: list[int]) -> Address:
    return (owner, offset) if owner < last else (last, places[owner - last] + offset)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are views of one piece of memory."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() and one.untyped_storage().nbytes() > 0
