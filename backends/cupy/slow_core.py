"""slow_core: a sequence, head and slice of value columns per block, its state in registers from the first chunk to the last (SPEC.md 4).

roles      warps that carry the state from chunk to chunk, beside warps that read it for the outputs (slow_core_roles.cu)
walks      a launch that carries the state and stores it for every chunk, then one for all outputs: less shared memory (slow_core_walks)
columns    every warp does both for its columns, and knows the state's norm (slow_core.cu)
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.slow_core import SlowCore
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict, refused

from .ahead import ahead_of
from .bounds import bounds_on
from .chunks import side_of, three_strides
from .launch import DTYPES, Kernel, Macros
from .program import remembering, remembering_backward
from .serving import CONSUMER_SHARED_BYTES, WIDEST, padded, serves
from .serving import candidate as _candidate
from .slow_core_gradients import backward_candidates, run_backward
from .slow_core_walks import NORMS, divide_by_norm, longest_piece, output_bytes, run_walks, walk_bytes
from .slow_core_walks import SOURCES as WALK_SOURCES
from .strides import aligned_rows, unit_stride

__all__ = ["backward_candidates", "candidates", "compile_ahead", "remember", "remember_backward", "run", "run_backward", "supports"]

SOURCE, ROLES_SOURCE = "slow_core.cu", "slow_core_roles.cu"
SLOW, ROLES = Kernel(SOURCE, "slow_core", "11P21q8if"), Kernel(ROLES_SOURCE, "slow_core_roles", "11P21q8if")
_LONGEST = 128
_PLANS = ((4, 2), (2, 2), (1, 2), (8, 2), (4, 1), (2, 1), (8, 1))
"""Warps, 16 value columns each, and chunks in shared memory."""
_MOST = {"roles": 3, "walks": 2, "columns": 1}
"""Candidates of a variant."""
_NARROW = ((2, 2), (1, 2), *_PLANS)
"""The same where few heads and sequences leave processors idle: more blocks, fewer columns each."""
_ROLES = ((2, 2, 1, 2), (2, 2, 1, 1), (4, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1), (2, 2, 2, 1), (1, 1, 2, 1))
"""Walking warps, 16 value columns each, chunks loaded ahead, blocks that a processor's registers are to hold, and groups of readers."""
_WALKS = ((64, 3, 2), (32, 3, 2), (32, 3, 4), (32, 3, 1), (16, 3, 2))
"""Tokens of a piece, pieces in shared memory, warps."""


