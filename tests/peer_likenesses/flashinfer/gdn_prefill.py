import torch
from peer_math import contiguous, forward, saw, unit


def chunk_gated_delta_rule(
    q, k, v, g=None, beta=None, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, use_qk_l2norm_in_kernel=False,
    output=None, output_state=None, state_checkpoints=None, checkpoint_cu_starts=None, checkpoint_every_n_tokens=0, use_cp="auto",
    state_indices=None, _cp_chunk_len=None, backend="auto", max_seqlen=None,
):  # fmt: skip
    saw("chunk_gated_delta_rule", max_seqlen=max_seqlen)
    contiguous(q, k, v, g, beta, initial_state, cu_seqlens)
    for x in (q, k, v, g, beta, initial_state):
        assert x is None or not x.requires_grad, "DLPack hands on no tensor that wants a gradient"
    assert q.dim() == k.dim() == v.dim() == 3
    assert k.shape[-1] == v.shape[-1] == 128
    assert beta.dtype == torch.float32
    assert g is None or g.dtype == torch.float32
    longest = int(cu_seqlens.diff().max())
    assert max_seqlen is None or max_seqlen >= longest
    if use_qk_l2norm_in_kernel:
        q, k = unit(q)[0], unit(k)[0]
    state = None if initial_state is None else initial_state.transpose(-1, -2)
    decay = None if g is None else g.log().clamp_min(-1e3)
    given = [None if x is None else x.unsqueeze(0) for x in (q, k, v, decay, beta)]
    o, after = forward(*given, scale or 128**-0.5, state, cu_seqlens)
    return (o[0], after.transpose(-1, -2).contiguous()) if output_final_state else o[0]
