"""FLA's GatedDeltaNet layer between its padding and its output norm: convolutions, gates, memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titans_backends.integrations.fla import convolutions
from titans_backends.integrations.fla.layer_forward import LayerForward, States
from titans_backends.integrations.fla.rule import DeltaRule, compute

__all__ = ["GatedDeltaNetForward"]


class GatedDeltaNetForward(LayerForward):
    """Its states are V-first, `[N, H, V, K]`."""

    titans_name = "GatedDeltaNet"
    a_proj: nn.Module
    A_log: Tensor
    dt_bias: Tensor

    def titans_memory(
        self, x: Tensor, state: Tensor | None, convs: States | None, cu_seqlens: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor | None, States | None]:
        """The gates are computed from A_log and dt_bias; q and k have unit length."""
        q, k, v = self.titans_projected(x)
        if self.use_short_conv:
            layers = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
            q, k, v, convs = convolutions.prepare((q, k, v), layers, convs, cu_seqlens, keep, "l2_eps", self.titans_prepare_backend)
        else:
            q, k, v, convs = *(torch.nn.functional.silu(y) for y in (q, k, v)), None
        rule = DeltaRule(
            self.titans_name, q, k, v, self.b_proj(x), self.a_proj(x), q.dtype, self.A_log, self.dt_bias, True, self.allow_neg_eigval,
            initial_state=state, output_final_state=keep, qk_l2norm=not self.use_short_conv, state_v_first=True, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        return *compute(rule, self.titans_memory_backend), convs
