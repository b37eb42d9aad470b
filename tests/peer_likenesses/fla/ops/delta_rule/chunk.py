import torch
from peer_math import backward, contiguous, forward, inverse, saw


def prepare_wy_repr_fwd(k, v, beta, cu_seqlens=None, chunk_indices=None, chunk_size=64):
    saw("prepare_wy_repr_fwd")
    contiguous(k, v, beta)
    return None, None, inverse(k, beta, cu_seqlens)


def chunk_delta_rule_fwd(q, k, v, beta, scale, initial_state, output_final_state, cu_seqlens=None, chunk_indices=None, chunk_size=64):
    saw("chunk_delta_rule_fwd")
    contiguous(q, k, v, beta, initial_state)
    assert q.shape[2] == v.shape[2], "it knows no grouped heads"
    o, state = forward(q, k, v, None, beta, scale, initial_state, cu_seqlens)
    return o, inverse(k, beta, cu_seqlens), state if output_final_state else None


def chunk_delta_rule_bwd(q, k, v, beta, A, scale, initial_state, do, dht, cu_seqlens=None, chunk_indices=None, chunk_size=64):
    saw("chunk_delta_rule_bwd")
    contiguous(q, k, v, beta, initial_state, do, dht)
    assert torch.equal(A, inverse(k, beta, cu_seqlens)), "the inverses of other keys"
    dq, dk, dv, _, db, dh0 = backward(q, k, v, None, beta, scale, initial_state, cu_seqlens, do, dht)
    return dq, dk, dv, db, dh0


def chunk_delta_rule(*args, **kwargs):
    return "FLA's own"
