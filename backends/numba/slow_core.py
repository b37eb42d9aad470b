"""slow_core: the scan over chunks, then what they read, all at once (SPEC.md 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.slow_core import SlowCore
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import ACCEPTED, Verdict, refused

from .absent import unity
from .chunk_read import EACH_CHUNK, read_chunks
from .frobenius import normalize
from .grid import Grid
from .log_decay import running_log
from .serving import serves, wide
from .state_scan import fits_one_block, scan

__all__ = ["candidates", "refuse_normalized", "run", "supports"]


def refuse_normalized(signature: Signature) -> Verdict:
    """A normalised read needs the norm of the whole state, so the state in one block."""
    keys, values = signature.dim("K"), signature.dim("V")
    if signature.option("normalize_read") and not fits_one_block(keys, values):
        return refused(
            f"normalize_read=True with K={keys}, V={values}: the whole state has to fit a block's 48 KiB of shared memory, as 64 x 64 does; "
            "use backend='eager'"
        )
    return ACCEPTED


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Every option; a normalised read where the state fits one block."""
    return serves(signature, machine) & refuse_normalized(signature)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return [Candidate("numba", "chunks")]


def run(call: SlowCore, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o `[B, T, H, V]` and, where asked, the final state."""
    q, k, u, w = wide(call.q), wide(call.k), wide(call.u), wide(call.w)
    grid = Grid(u, call.chunk_size, call.cu_seqlens)
    log = running_log(call.g, grid, u)
    states, updates, final = scan(k, u, w, log, call.chunk_decay, call.initial_state, grid, delta=call.delta, normalize=call.normalize_read)
    o = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    read_chunks(q, k, updates, unity(u, *u.shape[:3]), log, call.gate, states, EACH_CHUNK, grid, call.scale, o)
    if not call.output_final_state:
        return o.to(call.u.dtype), None
    return o.to(call.u.dtype), normalize(final) if call.normalize_final else final
