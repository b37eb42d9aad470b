"""FLA's GatedDeltaNet layer, run by our ops: convolutions, gates, memory, gated norm. Its projections, parameters and cache stay as they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titans_backends.integrations.fla import convolutions, layer_cache, output_norm
from titans_backends.integrations.fla.layer_cache import LayerCache
from titans_backends.integrations.fla.padding import packing_of
from titans_backends.integrations.fla.rule import DeltaRule, compute

__all__ = ["GatedDeltaNetForward"]


class GatedDeltaNetForward:
    """The forward that goes in front of FLA's; what it reads besides are the layer's own attributes."""

    titans_memory_backend: str | None
    titans_prepare_backend: str | None
    titans_norm_backend: str | None
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    a_proj: nn.Module
    b_proj: nn.Module
    g_proj: nn.Module
    o_proj: nn.Module
    q_conv1d: convolutions.Convolution
    k_conv1d: convolutions.Convolution
    v_conv1d: convolutions.Convolution
    o_norm: output_norm.Norm
    A_log: Tensor
    dt_bias: Tensor
    head_k_dim: int
    head_v_dim: int
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
        state, convs = layer_cache.state_of("GatedDeltaNet", self.layer_idx, past_key_values)
        packing = packing_of("GatedDeltaNet", attention_mask, length) if cu_seqlens is None else None
        x = hidden_states
        if packing is not None:
            x, cu_seqlens = packing.pack(x), packing.cu_seqlens
        keep = bool(use_cache)
        q, k = (project(x).unflatten(-1, (-1, self.head_k_dim)) for project in (self.q_proj, self.k_proj))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_v_dim))
        if self.use_short_conv:
            layers = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
            q, k, v, convs = convolutions.prepare((q, k, v), layers, convs, cu_seqlens, keep, "l2_eps", self.titans_prepare_backend)
        else:
            q, k, v, convs = *(torch.nn.functional.silu(y) for y in (q, k, v)), None
        rule = DeltaRule(
            "GatedDeltaNet", q, k, v, self.b_proj(x), self.a_proj(x), q.dtype, self.A_log, self.dt_bias, True, self.allow_neg_eigval,
            initial_state=state, output_final_state=keep, qk_l2norm=not self.use_short_conv, state_v_first=True, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        o, state = compute(rule, self.titans_memory_backend)
        layer_cache.keep(self.layer_idx, past_key_values, state, convs, length)
        if self.use_gate:
            o = output_norm.gated(o, self.g_proj(x).unflatten(-1, (-1, self.head_v_dim)), self.o_norm, self.titans_norm_backend)
        else:
            o = output_norm.plain(o, self.o_norm)
        y: Tensor = self.o_proj(o.flatten(-2))
        return y if packing is None else packing.unpack(y, batch, length), None, past_key_values
