"""dual_core: S_slow written to o, S_fast added to it, each with its gate and its share of alpha (SPEC.md 5).

The flat memory reads no state: its slow core is `chunk_read` of u. S_slow as the exact rule goes on a grid of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.dual_core import DualCore, is_exact_rule
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .absent import nothing
from .chunk_read import EACH_CHUNK, FIRST_CHUNK, Mix, read_chunks
from .frobenius import normalize
from .gated_delta_rule import CHUNKS, delta_rule
from .grid import Grid
from .log_decay import running_log
from .serving import refuse_chunk, serves, wide
from .slow_core import refuse_normalized
from .state_scan import last_state, scan
from .unit_rows import unit
from .uw_chunks import LARGEST_CHUNK, transform_chunks

__all__ = ["candidates", "run", "supports"]


def _exact(signature: Signature) -> bool:
    """As `is_exact_rule` of the call."""
    option = signature.option
    recurrent = option("memory") == "recurrent" and option("transform") == "exact"
    return recurrent and bool(option("delta")) and not option("normalize_read") and not signature.has("chunk_decay")


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Every option; chunks of up to 128 tokens where S_slow is not the exact rule, and a normalised read where the state fits one block."""
    verdict = serves(signature, machine) & refuse_normalized(signature)
    return verdict if _exact(signature) else verdict & refuse_chunk(signature, LARGEST_CHUNK)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """A grid each for the exact rule, else the call's own."""
    if not _exact(signature):
        return [Candidate("numba", "chunks")]
    return [Candidate("numba", "chunks", (("chunk_size", size),)) for size in CHUNKS]


def run(call: DualCore, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o, the final state and the final fast state."""
    q, k, v, beta = wide(call.q), wide(call.k), wide(call.v), wide(call.beta)
    if call.qk_l2norm:
        q, k = unit(q), unit(k)
    if isinstance(call.alpha, Tensor):
        alpha: Tensor | None = wide(call.alpha).expand(v.shape[:3])
        share, one_minus = Mix(alpha, 0.0, 1.0, add=True), Mix(alpha, 1.0, -1.0)
    else:
        share, one_minus = Mix(offset=call.alpha, add=True), Mix(offset=1 - call.alpha)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final = _slow(call, candidate, q, k, v, beta, o, one_minus)
    fast = _fast(call, q, k, v, beta, o, share)
    if not call.output_final_state:
        return o.to(call.v.dtype), None, None
    assert final is not None
    return o.to(call.v.dtype), normalize(final) if call.normalize_final else final, fast


def _slow(call: DualCore, candidate: Candidate, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, o: Tensor, mix: Mix) -> Tensor | None:
    """Writes S_slow's share to o; the final state, of which the flat memory has none."""
    if is_exact_rule(call):
        grid = Grid(v, int(candidate.param("chunk_size")), call.cu_seqlens)
        return delta_rule(q, k, v, beta, call.g, call.slow_gate, call.initial_state, grid, call.scale, o, mix)
    flat = call.memory == "flat"
    grid = Grid(v, call.chunk_size, call.cu_seqlens, call.chunk_offset if flat else 0)
    log = running_log(call.g, grid, v)
    u = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if flat:
        transform_chunks(k, v, beta, log, grid, call.transform, u, None)
        read_chunks(q, k, u, log, grid, o, scale=call.scale, gate=call.slow_gate, mix=mix)
        return None
    w = torch.empty(*v.shape[:3], k.shape[3], dtype=v.dtype, device=v.device)
    transform_chunks(k, v, beta, log, grid, call.transform, u, w)
    states, updates, final = scan(k, u, w, log, call.chunk_decay, call.initial_state, grid, delta=call.delta, normalize=call.normalize_read)
    read_chunks(q, k, updates, log, grid, o, scale=call.scale, gate=call.slow_gate, states=states, which=EACH_CHUNK, mix=mix)
    return final


def _fast(call: DualCore, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, o: Tensor, mix: Mix) -> Tensor | None:
    """Adds S_fast's share, whose values are beta * v; the final W where asked."""
    grid = Grid(v, call.chunk_size, call.cu_seqlens, call.chunk_offset)
    log = nothing(v, *v.shape[:3], dtype=torch.float64)
    carried = call.initial_fast_state if call.chunk_offset else None
    read_chunks(q, k, v, log, grid, o, scale=call.scale, rate=beta, gate=call.fast_gate, states=carried, which=FIRST_CHUNK, mix=mix)
    return last_state(k, v, beta, log, call.initial_fast_state, grid) if call.output_final_state else None
