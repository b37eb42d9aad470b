"""Each kernel compiled once per dtype, device and set of optional operands, for every size: no later call compiles anything.

torch.compile is shown a small example whose sizes all differ and are all marked dynamic, so that nothing is specialised to a length, a batch or a
width. A leading size of 1, which it would specialise, is run as 2.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType

import torch
from torch import Tensor

from titans_backends.errors import BackendError

from . import kernels

__all__ = ["LAM_TRIANGLE", "SCORES", "SIDES", "TRIANGLES", "UNIT_TRIANGLE", "Kernel", "compiled_count"]

Results = tuple[Tensor, ...]
_Function = Callable[..., Results]
_Key = tuple[str, torch.dtype, torch.device, tuple[bool, ...], int, bool]

_EXAMPLE = {"N": 6, "C": 24, "K": 16, "V": 40, "1": 1}
_OPTIONS: dict[str, str | int | bool | Callable[..., object]] = {"max_autotune": False, "triton.cudagraphs": False, "compile_threads": 1}
"""One small graph each: no search, no graph replay below the caller's, no worker processes that outlive it."""

_compiled: dict[_Key, _Function] = {}
_compiling = threading.Lock()


@dataclass(frozen=True, slots=True)
class Kernel:
    """A function of `kernels` and its operands' layouts: letters, then `float64` where the dtype is not the first operand's."""

    function: _Function
    layouts: tuple[str, ...]

    def __call__(self, *operands: Tensor | None) -> Results:
        """Runs it on contiguous operands, which it may change; the first call of a kind compiles. Autograd must be off, see `plain_modes`."""
        first = operands[0]
        assert first is not None
        given = tuple(x is not None for x in operands)
        # torch compiles the number of threads and the deterministic switch in, and compiles again where they change.
        key = (self.function.__name__, first.dtype, first.device, given, torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
        run = _compiled.get(key) or self._compile(key)
        return run(*operands) if first.shape[0] > 1 else self._twice(run, operands)

    def _twice(self, run: _Function, operands: tuple[Tensor | None, ...]) -> Results:
        """A single matrix, run as a pair of equal ones."""
        leading = [x is not None and layout.startswith("N") for layout, x in zip(self.layouts, operands, strict=True)]
        pairs = [torch.cat([x, x]) if there and x is not None else x for there, x in zip(leading, operands, strict=True)]
        results = run(*pairs)
        for there, x, pair in zip(leading, operands, pairs, strict=True):
            if there and x is not None and pair is not None:
                x.copy_(pair[:1])
        return tuple(result[:1] for result in results)

    def _compile(self, key: _Key) -> _Function:
        name, dtype, device, given = key[:4]
        with _compiling:
            if key in _compiled:
                return _compiled[key]
            example = [_example(layout, dtype, device) if there else None for layout, there in zip(self.layouts, given, strict=True)]
            run = torch.compile(_own_code(self.function), fullgraph=True, dynamic=True, options=_OPTIONS)
            try:
                run(*example)
            except Exception as error:
                said = (str(error).strip() or "no message").splitlines()[0][:300]
                raise BackendError(
                    f"inductor: compiling {name} for {dtype} on {device} raised {type(error).__name__}: {said}. See: titans-backends doctor"
                ) from error
            return _compiled.setdefault(key, run)


def _example(layout: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An operand of zeros; every size but a fixed 1 is marked dynamic, and torch says so if it cannot be."""
    letters = layout.removesuffix(" float64").split()
    x = torch.zeros([_EXAMPLE[letter] for letter in letters], dtype=torch.float64 if layout.endswith("float64") else dtype, device=device)
    for axis, letter in enumerate(letters):
        if letter != "1":
            torch._dynamo.mark_dynamic(x, axis)
    return x


def _own_code(function: _Function) -> _Function:
    """The same function over a code object of its own: torch counts compilations, and limits them, per code object."""
    assert isinstance(function, FunctionType)
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__, function.__closure__)


def compiled_count() -> int:
    """How many kernels this process has compiled."""
    return len(_compiled)


_SQUARE, _K, _V, _BETA, _LOG, _MASK = "N C C", "N C K", "N C V", "N C 1", "N C 1 float64", "C C"
SCORES = Kernel(kernels.scores, (_SQUARE, _LOG, _MASK))
UNIT_TRIANGLE = Kernel(kernels.unit_triangle, (_SQUARE, _K, _V, _BETA, _LOG, _MASK))
SIDES = Kernel(kernels.sides, (_K, _V, _BETA, _LOG))
LAM_TRIANGLE = Kernel(kernels.lam_triangle, (_SQUARE, _SQUARE, _MASK))
TRIANGLES = Kernel(kernels.triangles, (_SQUARE, _SQUARE, _K, _V, _BETA, _LOG, _MASK))
