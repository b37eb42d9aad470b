"""FLA's DeltaNet layer between its padding and its output norm: convolutions, activation and norm of q and k, memory."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.integrations.fla import convolutions
from titans_backends.integrations.fla.layer_forward import LayerForward, States
from titans_backends.integrations.fla.rule import DeltaRule, compute

__all__ = ["QK_ACTIVATIONS", "QK_NORMS", "DeltaNetForward"]

QK_ACTIVATIONS = ("silu", "relu", "elu", "identity")
QK_NORMS = ("l2", "sum")


class DeltaNetForward(LayerForward):
    """Its states are `[N, H, K, V]`."""

    titans_name = "DeltaNet"
    qk_activation: str
    qk_norm: str
    use_beta: bool

    def titans_memory(
        self, x: Tensor, state: Tensor | None, convs: States | None, cu_seqlens: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor | None, States | None]:
        """No decay; beta is a sigmoid, or 1."""
        q, k, v, convs, normed = self.titans_qkv(x, convs, cu_seqlens, keep)
        beta = self.b_proj(x).sigmoid() if self.use_beta else None
        if self.allow_neg_eigval:
            beta = v.new_full(v.shape[:3], 2.0) if beta is None else 2 * beta
        rule = DeltaRule(
            self.titans_name, q, k, v, beta, None, q.dtype,
            initial_state=state, output_final_state=keep, qk_l2norm=self.qk_norm == "l2" and not normed, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        return *compute(rule, self.titans_memory_backend), convs

    def titans_qkv(
        self, x: Tensor, convs: States | None, cu_seqlens: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor, States | None, bool]:
        """q, k, v `[B, T, heads, D]`, the convolutions' states, and whether q and k have unit length already."""
        silu = torch.nn.functional.silu
        q, k, v = self.titans_projected(x)
        normed = False
        if self.use_short_conv:
            layers = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
            if all(convolutions.activated(conv) for conv in layers):
                normed = self.qk_norm == "l2" and self.qk_activation == "silu"
                norm = "l2_eps" if normed else "none"
                q, k, v, convs = convolutions.prepare((q, k, v), layers, convs, cu_seqlens, keep, norm, self.titans_prepare_backend)
            else:
                q, k, v, convs = convolutions.convolve((q, k, v), layers, convs, cu_seqlens, keep, self.titans_conv_backend)
        else:
            convs, v = None, silu(v)
            if self.qk_activation == "silu":
                q, k = silu(q), silu(k)
        if self.qk_activation == "relu":
            q, k = q.relu(), k.relu()
        elif self.qk_activation == "elu":
            q, k = (torch.nn.functional.elu(y) + 1 for y in (q, k))
        if self.qk_norm == "sum":
            q, k = (torch.nn.functional.normalize(y, p=1.0, dim=-1, eps=1e-6) for y in (q, k))
        return q, k, v, convs, normed
