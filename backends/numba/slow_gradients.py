"""slow_core backward (SPEC.md 10): the forward scan again for S~ and U', the scan from the last chunk, and for every chunk at once the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.contracts.slow_core import SlowCore

from .absent import given_or, nothing, unity
from .chunk_gradients import arrived, by_group, key_gradient, own_scores, query_gradient, update_gradient
from .chunk_read import EACH_CHUNK, NO_STATE, read_chunks
from .grid import Grid
from .log_decay import running_log
from .log_gradient import decay_gradient
from .serving import wide
from .state_reverse import scan_back
from .state_scan import scan

__all__ = ["slow_gradients"]


def slow_gradients(call: SlowCore, d_o: Tensor | None, d_final: Tensor | None, needs: frozenset[str]) -> dict[str, Tensor]:
    """What of q, k, u, w, g, gate and initial_state `needs` names, in float32."""
    q, k, u, w = wide(call.q), wide(call.k), wide(call.u), wide(call.w)
    grid = Grid(u, call.chunk_size, call.cu_seqlens)
    log = running_log(call.g, grid, u)
    gate = given_or(call.gate, unity(u, *u.shape[:3]))
    d_read = arrived(d_o, u)
    states, updates, _ = scan(k, u, w, log, None, call.initial_state, grid, delta=call.delta, normalize=False)
    rate = gate * call.scale
    du = update_gradient(q, k, updates, d_read, rate, log, grid, None, NO_STATE)
    d_states, d_start = scan_back(q, k, w, d_read, gate, log, d_final, grid, du, delta=call.delta, scale=call.scale)
    found = {"u": du, "initial_state": d_start}
    own = own_scores(updates, d_read, call.scale)
    if needs & {"q", "g", "gate"}:
        dq, found["gate"], asked = query_gradient(q, k, updates, d_read, gate, log, own, grid, call.scale, states, EACH_CHUNK)
        found["q"] = by_group(dq, q.shape[2])
    if needs & {"k", "g"}:
        dk, inside, left = key_gradient(q, k, updates, d_read, gate, log, own, grid, call.scale, d_states, EACH_CHUNK)
        found["k"] = by_group(dk, k.shape[2])
    if "w" in needs:
        found["w"] = _key_side(du, states, grid) if call.delta else torch.zeros_like(w)
    if "g" in needs:
        found["g"] = decay_gradient(asked - inside, log, grid, left, states, d_states, each=True)
    return found


def _key_side(du: Tensor, states: Tensor, grid: Grid) -> Tensor:
    """dw = -dU' S~^T: a read of the states alone, without decay."""
    dw = du.new_empty(*du.shape[:3], states.shape[2])
    log = nothing(du, *du.shape[:3], dtype=torch.float64)
    return read_chunks(du, du, dw, log, grid, dw, scale=-1.0, states=states.mT, which=EACH_CHUNK, apart=grid.chunk)
