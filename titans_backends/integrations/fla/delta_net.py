"""FLA's DeltaNet layer, run by our ops: convolutions, memory, norm. Its projections, parameters and cache stay as they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titans_backends.integrations.fla import convolutions, layer_cache, output_norm
from titans_backends.integrations.fla.layer_cache import LayerCache
from titans_backends.integrations.fla.padding import packing_of
from titans_backends.integrations.fla.rule import DeltaRule, compute

__all__ = ["QK_ACTIVATIONS", "QK_NORMS", "DeltaNetForward"]

QK_ACTIVATIONS = ("silu", "relu", "elu", "identity")
QK_NORMS = ("l2", "sum")


class DeltaNetForward:
    """The forward that goes in front of FLA's; what it reads besides are the layer's own attributes."""

    titans_memory_backend: str | None
    titans_prepare_backend: str | None
    titans_conv_backend: str | None
    titans_norm_backend: str | None
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    b_proj: nn.Module
    g_proj: nn.Module
    o_proj: nn.Module
    q_conv1d: convolutions.Convolution
    k_conv1d: convolutions.Convolution
    v_conv1d: convolutions.Convolution
    o_norm: output_norm.Norm
    head_k_dim: int
    head_v_dim: int
    qk_activation: str
    qk_norm: str
    use_beta: bool
    use_short_conv: bool
    use_gate: bool
    allow_neg_eigval: bool
    layer_idx: int | None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: LayerCache | None = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **kwargs: object,
    ) -> tuple[Tensor, None, LayerCache | None]:
        """`[B, T, D]` to `[B, T, D]`, None, and the cache, as FLA's: other keywords than `cu_seqlens` are the model's and mean nothing here."""
        batch, length, _ = hidden_states.shape
        cu_seqlens = kwargs.get("cu_seqlens")
        assert cu_seqlens is None or isinstance(cu_seqlens, Tensor)
        state, convs = layer_cache.state_of("DeltaNet", self.layer_idx, past_key_values)
        packing = packing_of("DeltaNet", attention_mask, length) if cu_seqlens is None else None
        x = hidden_states
        if packing is not None:
            x, cu_seqlens = packing.pack(x), packing.cu_seqlens
        keep = bool(use_cache)
        q, k, v, convs, normed = self._qkv(x, convs, cu_seqlens, keep)
        beta = self.b_proj(x).sigmoid() if self.use_beta else None
        if self.allow_neg_eigval:
            beta = v.new_full(v.shape[:3], 2.0) if beta is None else 2 * beta
        rule = DeltaRule(
            "DeltaNet", q, k, v, beta, None, q.dtype,
            initial_state=state, output_final_state=keep, qk_l2norm=self.qk_norm == "l2" and not normed, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        o, state = compute(rule, self.titans_memory_backend)
        layer_cache.keep(self.layer_idx, past_key_values, state, convs, length)
        if self.use_gate:
            o = output_norm.gated(o, self.g_proj(x).unflatten(-1, (-1, self.head_v_dim)), self.o_norm, self.titans_norm_backend)
        else:
            o = output_norm.plain(o, self.o_norm)
        y: Tensor = self.o_proj(o.flatten(-2))
        return y if packing is None else packing.unpack(y, batch, length), None, past_key_values

    def _qkv(
        self, x: Tensor, convs: tuple[Tensor, ...] | None, cu_seqlens: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...] | None, bool]:
        """q, k, v `[B, T, heads, D]`, the convolutions' states, and whether q and k have unit length already."""
        silu = torch.nn.functional.silu
        q, k = (project(x).unflatten(-1, (-1, self.head_k_dim)) for project in (self.q_proj, self.k_proj))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_v_dim))
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
