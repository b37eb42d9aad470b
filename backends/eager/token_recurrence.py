"""The gated delta rule one token at a time, and its gradients: for decode, and for a few tokens where chunks do not pay (SPEC.md 4).

Tokens are `[B, H, T, *]`, states `[B, H, K, V]`, all in the dtype of the arithmetic; q holds the scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TokenGradients", "Tokens", "token_steps", "token_steps_backward"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """q, k `[B, H, T, K]`, v `[B, H, T, V]`, beta and `decay` (e^g, None without g) `[B, H, T, 1]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    decay: Tensor | None


def token_steps(x: Tokens, state: Tensor, before: list[Tensor] | None = None) -> Tensor:
    """Moves `state` over the tokens in place and returns o `[B, H, T, V]`; `before` collects a copy of the state ahead of every token.

    o = q (S + k u^T) is read as q S + (q k) u, so that one product with S serves both k and q.
    """
    batch, heads, tokens, keys = x.k.shape
    o = torch.empty_like(x.v)
    both = torch.stack([x.k, x.q], 3)
    weight = (x.q * x.k).sum(-1, keepdim=True)
    flat = state.view(batch * heads, keys, x.v.shape[3])
    for t in range(tokens):
        if before is not None:
            before.append(state.clone())
        if x.decay is not None:
            state.mul_(x.decay[:, :, t, :, None])
        seen = torch.bmm(both[:, :, t].reshape(batch * heads, 2, keys), flat).unflatten(0, (batch, heads))
        u = (x.v[:, :, t] - seen[:, :, 0]).mul_(x.beta[:, :, t])
        flat.baddbmm_(x.k[:, :, t].reshape(batch * heads, keys, 1), u.view(batch * heads, 1, x.v.shape[3]))
        torch.addcmul(seen[:, :, 1], weight[:, :, t], u, out=o[:, :, t])
    return o


@dataclass(frozen=True, slots=True)
class TokenGradients:
    """Gradients of `Tokens`, with that of g in the place of e^g."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None


def token_steps_backward(x: Tokens, before: list[Tensor], d_o: Tensor | None, d_state: Tensor) -> TokenGradients:
    """Gradients from `d_o [B, H, T, V]` (None: zero); moves `d_state`, that of the state after the tokens, to the one before them in place."""
    dq, dk, dv, dbeta = (torch.zeros_like(part) for part in (x.q, x.k, x.v, x.beta))
    dg = None if x.decay is None else torch.zeros_like(x.decay)
    for t in range(x.k.shape[2] - 1, -1, -1):
        q, k, v, beta = (part[:, :, t] for part in (x.q, x.k, x.v, x.beta))
        decay = None if x.decay is None else x.decay[:, :, t, :, None]
        decayed = before[t] if decay is None else before[t] * decay
        error = v - _read(decayed, k)
        u = error * beta
        if d_o is not None:
            do = d_o[:, :, t]
            dq[:, :, t] = _write(decayed, do) + k * (u * do).sum(-1, keepdim=True)
            d_state += q[..., :, None] * do[..., None, :]
        du = _read(d_state, k)
        d_seen = du * -beta
        dk[:, :, t] = _write(d_state, u) + _write(decayed, d_seen)
        dv[:, :, t] = -d_seen
        dbeta[:, :, t] = (du * error).sum(-1, keepdim=True)
        d_state += k[..., :, None] * d_seen[..., None, :]
        if decay is not None and dg is not None:
            d_state.mul_(decay)
            dg[:, :, t] = (d_state * before[t]).sum((-2, -1))[..., None]
    return TokenGradients(dq, dk, dv, dbeta, dg)


def _read(state: Tensor, k: Tensor) -> Tensor:
    """S^T k."""
    return torch.matmul(k[..., None, :], state)[..., 0, :]


def _write(state: Tensor, x: Tensor) -> Tensor:
    """S x."""
    return torch.matmul(state, x[..., :, None])[..., 0]
