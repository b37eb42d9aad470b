"""The backward of deep_core: what each gradient needs of D and dE at every block, and the launches (SPEC.md 7; the kernels: deep_scan, deep_parallel, deep_gradients).

Nothing is read that the forward made. D at every block's start is computed again unless only v or the initial D and E want their gradient;
dE of every block unless only q or the gate does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.deep_core import DeepCore

from .deep_calls import DeepCall, matrix, pair
from .deep_gradients import SCALARS, TOKENS
from .deep_parallel import BACK
from .deep_plans import steps_rows
from .deep_scan import REVERSE
from .grid import strides
from .serving import tile_width

__all__ = ["gradients"]

_INPUTS = ("q", "k", "v", "eta", "g", "gate", "initial_state", "initial_error", "initial_mass", "initial_log_decay")
_READ = frozenset(("q", "gate"))
_WITHOUT_STATES = frozenset(("v", "initial_state", "initial_error"))


def gradients(call: DeepCore, grads: tuple[Tensor | None, ...], needs: frozenset[str], candidate: Candidate) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, eta, g, gate and the initial carry, in that order."""
    wanted = {name: getattr(call, name) for name in _INPUTS if name in needs}
    into = {name: torch.empty(like.shape, dtype=like.dtype, device=like.device) for name, like in wanted.items() if like is not None}
    _Backward(call, grads, into, candidate).run()
    return tuple(into.get(name) for name in _INPUTS)


class _Backward:
    """A call's launches in reverse."""

    def __init__(self, call: DeepCore, grads: tuple[Tensor | None, ...], into: dict[str, Tensor], candidate: Candidate) -> None:
        self.made = made = DeepCall(call, candidate)
        self.in_parallel = candidate.variant == "blocks"
        self.token_rows, self.token_warps = min(int(candidate.param("token_rows")), steps_rows(made.span)), int(candidate.param("token_warps"))
        self.into, (d_o, d_state, d_error, self.d_mass, self.d_log) = into, grads
        self.d_o, self.d_state, self.d_error = matrix(d_o), matrix(d_state), matrix(d_error)
        self.reads = self.d_o is not None and not into.keys().isdisjoint(_READ)
        self.lines = (into.get("initial_mass"), into.get("initial_log_decay"))
        self.learns = not into.keys() <= _READ
        square, operands = (made.slots, made.heads, made.keys, made.values), made.v.dtype
        safe = made.normalize == "safe" and not into.keys().isdisjoint(("k", "eta", "initial_mass"))
        self.starts = made.new(operands, *square) if self.reads or not into.keys() <= _READ | _WITHOUT_STATES else None
        self.ends = made.new(torch.float32 if operands == torch.float16 else operands, *square) if safe else None
        self.sums = made.new(operands, *square) if self.learns else None
        self.draws, self.grows = ("k" in into or "eta" in into) and (safe or self.d_mass is not None), "g" in into

    def run(self) -> None:
        """Launches all."""
        if self.d_o is None:
            for name in self.into.keys() & _READ:
                self.into[name].zero_()
        if not (self.reads or self.learns):
            return
        masses, logs, maps, later = self._forward()
        if self.learns:
            self._reverse(masses, logs, maps, later)
        drawn, grown = self._scalars(masses, logs)
        self._tokens(drawn, grown)

    def _forward(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Mass and G of every block, with blocks side by side also N and Y; fills `starts` and `ends`."""
        made, kept = self.made, (self.starts, self.ends)
        if self.in_parallel:
            maps, inputs, later, summed = made.gather(self.d_o if self.learns else None)
            if self.starts is not None:
                made.chain(maps, inputs, summed, kept, (None,) * 4)
            return *summed, maps, later
        summed = made.blocks()
        if self.starts is not None:
            made.sweep(None, summed, kept, (None,) * 4)
        return *summed, None, None

    def _reverse(self, masses: Tensor, logs: Tensor, maps: Tensor | None, later: Tensor | None) -> None:
        """dE of every block, and the gradients of the initial D and E."""
        made = self.made
        arriving = (self.d_state, self.d_error, self.d_mass, self.d_log)
        initial = (self.into.get("initial_state"), self.into.get("initial_error"), *self.lines)
        carried = (*strides(self.d_state), *strides(self.d_error), *pair(self.d_mass), *pair(self.d_log))
        if maps is not None:
            BACK(
                made.programs,
                (maps, later, masses, logs, made.packed, *arriving, self.sums, *initial, *made.numbers[1:], made.offset, *carried),
                (*made.sizes, made.tile, made.span, made.normalize, made.dot),
                made.warps,
                made.stages,
            )
            return
        REVERSE(
            made.programs,
            (
                made.q, made.k, made.eta, made.gate, self.d_o, masses, logs, made.packed, *arriving, self.sums, *initial,
                *made.numbers, made.group, made.offset,
                *strides(made.q), *strides(made.k), *strides(made.eta), *strides(made.gate), *strides(self.d_o), *carried,
            ),
            (*made.sizes, made.tile, made.rows, made.span, made.normalize, made.dot),
            made.warps,
            made.stages,
        )  # fmt: skip

    def _scalars(self, masses: Tensor, logs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """dz and dG of every block, where they are wanted; the gradients of the initial mass and G."""
        made = self.made
        drawn, grown = (made.new(torch.float32, made.slots, made.heads) if wanted else None for wanted in (self.draws, self.grows))
        if self.draws or self.grows or any(line is not None for line in self.lines):
            SCALARS(
                made.slots * made.heads,
                (
                    self.starts, self.ends, self.sums, masses, logs, self.d_mass, self.d_log, made.packed, drawn, grown, *self.lines,
                    made.tokens, made.sequences, made.heads, made.offset, *pair(self.d_mass), *pair(self.d_log),
                ),
                (*made.sizes, min(64, tile_width(made.values)), made.span, made.normalize),
                4 if made.keys > 32 else 1,
                1,
            )  # fmt: skip
        return drawn, grown

    def _tokens(self, drawn: Tensor | None, grown: Tensor | None) -> None:
        """The gradients of what each token has."""
        made, (dq, *written, d_gate) = self.made, [self.into.get(name) for name in ("q", "k", "v", "eta", "g", "gate")]
        writes = any(x is not None for x in written)
        if not (self.reads or writes):
            return
        TOKENS(
            made.slots * -(-made.span // self.token_rows) * made.groups * (self.reads + writes),
            (
                made.q, made.k, made.v, made.eta, made.gate, self.d_o, self.starts, self.sums, drawn, grown, made.packed,
                dq if self.reads else None, *written, d_gate if self.reads else None,
                *made.numbers, made.groups, made.group, made.offset,
                *strides(made.q), *strides(made.k), *strides(made.v), *strides(made.eta), *strides(made.gate), *strides(self.d_o),
            ),
            (*made.sizes, min(64, tile_width(made.values)), self.token_rows, made.span, int(self.reads), int(writes), made.dot),
            self.token_warps,
            1,
        )  # fmt: skip
