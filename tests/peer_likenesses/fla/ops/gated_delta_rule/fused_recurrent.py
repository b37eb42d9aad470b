from peer_math import contiguous, forward, saw, unit


def fused_recurrent_gated_delta_rule_fwd(
    q, k, v, g=None, gk=None, gv=None, beta=None, A_log=None, dt_bias=None, scale=None, initial_state=None, output_final_state=False,
    use_qk_l2norm_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, cu_seqlens=None,
):  # fmt: skip
    saw("fused_recurrent_gated_delta_rule_fwd")
    contiguous(q, k, v, g, beta, initial_state)
    if use_qk_l2norm_in_kernel:
        q, k = unit(q.double())[0], unit(k.double())[0]
    return forward(q, k, v, g, beta, scale, initial_state, cu_seqlens)


def fused_recurrent_gated_delta_rule(*args, **kwargs):
    return "FLA's own"