def supports(signature: Signature, machine: Machine) -> Verdict:
    """What `serving.serves` says, chunks that one tile holds, and tiles that fit the card."""
    verdict = serves(signature, machine, WIDEST)
    if side_of(signature) > _LONGEST:
        verdict &= refused(f"chunk_size={signature.option('chunk_size')} is above {_LONGEST} tokens; use backend='triton'")
    if verdict and not candidates(signature, machine):
        sizes = f"chunks of {signature.option('chunk_size')} with K={signature.dim('K')}, V={signature.dim('V')}"
        dtype = str(signature.dtype).removeprefix("torch.")
        verdict &= refused(f"{sizes} in {dtype} do not fit the shared memory of {machine.name}; use backend='triton' or a smaller chunk_size")
    return verdict


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """A few of each variant that fit the card; the first is the default. A norm takes all value columns in one block."""
    side, values = side_of(signature), padded(signature.dim("V"))
    whole = bool(signature.option("normalize_read")) or bool(signature.option("normalize_final"))
    room = machine.shared_memory_bytes or CONSUMER_SHARED_BYTES
    found: dict[Candidate, None] = {}
    streams = signature.dim("N") * signature.dim("H")
    few = not signature.batch_invariant and streams * -(-values // 64) < 0.75 * (machine.sms or 108)
    crowded = not signature.batch_invariant and signature.dim("K") <= 32 and streams * -(-values // 32) > (machine.sms or 108)
    roles = () if signature.option("normalize_read") else sorted(_ROLES, key=lambda way: -way[2]) if crowded else _ROLES
    for warps, depth, resident, groups in roles:
        if (resident > 1 or groups > 1) and (signature.dim("K") > 64 or side > 64 or resident * groups * signature.dtype.itemsize > 4):
            continue  # registers
        warps = min(warps, values // 16)
        if resident * roles_bytes(side, warps, depth, signature.dim("K"), bool(signature.option("delta")), signature.dtype) <= room:
            found[_candidate("roles", (ROLES_SOURCE, NORMS), side=side, warps=warps, depth=depth, resident=resident, groups=groups)] = None
    for piece, stages, warps in () if signature.option("normalize_read") else _WALKS:
        piece, value_slice = min(piece, side, longest_piece(signature.dim("K"), signature.dtype)), min(values, 128 // signature.dtype.itemsize)
        warps, value_slice = min(warps, values // 16), max(value_slice, 32)
        sizes = (
            walk_bytes(piece, stages, warps, signature.dim("K"), signature.dtype, reverse=False),
            output_bytes(side, signature.dim("K"), value_slice, signature.dtype),
        )
        if max(sizes) <= room:
            found[_candidate("walks", (*WALK_SOURCES, NORMS), side=side, piece=piece, stages=stages, warps=warps, value_slice=value_slice)] = None
    kept = _NARROW if few else _PLANS
    for warps, buffers in kept[:3] if found else kept:
        warps = values // 16 if whole else min(warps, values // 16)
        if shared_bytes(side, warps, buffers, signature.dim("K"), bool(signature.option("delta")), signature.dtype) <= room:
            found[_candidate("columns", (SOURCE,), side=side, warps=warps, buffers=buffers)] = None
    return [one for variant, most in _MOST.items() for one in [each for each in found if each.variant == variant][:most]]


def shared_bytes(side: int, warps: int, buffers: int, keys: int, delta: bool, dtype: torch.dtype) -> int:
    """Dynamic shared memory of a block: chunks of q, k, u and w, the scores, the updates, and the running decay."""
    size, across = dtype.itemsize, max(side, 32)
    chunk = side * ((3 if delta else 2) * padded(keys, 32) + max(32, 16 * warps)) * size
    return buffers * chunk + (side + 16 * warps) * across * size + 8 * side + 4 * max(warps, 4)


def roles_bytes(side: int, warps: int, depth: int, keys: int, delta: bool, dtype: torch.dtype) -> int:
    """Dynamic shared memory of a block whose warps have roles: tiles of q and k, of u and w, what walkers hand to readers, and three chunks' lines."""
    rows, fragments = padded(keys, 32), warps * (-(-keys // 16) + side // 16)
    tiles = (depth + 2) * 2 * rows + (depth + 1) * (delta * rows + max(32, 16 * warps))
    return (side * tiles + 2 * 256 * fragments) * dtype.itemsize + 3 * (20 * side + 16)


def run(call: SlowCore, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o `[B, T, H, V]` and, where asked for, the final state `[N, H, K, V]` in float32."""
    q, k, u, w = unit_stride(call.q), unit_stride(call.k), unit_stride(call.u), unit_stride(call.w)
    batch, tokens, heads, values = u.shape
    groups, keys = k.shape[2:]
    bounds = bounds_on(call.cu_seqlens, u)
    sequences = batch if bounds is None else bounds.numel() - 1
    initial = None if call.initial_state is None else call.initial_state.contiguous()
    o = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    final = torch.empty((sequences, heads, keys, values), dtype=torch.float32, device=u.device) if call.output_final_state else None
    if not tokens and final is None:
        return o, None
    side, warps = int(candidate.param("side")), int(candidate.param("warps"))
    g, decay, gate = call.g, call.chunk_decay, call.gate
    wide = [x is not None and x.dtype == torch.float32 for x in (g, decay, gate)]
    if candidate.variant == "walks":
        run_walks(call, candidate, o, final)
        return o, final
    blocks = (sequences * heads * -(-values // (16 * warps)), 1, 1)
    macros: Macros = (
        ("DTYPE", DTYPES[u.dtype]), ("KEYS", keys), ("VALUES", values), ("SIDE", side), ("WARPS", warps), ("DECAYED", g is not None),
        ("FACTORED", decay is not None), ("DELTA", bool(call.delta)), ("ALIGNED", all(aligned_rows(x, whole=True) for x in (q, k, u, w))),
    )  # fmt: skip
    args = (
        q, k, u, w, g, decay, gate, initial, o, final, bounds,
        *three_strides(q), *three_strides(k), *three_strides(u), *three_strides(w), *three_strides(g), *three_strides(decay), *three_strides(gate),
        heads, heads // groups if groups else 1, *wide, bounds is not None and bounds.dtype == torch.int64, tokens, min(call.chunk_size, 2**30),
        float(call.scale),
    )  # fmt: skip
    if candidate.variant == "roles":
        depth = int(candidate.param("depth"))
        readers = int(candidate.param("groups"))
        threads = 32 * (warps + readers * min(side // 16, 4) + 2)
        tiles = (("DEPTH", depth), ("RESIDENT", int(candidate.param("resident"))), ("GROUPS", readers))
        ROLES(blocks, threads, (*macros, *tiles), args, roles_bytes(side, warps, depth, keys, bool(call.delta), u.dtype))
        if final is not None and call.normalize_final:
            divide_by_norm(final)
        return o, final
    buffers = int(candidate.param("buffers"))
    norms = (("BUFFERS", buffers), ("NORMALIZE_READ", bool(call.normalize_read)), ("NORMALIZE_FINAL", bool(call.normalize_final)))
    SLOW(blocks, 32 * warps, (*macros, *norms), args, shared_bytes(side, warps, buffers, keys, bool(call.delta), u.dtype))
    return o, final


compile_ahead = ahead_of(run, "slow_core", run_backward)
remember, remember_backward = remembering(run), remembering_backward(run_backward)
