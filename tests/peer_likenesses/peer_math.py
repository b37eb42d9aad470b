"""What the likenesses of other people's packages compute with: the eager backend in float64, in the conventions of those packages; and what they saw."""

import os

import torch
from titans_backends.backends.eager import gated_delta_rule as eager

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule

_CHUNKED = Candidate("eager", "chunked", (("chunk_size", 64), ("inverse", "blocks")))

SEEN = []
"""Every call: the function, FLA's switches at that time, and what a test may want to look at."""


def saw(function, **facts):
    switches = {name: os.environ.get(name) for name in ("FLA_FLASH_QLA", "FLA_INTRACARD_CP", "FLA_TILELANG")}
    SEEN.append({"function": function, "switches": switches, **facts})


def contiguous(*tensors):
    assert all(x is None or x.is_contiguous() for x in tensors), "these kernels take contiguous tensors"
    assert all(x is None or x.data_ptr() % 16 == 0 for x in tensors), "these kernels take rows by 16 bytes"


def spans(tokens, cu_seqlens):
    return [(0, tokens)] if cu_seqlens is None else list(zip(cu_seqlens.tolist()[:-1], cu_seqlens.tolist()[1:], strict=True))


def running(g, chunk, scale, cu_seqlens):
    """The sum of g inside each chunk of each sequence."""
    out = torch.empty_like(g, dtype=torch.float32)
    for begin, end in spans(g.shape[1], cu_seqlens):
        for start in range(begin, end, chunk):
            out[:, start : min(start + chunk, end)] = g[:, start : min(start + chunk, end)].float().cumsum(1) * scale
    return out


def single(total, chunk, scale, cu_seqlens):
    """g from its running sums."""
    out = torch.empty_like(total, dtype=torch.float64)
    for begin, end in spans(total.shape[1], cu_seqlens):
        for start in range(begin, end, chunk):
            part = total[:, start : min(start + chunk, end)].double() / scale
            out[:, start : min(start + chunk, end)] = torch.cat([part[:, :1], part.diff(dim=1)], 1)
    return out


def inverse(k, beta, cu_seqlens):
    """Not the inverse of a chunk's triangle, but something that belongs to these keys, rates and offsets alone."""
    kept = torch.zeros(*beta.shape, 64, dtype=torch.float64)
    kept[..., 0] = beta
    kept[..., 1] = k.double().sum((2, 3)).unsqueeze(-1)
    kept[..., 2] = 0 if cu_seqlens is None else cu_seqlens.double().sum()
    return kept


def wide(x):
    return None if x is None else x.double()


def _call(q, k, v, g, beta, scale, state, cu_seqlens):
    given = map(wide, (q, k, v, beta, g))
    return GatedDeltaRule(*given, scale=scale, initial_state=wide(state), output_final_state=True, cu_seqlens=cu_seqlens)


def forward(q, k, v, g, beta, scale, state, cu_seqlens):
    """o in v's dtype and the state in float32."""
    o, after = eager.run(_call(q, k, v, g, beta, scale, state, cu_seqlens), _CHUNKED)
    return o.to(v.dtype), after.float()


def backward(q, k, v, g, beta, scale, state, cu_seqlens, do, dht):
    """Gradients of q, k, v, g, beta and state, in float64; None for what was not given. Below autograd, as these functions are called."""
    call = _call(q, k, v, g, beta, scale, state, cu_seqlens)
    order = ("q", "k", "v", "beta", "g", "gate", "initial_state")
    needs = frozenset(name for name in order if getattr(call, name) is not None)
    found = dict(zip(order, eager.run_backward(call, (wide(do), wide(dht)), None, needs, _CHUNKED), strict=True))
    return [found[name] for name in ("q", "k", "v", "g", "beta", "initial_state")]


def unit(x):
    """x at unit length, and one over its length."""
    norm = torch.rsqrt(x.double().square().sum(-1) + 1e-6)
    return (x.double() * norm.unsqueeze(-1)).to(x.dtype), norm.float()


def unit_backward(y, norm, dy):
    y, dy = y.double(), dy.double()
    return (dy - (dy * y).sum(-1, keepdim=True) * y) * norm.double().unsqueeze(-1)
