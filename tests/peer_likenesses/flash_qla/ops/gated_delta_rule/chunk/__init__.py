import types

import torch
from peer_math import backward, contiguous, forward, inverse, running, saw, single, unit, unit_backward

from .cp import CPCache

CHUNK_SIZE = 64
PLANNED = []
"""For every plan of a cut that was made, whether it was for training."""


def _checked(q, k, v, g, beta, cu_seqlens):
    contiguous(q, k, v, g, beta)
    assert k.shape[-1] == v.shape[-1] == 128
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert g.dtype == torch.float32
    assert cu_seqlens is None or bool((cu_seqlens.diff() > 0).all()), "it would count no empty sequence"


def _auto_intra_cp_context(k, v, cu_seqlens, chunk_size, auto_cp, is_train, force_intra_cp=False):
    PLANNED.append(is_train)
    whole = auto_cp and k.shape[0] == 1 and cu_seqlens is None
    return types.SimpleNamespace(cu_seqlens=torch.tensor([0, k.shape[1]], dtype=torch.int32) if whole else cu_seqlens)


def l2norm_fwd(x, eps=1e-6, dim=-1):
    saw("l2norm_fwd")
    contiguous(x)
    return unit(x)


def l2norm_bwd(y, rstd, dy, eps=1e-6, dim=-1):
    return unit_backward(y, rstd, dy)


def chunk_local_cumsum(g, chunk_size=64, cu_seqlens=None, reverse=False, zero_last_chunk=False):
    return running(g, chunk_size, 1.0, cu_seqlens)


def kkt_solve(k, b, cu_seqlens=None, chunk_size=64):
    saw("kkt_solve")
    contiguous(k, b)
    return inverse(k, b, cu_seqlens)


def chunk_gated_delta_rule_fwd(
    q, k, v, g, beta, scale=None, initial_state=None, cu_seqlens=None, output_final_state=True, output_h=False, auto_cp=True, state_v_first=False,
    enable_fwd_cp_cache=False, cp_context=None, is_train=None,
):  # fmt: skip
    if cp_context is None:
        cp_context = _auto_intra_cp_context(k, v, cu_seqlens, CHUNK_SIZE, auto_cp, enable_fwd_cp_cache if is_train is None else is_train)
    saw("chunk_gated_delta_rule_fwd", auto_cp=auto_cp, offsets=cu_seqlens, plan=cp_context)
    _checked(q, k, v, g, beta, cu_seqlens)
    contiguous(initial_state)
    o, state = forward(q, k, v, g, beta, scale or 128**-0.5, initial_state, cu_seqlens)
    grid = cp_context.cu_seqlens
    cut = enable_fwd_cp_cache and auto_cp and k.shape[0] == 1 and k.shape[1] > CHUNK_SIZE
    cache = (
        CPCache(*(x.double().sum().float().view(1) for x in (k, v)), None, *(x.double().sum().float().view(1) for x in (g, beta))) if cut else None
    )
    return running(g, 64, 1.0, grid), inverse(k, beta, grid), o, None, state if output_final_state else None, cache


def chunk_gated_delta_rule_bwd(
    q, k, v, g, beta, A, do, dht=None, scale=None, initial_state=None, cu_seqlens=None, state_v_first=False, auto_cp=True, cp_cache=None,
    cp_context=None,
):  # fmt: skip
    if cp_context is None:
        cp_context = _auto_intra_cp_context(k, v, cu_seqlens, CHUNK_SIZE, auto_cp, True)
    saw("chunk_gated_delta_rule_bwd", auto_cp=auto_cp, cached=cp_cache is not None, plan=cp_context)
    _checked(q, k, v, g, beta, cu_seqlens)
    contiguous(do, dht, initial_state)
    grid = cp_context.cu_seqlens
    assert torch.equal(A, inverse(k, beta, grid)), "the inverses of other keys"
    if cp_cache is not None:
        kept = (cp_cache.h0, cp_cache.mt, cp_cache.fallback_bwd, cp_cache.num_warmup_bwd)
        assert all(torch.equal(one, x.double().sum().float().view(1)) for one, x in zip(kept[:2], (k, v), strict=True)), (
            "the segments of another call"
        )
    dq, dk, dv, dg, db, dh0 = backward(q, k, v, single(g, 64, 1.0, grid), beta, scale or 128**-0.5, initial_state, cu_seqlens, do, dht)
    return dq, dk, dv, db, dg, dh0
