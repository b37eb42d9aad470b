"""The memory of each mode, on the ops: what `q`, `k`, `v` and the gates become before they are normed and projected.

Nothing here has a parameter; states are made only where they are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans_backends.contracts.gated_delta_step import MAX_TOKENS
from titans_backends.nn.chunk_grid import ChunkGrid
from titans_backends.nn.flux import resonance
from titans_backends.nn.forced import Forced
from titans_backends.nn.forms import Form
from titans_backends.nn.states import tracked_state
from titans_backends.nn.streaming import DualCoreCache

__all__ = ["Memory", "States", "dual", "flat", "loop", "recurrent"]

States = tuple[Tensor, Tensor]
"""S_fast and S_slow, `[N, H, K, V]`."""
_LEAST = 1e-30
"""A factor below counts as this: what is left of a state has no digit beside what comes after, and its logarithm is finite."""
Remembered = tuple[Tensor, States | None]


@dataclass(frozen=True, slots=True)
class Memory:
    """What the memory ops take: unit q, k `[B, T, H, K]`, v `[B, T, H, V]`, the rest `[B, T, H]`; the logits are the decays' before their sigmoid.

    `continues`: the cache that this call goes on from, and `next`, by name, what it will hold: stored once the whole call has succeeded.
    `ops`: where they come from.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    fast_gate: Tensor
    slow_gate: Tensor
    slow_logit: Tensor | None
    fast_logit: Tensor | None
    chunk_size: int
    cu_seqlens: Tensor | None
    continues: DualCoreCache | None
    next: dict[str, Tensor]
    ops: Forced

    def grid(self) -> ChunkGrid:
        """Where its chunks lie."""
        return ChunkGrid.of(self.v.shape[1], self.chunk_size, self.cu_seqlens, self.v.device)


def flat(form: Form, flux: nn.Module, x: Memory, alpha: Tensor | float, return_states: bool) -> Remembered:
    """Every chunk from an empty memory; the state that the original tracks only where it is asked for."""
    o, _, _ = x.ops.op("dual_core")(
        x.q, x.k, x.v, x.beta,
        fast_gate=x.fast_gate, slow_gate=x.slow_gate, alpha=alpha,
        memory="flat", transform=form.transform, chunk_size=x.chunk_size, cu_seqlens=x.cu_seqlens,
    )  # fmt: skip
    assert o is not None
    if not return_states:
        return o, None
    u, w = _transformed(form, x)
    grid = x.grid()
    decay = _scaled(_chunk_mean(x.slow_logit, grid), 0.05, resonance(flux, x.k, u, x.chunk_size, x.cu_seqlens, grid.count, x.ops))
    slow = tracked_state(x.q, x.k, u, w, decay, x.chunk_size, x.cu_seqlens, x.ops)
    return o, (torch.zeros_like(slow), slow)


def dual(form: Form, flux: nn.Module, x: Memory, alpha: Tensor | float, return_states: bool) -> Remembered:
    """S_slow over the whole sequence, one factor a chunk, normalised at the end."""
    grid = x.grid()
    decay = _chunk_mean(x.slow_logit, grid)
    if form.resonance:
        u, _ = _transformed(form, x)
        decay = _scaled(decay, 0.05, resonance(flux, x.k, u, x.chunk_size, x.cu_seqlens, grid.count, x.ops))
    # With the exact transform a factor a chunk is a log decay on the chunk's first token, which every kernel of the delta rule runs, in chunks of its own.
    exact = form.transform == "exact"
    o, slow, fast = x.ops.op("dual_core")(
        x.q, x.k, x.v, x.beta, grid.on_first_tokens(decay.clamp_min(_LEAST).log()) if exact else None,
        fast_gate=x.fast_gate, slow_gate=x.slow_gate, alpha=alpha, chunk_decay=None if exact else decay,
        transform=form.transform, chunk_size=x.chunk_size, cu_seqlens=x.cu_seqlens,
        output_final_state=return_states, normalize_final=return_states,
    )  # fmt: skip
    assert o is not None
    return o, None if fast is None or slow is None else (fast, slow)


def loop(form: Form, flux: nn.Module, x: Memory, alpha: Tensor | float, return_states: bool) -> Remembered:
    """Two normalised states that mix after every chunk, by as much as the resonance says."""
    grid = x.grid()
    u, _ = _transformed(form, x)
    psi = resonance(flux, x.k, u, x.chunk_size, x.cu_seqlens, grid.count, x.ops)
    coupling = None if form.coupling == "head" else torch.rsub(psi.mean((0, 2), keepdim=True), 0.05, alpha=-0.1).expand_as(psi)
    o, slow, fast = x.ops.op("coupled_core")(
        x.q, x.k, x.v, x.beta, psi, coupling=coupling,
        fast_decay=_scaled(_chunk_mean(x.fast_logit, grid), 0.1, psi), slow_decay=_scaled(_chunk_mean(x.slow_logit, grid), 0.05, psi),
        fast_gate=x.fast_gate, slow_gate=x.slow_gate, alpha=alpha,
        transform=form.transform, chunk_size=x.chunk_size, cu_seqlens=x.cu_seqlens, output_final_state=return_states,
    )  # fmt: skip
    assert o is not None
    return o, None if fast is None or slow is None else (fast, slow)


