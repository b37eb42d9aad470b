"""short_conv: a depthwise convolution of four taps along the tokens, bias, SiLU (the layer's q, k and v).

    z_t = bias + sum over j < 4 of  weight_j * x_(t - 3 + lookahead + j)        y = silu(z)

`lookahead=0` is causal. `lookahead=1` is the original's alignment, taps t - 2 to t + 1: `Conv1d(kernel_size=4, padding=2)` cut to T. Beyond the
ends of a sequence x is 0. Channels are heads times V, each by itself: `[B, T, D]` is `x.unflatten(-1, (H, V))`, a `Conv1d` weight `[D, 1, 4]` is
`weight.view(H, V, 4)`.

A state holds the last four inputs, the newest last, as FLA and transformers keep them; the oldest is never read. So a causal sequence that is
cut anywhere goes on exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from titans_backends.contracts import arguments as a
from titans_backends.contracts.case import Variant
from titans_backends.contracts.chunks import sequence_bounds
from titans_backends.contracts.contract import Argument, Contract, Option, Output, arithmetic_dtype

__all__ = ["CONTRACT", "LOOKAHEAD", "TAPS", "ShortConv", "check_conv", "convolve"]

TAPS = 4
LOOKAHEAD = Option("lookahead", "int", 0, minimum=0)


@dataclass(slots=True, eq=False)
class ShortConv:
    """Arguments: x `[B, T, H, V]`, weight `[H, V, 4]`, oldest tap first, bias `[H, V]`, initial_state `[N, H, V, 4]`, the newest input last."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    _: KW_ONLY
    activation: str = "silu"
    lookahead: int = 0
    initial_state: Tensor | None = None
    output_final_state: bool = False
    cu_seqlens: Tensor | None = None


def check(call: ShortConv, dims: Mapping[str, int]) -> None:
    """Four taps, one of which reads the token itself; no state where the convolution looks ahead."""
    if dims["W"] != TAPS:
        held = "weight" if call.weight.shape[-1] != TAPS else "initial_state"
        raise ValueError(f"short_conv: {held} has {dims['W']} taps in its last dimension; it must have {TAPS}")
    check_conv("short_conv", call.lookahead, "initial_state" if call.initial_state is not None else None, call.output_final_state)


def check_conv(op: str, lookahead: int, state: str | None, output_final_state: bool) -> None:
    """No state where the convolution looks ahead, and no further than its taps reach; `state` names the one that was given."""
    if lookahead >= TAPS:
        raise ValueError(f"{op}: lookahead must be 0 (causal) to {TAPS - 1}, got {lookahead}; the original's alignment is 1")
    if lookahead and (state is not None or output_final_state):
        raise ValueError(
            f"{op}: {state or 'output_final_state=True'} with lookahead={lookahead}: its last outputs wait for tokens that have not come, so it "
            "cannot be continued from a state. Pass lookahead=0, or the whole sequence at once"
        )


def reference(call: ShortConv) -> tuple[Tensor | None, ...]:
    """y rounded to x's dtype."""
    y, final = convolve(call)
    return y.to(call.x.dtype), final


def convolve(call: ShortConv) -> tuple[Tensor, Tensor | None]:
    """One sequence at a time, between the state before it and zeros behind it; y in the arithmetic's dtype."""
    dtype = arithmetic_dtype(call.x.dtype)
    x, weight = call.x.to(dtype), call.weight.to(dtype)
    dense = call.cu_seqlens is None
    outputs, finals = [x[:, :0]], []
    for n, (start, stop) in enumerate(sequence_bounds(x.shape[1], call.cu_seqlens)):
        part, length = x[:, start:stop], stop - start
        before = x.new_zeros(x.shape[0], TAPS, *x.shape[2:])
        if call.initial_state is not None:
            before = (call.initial_state if dense else call.initial_state[n : n + 1]).to(dtype).movedim(-1, 1)
        padded = torch.cat([before, part, x.new_zeros(x.shape[0], call.lookahead, *x.shape[2:])], 1)
        first = 1 + call.lookahead
        z = sum((weight[..., j] * padded[:, first + j : first + j + length] for j in range(TAPS)), torch.zeros_like(part))
        outputs.append(z if call.bias is None else z + call.bias.to(dtype))
        finals.append(padded[:, length : length + TAPS].movedim(1, -1))
    z = torch.cat(outputs, 1)
    y = torch.nn.functional.silu(z) if call.activation == "silu" else z
    if not call.output_final_state:
        return y, None
    return y, torch.cat(finals) if finals else x.new_zeros(0, *x.shape[2:], TAPS)


def work(dims: Mapping[str, int], call: ShortConv) -> tuple[float, float]:
    """FLOP: four multiply-adds, the bias, and four for SiLU."""
    return dims["B"] * dims["T"] * dims["H"] * dims["V"] * (2.0 * TAPS + 5.0), 0.0


CONTRACT = Contract(
    name="short_conv",
    summary="a depthwise convolution of four taps along the tokens, with bias and SiLU, causal or with the original's look-ahead",
    make_call=ShortConv,
    arguments=(
        Argument("x", ("B T H V",), "operand", "value"),
        Argument("weight", ("H V W",), "gate", "value"),
        Argument("bias", ("H V",), "gate", "value", optional=True),
        Argument("initial_state", ("N H V W",), "state", "state", optional=True),
        a.CU_SEQLENS,
    ),
    options=(
        Option("activation", "str", "silu", choices=("silu", "none")),
        LOOKAHEAD,
        a.OUTPUT_FINAL_STATE,
    ),
    outputs=(Output("y", "B T H V", like="x"), Output("final_state", "N H V W", when="output_final_state")),
    check=check,
    reference=reference,
    work=work,
    variants=(
        Variant("causal", {"output_final_state": True}, given=("bias", "initial_state")),
        Variant("original", {"lookahead": 1}, given=("bias",)),
        Variant("plain", {"activation": "none", "output_final_state": True}),
    ),
)
