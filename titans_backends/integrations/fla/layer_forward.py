"""What FLA's two layers have in common, run by our ops: padding, cache, output norm and projection. What lies between is each layer's own.

Submodules and parameters are read at every call, so that what is exchanged after the swap is seen.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from titans_backends.integrations.fla import convolutions, layer_cache, output_norm
from titans_backends.integrations.fla.layer_cache import LayerCache
from titans_backends.integrations.fla.padding import packing_of

__all__ = ["LayerForward", "States"]

States = tuple[Tensor, ...]


class LayerForward:
    """A forward that goes in front of FLA's; what it reads besides are the layer's own attributes."""

    titans_name: ClassVar[str]
    titans_memory_backend: str | None
    titans_prepare_backend: str | None
    titans_conv_backend: str | None
    titans_norm_backend: str | None
    titans_norm_class: type
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    b_proj: nn.Module
    g_proj: nn.Module
    o_proj: nn.Module
    q_conv1d: convolutions.Convolution
    k_conv1d: convolutions.Convolution
    v_conv1d: convolutions.Convolution
    o_norm: nn.Module
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
        if cu_seqlens is not None and not isinstance(cu_seqlens, Tensor):
            raise TypeError(f"{self.titans_name}: cu_seqlens must be a torch.Tensor or None, got {type(cu_seqlens).__name__}")
        state, convs = layer_cache.state_of(self.titans_name, self.layer_idx, past_key_values)
        packing = packing_of(self.titans_name, attention_mask, batch, length) if cu_seqlens is None else None
        x = hidden_states
        if packing is not None:
            x, cu_seqlens = packing.pack(x), packing.cu_seqlens
        o, state, convs = self.titans_memory(x, state, convs, cu_seqlens, bool(use_cache))
        layer_cache.keep(self.layer_idx, past_key_values, state, convs, length)
        if self.use_gate:
            o = output_norm.gated(
                o, self.g_proj(x).unflatten(-1, (-1, self.head_v_dim)), self.o_norm, self.titans_norm_class, self.titans_norm_backend
            )
        else:
            o = output_norm.plain(o, self.o_norm, self.titans_norm_class)
        y: Tensor = self.o_proj(o.flatten(-2))
        return y if packing is None else packing.unpack(y, batch, length), None, past_key_values

    def titans_memory(
        self, x: Tensor, state: Tensor | None, convs: States | None, cu_seqlens: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor | None, States | None]:
        """From the layer's input `[B, T, D]` and the states before it: o `[B, T, H, V]`, and the states after it if kept."""
        raise NotImplementedError

    def titans_projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v by heads, `[B, T, heads, D]`."""
        q, k = (project(x).unflatten(-1, (-1, self.head_k_dim)) for project in (self.q_proj, self.k_proj))
        return q, k, self.v_proj(x).unflatten(-1, (-1, self.head_v_dim))