def recurrent(form: Form, flux: nn.Module, x: Memory, alpha: Tensor | float, return_states: bool) -> Remembered:
    """The exact delta rule, with a log decay for each token: its own, or the chunk before's on a chunk's first; from the cache's states and into them.

    A few tokens go by `dual_core_step`, which writes the states where they are and asks the device for the position.
    """
    assert x.slow_logit is not None
    cache = x.continues
    g = F.logsigmoid(_wide(x.slow_logit)) if form.decay == "token" else _from_the_chunk_before(x)
    if cache is not None and 1 <= g.shape[1] <= MAX_TOKENS and not return_states and not _differentiated(x, g, alpha):
        o, _, _ = x.ops.op("dual_core_step")(
            x.q, x.k, x.v, x.beta, g,
            fast_gate=x.fast_gate, slow_gate=x.slow_gate, alpha=alpha,
            state=cache.slow, fast_state=cache.fast, position=cache.positions, chunk_size=x.chunk_size, inplace=True,
        )  # fmt: skip
        assert o is not None
        return o, None
    o, slow, fast = x.ops.op("dual_core")(
        x.q, x.k, x.v, x.beta, g,
        fast_gate=x.fast_gate, slow_gate=x.slow_gate, alpha=alpha,
        chunk_size=x.chunk_size, cu_seqlens=x.cu_seqlens, output_final_state=return_states or cache is not None,
        initial_state=None if cache is None else cache.slow, initial_fast_state=None if cache is None else cache.fast,
        chunk_offset=0 if cache is None else cache.chunk_offset,
    )  # fmt: skip
    assert o is not None
    if slow is None or fast is None:
        return o, None
    if cache is not None:
        x.next.update(slow=slow, fast=fast)
    return o, (fast, slow) if return_states else None


def _differentiated(x: Memory, g: Tensor, alpha: Tensor | float) -> bool:
    """Whether a gradient may run through the step, which then must not write in place."""
    if x.continues is None:
        return False
    if x.continues.slow.requires_grad or x.continues.fast.requires_grad:  # an earlier piece's graph holds them
        return True
    tensors = (x.q, x.k, x.v, x.beta, g, x.fast_gate, x.slow_gate, alpha)
    return torch.is_grad_enabled() and any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)


def _from_the_chunk_before(x: Memory) -> Tensor:
    """g `[B, T, H]`: on a chunk's first token the log of the mean decay of the chunk before, elsewhere 0; keeps the cache's sum."""
    assert x.slow_logit is not None
    cache, decay = x.continues, _wide(x.slow_logit).sigmoid()
    if cache is None or cache.decay_sum is None:
        grid = x.grid()
        return grid.from_the_chunk_before(grid.mean(decay).clamp_min(_LEAST).log())
    tokens, size, offset = decay.shape[1], x.chunk_size, cache.chunk_offset
    if not tokens:
        return torch.zeros_like(decay)
    # The tokens that came before stand in front again, the first of them with the sum of all: those of the open chunk, or of the whole chunk that has closed.
    earlier = offset if offset or not cache.position else size
    told = F.pad(cache.decay_sum[:, None], (0, 0, 0, earlier - 1)) if earlier else decay[:, :0]
    grid = ChunkGrid(earlier + tokens, size, None)
    means = grid.mean(torch.cat([told.to(decay.dtype), decay], 1))
    x.next["decay_sum"] = means[:, -1] * ((earlier + tokens - 1) % size + 1)
    return grid.from_the_chunk_before(means.clamp_min(_LEAST).log())[:, earlier:]


def _transformed(form: Form, x: Memory) -> tuple[Tensor, Tensor]:
    """u and w, for those who look at them; the memory ops make their own."""
    u, w = x.ops.op("uw_transform")(x.k, x.v, x.beta, chunk_size=x.chunk_size, transform=form.transform, cu_seqlens=x.cu_seqlens)
    assert u is not None
    assert w is not None
    return u, w


def _chunk_mean(logit: Tensor | None, grid: ChunkGrid) -> Tensor:
    """d `[B, M, H]`: the chunk's mean decay."""
    assert logit is not None
    return grid.mean(_wide(logit).sigmoid())


def _scaled(decay: Tensor, by: float, psi: Tensor) -> Tensor:
    """decay (1 - by psi), as one launch."""
    return torch.addcmul(decay, decay, psi.to(decay.dtype), value=-by)


def _wide(x: Tensor) -> Tensor:
    """float32, or float64: a decay near 1 has no place in 16 bits."""
    return x if x.dtype == torch.float64 else x.float()
