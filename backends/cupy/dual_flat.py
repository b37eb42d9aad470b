"""dual_core's flat mode, one launch: a block per chunk, head and tile of 32 values (kernel in cuda/dual_flat.cu), or small heads by prefix sums (dual_prefix.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.dual_core import DualCore
from titans_backends.machine import Machine
from titans_backends.precision import float32_precision
from titans_backends.signature import Signature
from titans_backends.verdict import ACCEPTED, Verdict, refused

from .bounds import bounds_on
from .chunks import TRANSFORMS
from .dual_prefix import blocks_of, prefix, prefix_candidates
from .launch import DTYPES, Kernel
from .serving import CONSUMER_SHARED_BYTES, padded
from .serving import candidate as _candidate
from .strides import aligned_rows, unit_stride

__all__ = ["FLAT_VARIANTS", "flat", "flat_candidates", "serves_flat"]

SOURCE = "dual_flat.cu"
FLAT_VARIANTS = ("flat", "prefix")
FLAT = Kernel(SOURCE, "dual_flat", "10P24q16i2f")

_MOST = 128
"""Tokens of a chunk."""
_CLUSTERS = 90
"""The compute capability from which blocks form clusters."""
_VALUES = 32
_PAIR_SCRATCH = 4 * (2 * (16 * 20 + 16) + 9 * 32)


def _shared_bytes(keys: int, blocks: int, transform: str, cluster: int = 1, parts: int = 2) -> int:
    """Of a block: tiles of keys and values, a line of each factor, and the inversions' scratch or partial sums."""
    tokens = 16 * blocks
    scratch = 2 * blocks * _PAIR_SCRATCH if transform == "exact" else 0
    widest = max(padded(keys, 32), _VALUES) if transform == "lam" else _VALUES
    return 4 * tokens * (2 * padded(keys, 32) + 2 * _VALUES + 5) + max(scratch, blocks // cluster * (parts - 1) * 64 * widest)


def serves_flat(signature: Signature, machine: Machine) -> Verdict:
    """Chunks of up to 128 tokens whose tiles fit the card."""
    chunk, transform = signature.option("chunk_size"), signature.option("transform")
    assert isinstance(chunk, int)
    tokens = signature.dim("T")
    if min(chunk, tokens) > _MOST:
        return refused(f"memory='flat' with chunk_size={chunk} above {_MOST}; use backend='triton'")
    if signature.dim("K") > 128:
        return refused(f"head_dim K={signature.dim('K')} is above 128; use backend='triton'")
    bytes_needed = _shared_bytes(signature.dim("K"), blocks_of(chunk, tokens), str(transform))
    room = machine.shared_memory_bytes or CONSUMER_SHARED_BYTES
    if bytes_needed > room:
        return refused(
            f"memory='flat' with K={signature.dim('K')} and chunk_size={chunk} takes {bytes_needed} bytes of shared memory, {machine.name} has {room}"
        )
    return ACCEPTED


def flat_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Prefix sums where they serve; a block for a chunk and head; and, where blocks form clusters, a cluster whose blocks have two blocks of rows each, which
    is the first of the others for few chunks."""
    sums, blocks = prefix_candidates(signature, machine), _block_candidates(signature, machine)
    return [*sums, *(way for way in blocks if not sums or way.param("cluster") == 1)]


def _block_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    chunk, transform, keys = signature.option("chunk_size"), str(signature.option("transform")), signature.dim("K")
    assert isinstance(chunk, int)
    blocks = blocks_of(chunk, signature.dim("T"))
    alone = _candidate("flat", (SOURCE,), cluster=1, parts=2)
    if machine.sm is None or machine.sm < _CLUSTERS or transform == "exact" or blocks < 4:
        return [alone]
    room = machine.shared_memory_bytes or CONSUMER_SHARED_BYTES
    cluster = blocks // 2
    together = [
        _candidate("flat", (SOURCE,), cluster=cluster, parts=parts)
        for parts in (8, 4)
        if _shared_bytes(keys, blocks, transform, cluster, parts) <= room
    ]
    chunks = signature.dim("B") * signature.dim("H") * -(-signature.dim("T") // chunk) * -(-signature.dim("V") // _VALUES)
    few = chunks * cluster <= 2 * (machine.sms or 108) and not signature.batch_invariant
    return [*together, alone] if few else [alone, *together]


def flat(call: DualCore, candidate: Candidate) -> Tensor:
    """o `[B, T, H, V]` in v's dtype."""
    if candidate.variant == "prefix":
        return prefix(call, candidate)
    q, k, v, beta, g, alpha = unit_stride(call.q), unit_stride(call.k), unit_stride(call.v), call.beta, call.g, call.alpha
    fast, slow, offset = call.fast_gate, call.slow_gate, call.chunk_offset
    bounds = bounds_on(call.cu_seqlens, v)
    batch, tokens, heads, values = v.shape
    groups, keys = k.shape[2:]
    o = torch.empty((batch, tokens, heads, values), dtype=v.dtype, device=v.device)
    chunk = min(call.chunk_size, 2**30)
    if bounds is None:
        sequences, slots = batch, batch * -(-(tokens + offset) // chunk) if tokens else 0
    else:
        sequences = bounds.numel() - 1
        slots = (tokens + sequences * offset) // chunk + sequences
    none, weight, steps, number = (0, 0, 0), None, (0, 0, 0), 0.0
    if isinstance(alpha, Tensor):
        weight = alpha
        if alpha.dim():
            steps = alpha.stride() if alpha.dim() == 3 else (0, 0, alpha.stride(0))
    else:
        number = float(alpha)
    size, blocks = v.element_size(), blocks_of(chunk, tokens)
    cluster, parts = int(candidate.param("cluster")), int(candidate.param("parts"))
    once = (("TF32_ONCE", True),) if size == 2 or float32_precision(on_cuda=True) != "highest" else ()
    FLAT(
        (slots * heads * -(-values // _VALUES) * cluster, 1, 1),
        32 * parts * (blocks // cluster),
        (
            ("DTYPE", DTYPES[v.dtype]), ("KEYS", padded(keys, 32)), ("CHUNK_BLOCKS", blocks), ("TRANSFORM", TRANSFORMS[call.transform]),
            ("CLUSTER", cluster), ("PARTS", parts), *once,
        ),
        (
            q, k, v, beta, g, fast, slow, weight, bounds, o,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *beta.stride(), *(none if g is None else g.stride()),
            *(none if fast is None else fast.stride()), *(none if slow is None else slow.stride()), *steps,
            tokens, heads, heads // groups if groups else 1, keys, values, sequences, chunk, offset,
            beta.dtype == torch.float32, g is not None and g.dtype == torch.float32, fast is not None and fast.dtype == torch.float32,
            slow is not None and slow.dtype == torch.float32, weight is not None and weight.dtype == torch.float32,
            bounds is not None and bounds.dtype == torch.int64, bool(call.qk_l2norm),
            keys * size % 16 == 0 and values * size % 16 == 0 and aligned_rows(q) and aligned_rows(k) and aligned_rows(v),
            number, float(call.scale),
        ),
        _shared_bytes(keys, blocks, call.transform, cluster, parts),
    )  # fmt: skip
    return o
