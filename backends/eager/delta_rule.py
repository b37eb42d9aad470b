"""The gated delta rule's slabs: from q, k, v, beta, g to the operands of the recurrence, and their gradients back to the inputs.

It joins `transform` (u and w) with `recurrence`; the loop over slabs belongs to the ops.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .chunk_grid import ChunkGrid, Slab, compute_dtype
from .decay import Decay, log_decay_gradient
from .recurrence import OperandGradients, Operands
from .transform import Transform, TransformGradients
from .unit_norm import unit, unit_backward

__all__ = ["RuleGradients", "RuleInputs", "RuleSlab"]


@dataclass(slots=True)
class RuleGradients:
    """Gradients of one slab's inputs, `[n, H, C, *]`, in the call's own terms (before scale and norm)."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor
    beta: Tensor
    g: Tensor | None


@dataclass(frozen=True, slots=True)
class RuleInputs:
    """The call's tensors and what is done to them; `kind` and `inverse` as in `transform`."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None
    chunk_decay: Tensor | None
    scale: float
    qk_l2norm: bool
    kind: str
    inverse: str
    delta: bool

    def load(self, grid: ChunkGrid, slab: Slab) -> RuleSlab:
        """One slab's tensors, gathered and transformed."""
        heads, dtype = self.v.shape[2], compute_dtype(self.v)
        raw_q, raw_k = grid.gather(slab, self.q, heads, dtype), grid.gather(slab, self.k, heads, dtype)
        k = unit(raw_k) if self.qk_l2norm else raw_k
        q = unit(raw_q).mul_(self.scale) if self.qk_l2norm else raw_q * self.scale
        v, beta = grid.gather(slab, self.v, heads, dtype), grid.gather(slab, self.beta, heads, dtype)
        decay = None if self.g is None else Decay.of(grid.gather(slab, self.g, heads, dtype))
        factor = None if self.chunk_decay is None else grid.gather_per_chunk(slab, self.chunk_decay, dtype)[..., None, None]
        transform = Transform.of(k, v, beta, decay, self.kind, self.inverse)
        return RuleSlab(self, raw_q, raw_k, q, k, v, beta, decay, factor, transform)


@dataclass(frozen=True, slots=True)
class RuleSlab:
    """One slab: q holds scale and norm, k the norm; `raw_q` and `raw_k` do not."""

    inputs: RuleInputs
    raw_q: Tensor
    raw_k: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    decay: Decay | None
    factor: Tensor | None
    transform: Transform

    def operands(self, *, states: bool = True) -> Operands:
        """Fresh u and w for the recurrence; without `states` no w."""
        w = self.transform.w() if states and self.inputs.delta else None
        return Operands(self.q, self.k, self.transform.u(), w, self.decay, self.factor)

    def gradients(self, x: Operands, d: OperandGradients, needs: frozenset[str]) -> RuleGradients:
        """From the gradients of `x`, the untouched operands of this slab."""
        frozen = not needs & {"k", "beta", "g"}
        through = TransformGradients.of(self.k, self.v, self.beta, self.decay, self.transform, x.u, x.w, d.u, d.w, frozen_keys=frozen)
        log = through.log if d.log is None else d.log if through.log is None else d.log + through.log
        dq = None if d.q is None else d.q * self.inputs.scale
        dk = through.k if d.k is None else through.k + d.k
        if self.inputs.qk_l2norm:
            dq = None if dq is None else unit_backward(self.raw_q, dq)
            dk = unit_backward(self.raw_k, dk)
        return RuleGradients(dq, dk, through.v, through.beta, None if log is None else log_decay_gradient(log, d.left))
