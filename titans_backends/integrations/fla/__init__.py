"""FLA's functions, layers and dispatch, on our ops (flash-linear-attention 0.6).

    from titans_backends.integrations.fla import chunk_gated_delta_rule      # instead of fla.ops.gated_delta_rule
    from titans_backends.integrations.fla import register_with_fla            # FLA's own models, unchanged, on our kernels

Importing this makes FLA's DeltaNet and GatedDeltaNet known to `titans_backends.accelerate`. It imports neither fla nor a kernel package.
"""

from titans_backends.integrations.fla.functions import (
    chunk_delta_rule,
    chunk_gated_delta_rule,
    fused_recurrent_delta_rule,
    fused_recurrent_gated_delta_rule,
)
from titans_backends.integrations.fla.layers import DELTA_NET, GATED_DELTA_NET
from titans_backends.integrations.fla.registration import Registration, register_with_fla

__all__ = [
    "DELTA_NET",
    "GATED_DELTA_NET",
    "Registration",
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "register_with_fla",
]
