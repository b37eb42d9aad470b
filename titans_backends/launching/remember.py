"""What a call launches, remembered: the second call of the same shapes runs the kernels without the Python that decided on them.

The first call of a key runs as written and is recorded: its launches, the memory that it took and the views of it. A call that did anything else
with a tensor (a copy of a strided input, say) is not repeated, and one whose launches are only collected is not recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from titans_backends.backend import Candidate
from titans_backends.launching.program import Program, program_of
from titans_backends.launching.tape import Again, AgainBackward, Outputs, Taping, Values

__all__ = ["Remember", "RememberBackward", "Run", "RunBackward", "from_values", "remembering", "remembering_backward"]

Run = Callable[[Any, Candidate], Outputs]
Remember = Callable[[Any, Candidate], tuple[Outputs, Again | None]]
Saved = Tensor | tuple[Tensor, ...] | None
RunBackward = Callable[[Any, Outputs, Saved, frozenset[str], Candidate], Outputs]
RememberBackward = Callable[[Any, Outputs, Saved, frozenset[str], Candidate], tuple[Outputs, AgainBackward | None]]

_VIEWS = frozenset(
    ["view", "_unsafe_view", "slice", "select", "split", "as_strided", "expand", "unsqueeze", "squeeze", "transpose", "permute", "alias", "detach",
     "unbind", "_reshape_alias", "unflatten", "narrow", "split_with_sizes", "t"]
)  # fmt: skip
_EMPTY = frozenset(["empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"])


def remembering(taping: Taping[Any], run: Run) -> Remember:
    """An op module's `remember`, from its `run`."""

    def remember(call: Any, candidate: Candidate) -> tuple[Outputs, Again | None]:
        """The outputs, and what repeats the call for other values of the same facts: None where it cannot be told from the launches alone."""
        return _record(taping, lambda: run(call, candidate), _values(call))

    return remember


def remembering_backward(taping: Taping[Any], run_backward: RunBackward) -> RememberBackward:
    """An op module's `remember_backward`, from its `run_backward`."""

    def remember_backward(
        call: Any, grads: Outputs, states: Saved, needs: frozenset[str], candidate: Candidate
    ) -> tuple[Outputs, AgainBackward | None]:
        """The gradients, and what repeats them for other values of the same facts and the same needs, or None."""
        found, program = _record(taping, lambda: run_backward(call, grads, states, needs, candidate), (*_values(call), *grads, *_each(states)))
        return found, None if program is None else lambda later, arriving, saved: program((*later, *arriving, *_each(saved)))

    return remember_backward


def from_values(make_call: Callable[..., Any], again: Callable[[Any], Outputs]) -> Again:
    """What repeats a call from its values, for a module whose `again` wants them as the op's argument class."""
    names = tuple(field.name for field in fields(make_call))  # type: ignore[arg-type]  # a dataclass by contract
    return lambda values: again(make_call(**dict(zip(names, values, strict=True))))


def _each(saved: Saved) -> tuple[Tensor | None, ...]:
    """Saved states, or the tensors of a residual, side by side."""
    return saved if isinstance(saved, tuple) else (saved,)


def _values(call: Any) -> Values:
    return tuple(getattr(call, field.name) for field in fields(call))


class _Watch(TorchDispatchMode):
    """Sees every torch operation of a recorded call: memory taken is noted, views pass, anything else ends the recording."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
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


def _record(taping: Taping[Any], run: Callable[[], Outputs], values: Values) -> tuple[Outputs, Program | None]:
    """One run as written, on `values`, with the program that repeats it on others, or None."""
    if taping.is_collecting or _repeated(values):
        return run(), None
    with taping.taping() as tape, _Watch() as watch:
        outputs = run()
    if not watch.plain or not tape.launches:
        return outputs, None
    return outputs, program_of(tape.launches, watch.taken, values, outputs, taping.streams())


def _repeated(values: Values) -> bool:
    """Whether one tensor stands for two inputs: which of them an address came from could not be told, and the key does not say it."""
    tensors = [id(value) for value in values if isinstance(value, Tensor)]
    return len(set(tensors)) < len(tensors)
