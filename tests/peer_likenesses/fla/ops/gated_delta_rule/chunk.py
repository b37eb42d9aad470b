import torch
from peer_math import backward, contiguous, forward, inverse, running, saw, single, unit, unit_backward

from fla.backends import dispatch

RCP_LN2 = 1.4426950216


def prepare_chunk_indices(cu_seqlens, chunk_size, cu_seqlens_cpu=None):
    offsets = cu_seqlens.tolist()
    pairs = [(i, j) for i in range(len(offsets) - 1) for j in range(-(-(offsets[i + 1] - offsets[i]) // chunk_size))]
    return torch.tensor(pairs, dtype=cu_seqlens.dtype).reshape(-1, 2)


def _packing(cu_seqlens, chunk_indices):
    assert (cu_seqlens is None) == (chunk_indices is None)
    assert cu_seqlens is None or torch.equal(chunk_indices, prepare_chunk_indices(cu_seqlens, 64))


def l2norm_fwd(x, eps=1e-6, output_dtype=None):
    saw("l2norm_fwd")
    contiguous(x)
    return unit(x)


def l2norm_bwd(y, rstd, dy, eps=1e-6):
    return unit_backward(y, rstd, dy)


def chunk_local_cumsum(g, chunk_size, reverse=False, scale=None, cu_seqlens=None, output_dtype=torch.float, chunk_indices=None):
    contiguous(g)
    _packing(cu_seqlens, chunk_indices)
    return running(g, chunk_size, scale, cu_seqlens)


def chunk_gated_delta_rule_fwd_intra(k, v, g=None, beta=None, cu_seqlens=None, chunk_size=64, chunk_indices=None):
    saw("chunk_gated_delta_rule_fwd_intra")
    contiguous(k, v, g, beta)
    _packing(cu_seqlens, chunk_indices)
    return None, None, inverse(k, beta, cu_seqlens)


def chunk_gated_delta_rule_fwd(
    q, k, v, g, beta, scale, initial_state, output_final_state, state_v_first=False, cu_seqlens=None, cp_context=None, chunk_indices=None,
    use_gate_in_kernel=False, A_log=None, dt_bias=None, chunk_size=64,
):  # fmt: skip
    saw("chunk_gated_delta_rule_fwd", offsets=cu_seqlens)
    contiguous(q, k, v, g, beta, initial_state)
    _packing(cu_seqlens, chunk_indices)
    o, state = forward(q, k, v, g, beta, scale, initial_state, cu_seqlens)
    total = running(g, chunk_size, RCP_LN2, cu_seqlens)
    return total, o, inverse(k, beta, cu_seqlens), state if output_final_state else None, initial_state, None


def chunk_gated_delta_rule_bwd(
    q, k, v, g, beta, A, scale, initial_state, do, dht, state_v_first=False, cu_seqlens=None, cp_context=None, chunk_indices=None,
    use_gate_in_kernel=False, g_input=None, A_log=None, dt_bias=None, chunk_size=64,
):  # fmt: skip
    saw("chunk_gated_delta_rule_bwd")
    contiguous(q, k, v, g, beta, initial_state, do, dht)
    _packing(cu_seqlens, chunk_indices)
    assert torch.equal(A, inverse(k, beta, cu_seqlens)), "the inverses of other keys"
    dq, dk, dv, dg, db, dh0 = backward(q, k, v, single(g, chunk_size, RCP_LN2, cu_seqlens), beta, scale, initial_state, cu_seqlens, do, dht)
    return dq, dk, dv, db, dg, dh0, None, None


@dispatch("gated_delta_rule")
def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, **more):
    saw("chunk_gated_delta_rule")
    return "FLA's own"
