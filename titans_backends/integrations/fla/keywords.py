"""The keywords of FLA's functions: which are known, which are refused by name, and what each refusal says. It computes nothing."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor

from titans_backends.integrations.fla.rule import DeltaRule, state_shape

__all__ = [
    "CHUNK_SIZES",
    "refuse_beta",
    "refuse_channel_decay",
    "refuse_chunk_size",
    "refuse_context",
    "refuse_gates",
    "refuse_hints",
    "refuse_operands",
    "refuse_state",
    "refuse_unknown",
    "state_layout",
]

CHUNK_SIZES = (16, 32, 64)


def refuse_unknown(function: str, unknown: Mapping[str, object]) -> None:
    """TypeError for a keyword that the function does not have, with those that it has; DeprecationWarning, raised as FLA raises it, for `head_first`."""
    if "head_first" in unknown:
        raise DeprecationWarning(
            f"{function}: head_first is gone from FLA, and not known here either; pass q, k and v as [B, T, H, D]: x.transpose(1, 2) where they are [B, H, T, D]"
        )
    if unknown:
        raise TypeError(f"{function}: got an unexpected keyword {', '.join(map(repr, unknown))}; its parameters are {', '.join(_known(function))}")


def _known(function: str) -> tuple[str, ...]:
    """The parameters of one of the functions, the old name of one among them."""
    from titans_backends.integrations.fla.functions import READERS

    code = READERS[function].__code__
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return (*names, "transpose_state_layout") if "state_v_first" in names else names


def state_layout(function: str, state_v_first: bool, unknown: dict[str, object]) -> bool:
    """`state_v_first`, or what its old name `transpose_state_layout` says, with a DeprecationWarning as FLA's; ValueError where both are given."""
    if "transpose_state_layout" not in unknown:
        return bool(state_v_first)
    if state_v_first:
        raise ValueError(f"{function}: state_v_first and its old name transpose_state_layout are both given; pass state_v_first alone")
    warnings.warn(f"{function}: transpose_state_layout is the old name of state_v_first; pass that", DeprecationWarning, stacklevel=4)
    return bool(unknown.pop("transpose_state_layout"))


def refuse_operands(function: str, **operands: object) -> None:
    """TypeError for a q, k or v that is no tensor."""
    for name, value in operands.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{function}: {name} must be a torch.Tensor, got {type(value).__name__}")


def refuse_hints(function: str, cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None = None, chunk_indices: Tensor | None = None) -> None:
    """ValueError for what only repeats cu_seqlens, where there are none to repeat or it cannot be a repetition."""
    for name, value in (("cu_seqlens_cpu", cu_seqlens_cpu), ("chunk_indices", chunk_indices)):
        if value is not None and cu_seqlens is None:
            raise ValueError(f"{function}: {name} is given without cu_seqlens, which it only repeats; pass cu_seqlens too, or leave {name} out")
    if cu_seqlens is not None and cu_seqlens_cpu is not None and cu_seqlens.shape != cu_seqlens_cpu.shape:
        raise ValueError(
            f"{function}: cu_seqlens_cpu has shape {tuple(cu_seqlens_cpu.shape)}, but cu_seqlens {tuple(cu_seqlens.shape)}; "
            "pass cu_seqlens.cpu(), or leave it out"
        )


def refuse_chunk_size(function: str, chunk_size: int | None) -> None:
    """ValueError for a chunk size that FLA does not take; None leaves it to the tuner."""
    if chunk_size is not None and chunk_size not in CHUNK_SIZES:
        raise ValueError(f"{function}: chunk_size must be one of {', '.join(map(str, CHUNK_SIZES))}, or left out for the fastest, got {chunk_size!r}")


def refuse_gates(function: str, g: Tensor | None, A_log: Tensor | None, dt_bias: Tensor | None, in_kernel: bool) -> None:
    """ValueError where the gate's activation lacks something, or something is given that would do nothing."""
    if in_kernel:
        for name, value, what in (
            ("A_log", A_log, "the logarithm of each value head's decay, [HV]"),
            ("g", g, "the gate before its activation, [B, T, HV]"),
        ):
            if value is None:
                raise ValueError(f"{function}: use_gate_in_kernel=True needs {name}, {what}; pass it, or use_gate_in_kernel=False")
        return
    for name, value in (("A_log", A_log), ("dt_bias", dt_bias)):
        if value is not None:
            raise ValueError(f"{function}: {name} does nothing without use_gate_in_kernel=True; pass that too, or leave {name} out")


def refuse_beta(function: str, beta: Tensor | None, v: Tensor, logits: bool = False, doubled: bool = False) -> None:
    """ValueError for a beta for each value channel, for the sigmoid of none, and for doubling what is no sigmoid."""
    if doubled and not logits:
        raise ValueError(
            f"{function}: allow_neg_eigval=True doubles what use_beta_sigmoid_in_kernel=True computes, which is off; pass that too, or 2 * beta yourself"
        )
    if beta is None:
        if logits:
            raise ValueError(
                f"{function}: use_beta_sigmoid_in_kernel=True needs beta, the logits [B, T, HV]; beta=None stands for ones, without a sigmoid"
            )
    elif beta.dim() == 4:
        raise ValueError(
            f"{function}: beta has shape {tuple(beta.shape)}, one for each value channel; here it is one for each head, [B, T, HV] = {tuple(v.shape[:3])}. "
            "FLA's own fused_recurrent functions take one for each channel"
        )


def refuse_channel_decay(function: str, gk: Tensor | None, gv: Tensor | None) -> None:
    """ValueError for a decay of each key or value channel."""
    for name, value in (("gk", gk), ("gv", gv)):
        if value is not None:
            raise ValueError(
                f"{function}: {name}, a decay for each channel, is not computed here; pass g [B, T, HV], one for each head, or call FLA's own function"
            )


def refuse_context(function: str, cp_context: object) -> None:
    """ValueError for context parallelism over several devices."""
    if cp_context is not None:
        raise ValueError(f"{function}: cp_context, one sequence over several devices, is not computed here; pass None, or call FLA's own function")


def refuse_state(rule: DeltaRule) -> None:
    """ValueError, in the caller's own layout, for an initial state of another shape. Tensors of a wrong rank are left to the op's own check."""
    state = rule.initial_state
    if state is None or rule.q.dim() != 4 or rule.v.dim() != 4:
        return
    expected = state_shape(rule)
    if tuple(state.shape) != expected:
        letters = "[N, HV, V, K]" if rule.state_v_first else "[N, HV, K, V]"
        of = "" if rule.cu_seqlens is None else f" for the {expected[0]} sequences of cu_seqlens"
        raise ValueError(
            f"{rule.function}: initial_state has shape {tuple(state.shape)}; with state_v_first={rule.state_v_first} it must be {letters} = {expected}{of}"
        )
