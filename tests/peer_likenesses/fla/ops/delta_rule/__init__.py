from fla.ops.delta_rule.chunk import chunk_delta_rule

__all__ = ["chunk_delta_rule", "fused_recurrent_delta_rule"]


def fused_recurrent_delta_rule(*args, **kwargs):
    return "FLA's own"
