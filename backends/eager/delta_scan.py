"""The gated delta rule's forward without u and w: U' = T (b⊙V - b⊙e^G⊙(K S)), so that T z is never formed and K, Q read S in one product.

One slab at a time, in buffers that stay from slab to slab. Everything is `[n, H, C, *]`; K stands above Q in `both [n, H, 2C, K]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .chunk_grid import ChunkGrid, Slab
from .decay import Decay
from .triangular import unit_lower_inverse
from .unit_norm import unit
from .workspace import Workspace

__all__ = ["DeltaScan"]


@dataclass(frozen=True, slots=True)
class DeltaScan:
    """A call's tensors on its grid; `outputs=False` moves the state alone."""

    grid: ChunkGrid
    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None
    scale: float
    qk_l2norm: bool
    inverse: str
    workspace: Workspace
    outputs: bool = True

    def advance(self, state: Tensor, slab: Slab, starts: Tensor | None = None) -> Tensor | None:
        """Moves `state [sequences, H, K, V]` over the slab; returns o without its gate. `starts [n, H, K, V]` receives the chunks' first states."""
        heads, chunk, dtype = self.v.shape[2], self.grid.chunk, state.dtype
        take, n = self.workspace.take, slab.size
        both = self._keys_and_queries(slab, dtype)
        keys = both[:, :, :chunk]
        values = self.grid.gather(slab, self.v, heads, dtype, take("v", n, heads, chunk, self.v.shape[3]))
        beta = self.grid.gather(slab, self.beta, heads, dtype)
        decay = None if self.g is None else Decay.of(self.grid.gather(slab, self.g, heads, dtype), take("pair", n, heads, chunk, chunk))
        t, m = self._triangles(both, beta, decay)
        values.mul_(beta)
        writing = keys if decay is None else torch.mul(keys, decay.tail, out=take("writing", *keys.shape))
        rate = beta.neg_() if decay is None else (beta * decay.head).neg_()
        seen = take("seen", n, heads, both.shape[2], values.shape[3])
        u = take("u", *values.shape)
        self._scan(state, slab, starts, both, seen, values, rate, t, u, writing, decay)
        if m is None:
            return None
        read = seen[:, :, chunk:]
        if decay is not None:
            read.mul_(decay.head)
        y = take("v", *values.shape)  # v is spent
        torch.baddbmm(read.flatten(0, 1), m, u.flatten(0, 1), out=y.flatten(0, 1))
        return y

    def _keys_and_queries(self, slab: Slab, dtype: torch.dtype) -> Tensor:
        """K, and below it Q with its scale."""
        heads, chunk = self.v.shape[2], self.grid.chunk
        both = self.workspace.take("both", slab.size, heads, chunk * (2 if self.outputs else 1), self.k.shape[3])
        self.grid.gather(slab, self.k, heads, dtype, both[:, :, :chunk])
        if self.outputs:
            self.grid.gather(slab, self.q, heads, dtype, both[:, :, chunk:])
        if self.qk_l2norm:
            both.copy_(unit(both))
        if self.outputs and self.scale != 1.0:
            both[:, :, chunk:].mul_(self.scale)
        return both

    def _triangles(self, both: Tensor, beta: Tensor, decay: Decay | None) -> tuple[Tensor, Tensor | None]:
        """T and M, `[n * H, C, C]`."""
        chunk, take = self.grid.chunk, self.workspace.take
        keys = both[:, :, :chunk].flatten(0, 1)
        shape = (both.shape[0] * both.shape[1], chunk, chunk)
        n = torch.bmm(keys, keys.mT, out=take("n", *shape))
        n.unflatten(0, both.shape[:2]).mul_(beta)
        if decay is not None:
            n.mul_(decay.pair.flatten(0, 1))
        t = unit_lower_inverse(n, self.inverse, take("t", *shape))
        if not self.outputs:
            return t, None
        m = torch.bmm(both[:, :, chunk:].flatten(0, 1), keys.mT, out=n)
        return t, m.tril_() if decay is None else m.mul_(decay.pair.flatten(0, 1))

    def _scan(
        self,
        state: Tensor,
        slab: Slab,
        starts: Tensor | None,
        both: Tensor,
        seen: Tensor,
        values: Tensor,
        rate: Tensor,
        t: Tensor,
        u: Tensor,
        writing: Tensor,
        decay: Decay | None,
    ) -> None:
        """The loop over the slab's steps: reads, U', write."""
        heads, chunk = both.shape[1], self.grid.chunk
        sizes = [(step.last - step.first) * heads for step in slab.steps]
        error = self.workspace.take("error", max(sizes), chunk, values.shape[3])
        parts = [x.flatten(0, 1).split(sizes) for x in (both, seen, seen[:, :, :chunk], values, rate, u, writing.mT)]
        totals = None if decay is None else decay.total.flatten(0, 1).split(sizes)
        for index, (step, left, out, missed, value, factor, update, write, t_part) in enumerate(zip(slab.steps, *parts, t.split(sizes), strict=True)):
            current = state[step.rows].flatten(0, 1)
            if starts is not None:
                starts[step.chunks].copy_(state[step.rows])
            torch.bmm(left, current, out=out)
            wrong = torch.addcmul(value, factor, missed, out=error[: sizes[index]])
            torch.bmm(t_part, wrong, out=update)
            if totals is not None:
                current.mul_(totals[index])
            current.baddbmm_(write, update)
