"""Each kernel compiled once per dtype, device and set of optional operands, for every size: no later call compiles anything.

torch.compile is shown a small example whose sizes all differ and are all marked dynamic, so that nothing is specialised to a length, a batch or a
width. Sizes 0 and 1 it would specialise: `supports` keeps them out, except a single chunk of a single head, which is run twice.
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

__all__ = ["LAM_UW", "SCALED_SIDES", "SCORES", "TRIANGLES", "UNIT_TRIANGLE", "Kernel", "compiled_count"]

_EXAMPLE = {"N": 6, "C": 24, "2C": 48, "K": 16, "V": 40, "1": 1}
_OPTIONS: dict[str, str | int | bool] = {"max_autotune": False, "triton.cudagraphs": False, "compile_threads": 1}
"""One small graph each: no search, no worker processes that outlive it, and no graph replay below ours."""

Results = tuple[Tensor, ...]
_Key = tuple[str, torch.dtype, torch.device, tuple[bool, ...], int, bool]
_compiled: dict[_Key, Callable[..., Results]] = {}
_compiling = threading.Lock()


@dataclass(frozen=True, slots=True)
class Kernel:
    """A function of `kernels` and its operands' layouts; `wide` names the one in float64, which may be None."""

    function: Callable[..., Results]
    layouts: tuple[str, ...]

    def __call__(self, *operands: Tensor | None) -> Results:
        """Runs it on `[N, C, *]` operands; the first call of a kind compiles. Needs torch's autograd to be off, as it is inside a backend."""
        first = operands[0]
        assert first is not None
        given = tuple(x is not None for x in operands)
        # Torch compiles the number of threads and the deterministic switch in, and guards them.
        key = (self.function.__name__, first.dtype, first.device, given, torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
        run = _compiled.get(key)
        if run is None:
            run = self._compile(key)
        if first.shape[0] == 1:
            return tuple(result[:1] for result in run(*(None if x is None else torch.cat([x, x]) for x in operands)))
        return run(*operands)

    def _compile(self, key: _Key) -> Callable[..., Results]:
        name, dtype, device, given = key[:4]
        with _compiling:
            if key in _compiled:
                return _compiled[key]
            example = [self._operand(layout, dtype, device) if there else None for layout, there in zip(self.layouts, given, strict=True)]
            run = torch.compile(_own_code(self.function), fullgraph=True, dynamic=True, options=_OPTIONS)
            try:
                run(*example)
            except Exception as error:
                text = str(error).strip().split("\n", 1)[0][:300]
                raise BackendError(
                    f"inductor: compiling {name} for {dtype} on {device} raised {type(error).__name__}: {text}. See: titans-backends doctor"
                ) from error
            return _compiled.setdefault(key, run)

    def _operand(self, layout: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        letters = layout.removesuffix(" float64").split()
        x = torch.zeros([_EXAMPLE[letter] for letter in letters], dtype=torch.float64 if layout.endswith(" float64") else dtype, device=device)
        for axis, letter in enumerate(letters):
            if letter != "1":
                torch._dynamo.mark_dynamic(x, axis)
        return x


def _own_code(function: Callable[..., Results]) -> Callable[..., Results]:
    """The same function over a code object of its own: torch counts recompilations, and limits them, per code object."""
    assert isinstance(function, FunctionType)
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__, function.__closure__)


def compiled_count() -> int:
    """How many kernels this process has compiled."""
    return len(_compiled)


_LOG = "N C 1 float64"
SCORES = Kernel(kernels.scores, ("N C K", "N C K", _LOG))
UNIT_TRIANGLE = Kernel(kernels.unit_triangle, ("N C K", "N C V", "N C 1", _LOG))
LAM_UW = Kernel(kernels.lam_uw, ("N C K", "N C V", "N C 1", _LOG))
SCALED_SIDES = Kernel(kernels.scaled_sides, ("N C K", "N C V", "N C 1", _LOG))
TRIANGLES = Kernel(kernels.triangles, ("N 2C K", "N C V", "N C 1", _LOG))
