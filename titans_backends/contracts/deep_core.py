"""deep_core: a third core that learns slowly, one update a block of chunks. Experimental: the definition may still change.

One level of a continuum memory (Nested Learning, arXiv 2512.24695, eq. 70 and 74), linear. A block is L = chunk_size * period tokens, m its number:

    reads    o_t = gate_t * scale * D_m^T q_t                      D_m is fixed during block m: strictly causal, no term within the block
    error    e_t = v_t - D_m^T k_t                                 the gradient of |D^T k - v|^2 / 2, all at the frozen D_m
    update   D_{m+1} = exp(sum of g_t) D_m + (sum of eta_t k_t e_t^T) / Z_m      sums over the block's tokens

Z_m: "safe" is max(1, sum of eta_t |k_t|^2), which keeps the update a contraction; "mean" is L; "sum" is 1, the paper's, which diverges for large eta or L.
A block that is still open has changed nothing: its sums are carried as error E `[N, H, K, V]`, mass z = sum of eta |k|^2 and log_decay = sum of g, both
`[N, H]`, and block_offset says how many of its tokens they hold. With that carry a sequence cut anywhere goes on exactly; after T tokens
the offset is (block_offset + T) % L. Several levels are several calls with periods of their own, whose outputs the caller weighs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from titans_backends.contracts import arguments as a
from titans_backends.contracts.algebra import expand_heads, heads_first, zeros_state
from titans_backends.contracts.case import Variant
from titans_backends.contracts.chunks import chunk_spans, sequence_bounds
from titans_backends.contracts.contract import Argument, Contract, Option, Output, arithmetic_dtype

__all__ = ["CONTRACT", "ETA", "NORMALIZE", "PERIOD", "Carry", "DeepCore", "close_block", "normalizer"]

ETA = Argument("eta", ("B T H",), "gate", "beta")
PERIOD = Option("period", "int", 4, minimum=1)
NORMALIZE = Option("normalize", "str", "safe", choices=("safe", "mean", "sum"))

_OPEN = ("initial_error", "initial_mass", "initial_log_decay")
_CARRIED = ("initial_state", *_OPEN)


class Carry(NamedTuple):
    """What a sequence hands on: D and E `[N, H, K, V]`, the open block's mass and summed g `[N, H]`."""

    state: Tensor
    error: Tensor
    mass: Tensor
    log_decay: Tensor


@dataclass(slots=True, eq=False)
class DeepCore:
    """Arguments: q, k `[B, T, G, K]`, v `[B, T, H, V]`, eta (step size), g (log decay <= 0), gate `[B, T, H]`, the carry: D, E `[N, H, K, V]`,
    mass and log_decay `[N, H]`. Experimental."""

    q: Tensor
    k: Tensor
    v: Tensor
    eta: Tensor
    g: Tensor | None = None
    _: KW_ONLY
    gate: Tensor | None = None
    chunk_size: int = 64
    period: int = 4
    normalize: str = "safe"
    scale: float = 1.0
    initial_state: Tensor | None = None
    initial_error: Tensor | None = None
    initial_mass: Tensor | None = None
    initial_log_decay: Tensor | None = None
    block_offset: int = 0
    output_final_state: bool = False
    cu_seqlens: Tensor | None = None


def check(call: DeepCore, dims: Mapping[str, int]) -> None:
    """The offset lies inside a block; D and an open block's three sums come together; D alone only where a block begins."""
    block = call.chunk_size * call.period
    if not 0 <= call.block_offset < block:
        raise ValueError(
            f"deep_core: block_offset must be in [0, chunk_size * period) = [0, {block}), got {call.block_offset}; "
            "pass position % (chunk_size * period)"
        )
    given = [name for name in _CARRIED if getattr(call, name) is not None]
    missing = [name for name in _CARRIED if name not in given]
    if given and missing and (call.block_offset or set(given) & set(_OPEN)):
        raise ValueError(
            f"deep_core: {', '.join(given)} given without {', '.join(missing)}, with block_offset={call.block_offset}; an open block is carried by all four: "
            "pass final_state, final_error, final_mass and final_log_decay of the call before, or none of them; initial_state alone with block_offset=0"
        )


def normalizer(mass: Tensor, normalize: str, block: int) -> Tensor:
    """Z of a block with this mass, in its shape."""
    if normalize == "safe":
        return mass.clamp_min(1.0)
    return torch.full_like(mass, 1.0 if normalize == "sum" else float(block))


def close_block(carry: Carry, normalize: str, block: int) -> Carry:
    """The carry after a block's last token, from the one with all of the block's sums."""
    step = carry.error / normalizer(carry.mass, normalize, block)[..., None, None]
    empty = torch.zeros_like(carry.mass)
    return Carry(carry.log_decay.exp()[..., None, None] * carry.state + step, torch.zeros_like(carry.error), empty, empty)


def _starts(call: DeepCore, sequences: int, heads: int, dtype: torch.dtype) -> Carry:
    keys, values = call.k.shape[-1], call.v.shape[-1]
    zero = zeros_state(call.v, sequences, heads, keys, values)
    given = Carry(call.initial_state, call.initial_error, call.initial_mass, call.initial_log_decay)  # type: ignore[arg-type]
    none = zero.new_zeros(sequences, heads)
    return Carry(*(absent if x is None else x.to(dtype) for x, absent in zip(given, (zero, zero, none, none), strict=True)))


def reference(call: DeepCore) -> tuple[Tensor | None, ...]:
    """Block after block, sequence after sequence."""
    heads, dtype = call.v.shape[2], arithmetic_dtype(call.v.dtype)
    q, k = expand_heads(call.q, heads), expand_heads(call.k, heads)
    block, bounds = call.chunk_size * call.period, sequence_bounds(q.shape[1], call.cu_seqlens)
    start = _starts(call, q.shape[0] if call.cu_seqlens is None else len(bounds), heads, dtype)
    carries = [start] if call.cu_seqlens is None else [Carry(*(x[n : n + 1] for x in start)) for n in range(len(bounds))]
    outputs = []
    for span in chunk_spans(q.shape[1], block, call.cu_seqlens, call.block_offset):
        qc, kc, vc, eta = (heads_first(x, span.start, span.stop).to(dtype) for x in (q, k, call.v, call.eta))
        state, error, mass, log_decay = carries[span.sequence]
        outputs.append((call.scale * qc @ state).transpose(1, 2))
        error = error + (eta[..., None] * kc).transpose(-1, -2) @ (vc - kc @ state)
        mass = mass + (eta * (kc * kc).sum(-1)).sum(-1)
        if call.g is not None:
            log_decay = log_decay + heads_first(call.g, span.start, span.stop).to(dtype).sum(-1)
        carry = Carry(state, error, mass, log_decay)
        closes = (span.stop - bounds[span.sequence][0] + call.block_offset) % block == 0
        carries[span.sequence] = close_block(carry, call.normalize, block) if closes else carry
    o = torch.cat(outputs, 1) if outputs else torch.zeros_like(call.v, dtype=dtype)
    if call.gate is not None:
        o = call.gate.to(dtype)[..., None] * o
    final = [torch.cat(parts) for parts in zip(*carries, strict=True)] if carries else list(start)
    return (o.to(call.v.dtype), *(final if call.output_final_state else [None] * len(final)))


def work(dims: Mapping[str, int], call: DeepCore) -> tuple[float, float]:
    """FLOP: each token reads D twice, for its output and for its error, and writes once."""
    return 6.0 * dims["B"] * dims["T"] * dims["H"] * dims["K"] * dims["V"], 0.0


CONTRACT = Contract(
    name="deep_core",
    summary="a slower core: one update a block of chunks, by the block's summed error (experimental)",
    make_call=DeepCore,
    arguments=(
        a.Q, a.K, a.V, ETA, a.LOG_DECAY, a.GATE, a.INITIAL_STATE,
        Argument("initial_error", ("N H K V",), "state", "state", optional=True),
        Argument("initial_mass", ("N H",), "state", "beta", optional=True),
        Argument("initial_log_decay", ("N H",), "state", "log_decay", optional=True),
        a.CU_SEQLENS,
    ),
    options=(
        a.chunk_size(64), PERIOD, NORMALIZE, a.SCALE,
        Option("block_offset", "int", 0, minimum=0, in_key=False), a.OUTPUT_FINAL_STATE,
    ),
    outputs=(
        Output("o", "B T H V", like="v"),
        Output("final_state", "N H K V", when="output_final_state"),
        Output("final_error", "N H K V", when="output_final_state"),
        Output("final_mass", "N H", when="output_final_state"),
        Output("final_log_decay", "N H", when="output_final_state"),
    ),
    check=check,
    reference=reference,
    work=work,
    experimental=True,
    variants=(
        Variant("continued", {"chunk_size": 8, "period": 2, "block_offset": 11, "output_final_state": True}, given=("g", "gate", *_CARRIED)),
        Variant("plain", {"chunk_size": 16, "period": 1, "scale": 0.5}),
        Variant("mean of long blocks", {"chunk_size": 16, "normalize": "mean", "output_final_state": True}, given=("g", "initial_state")),
        Variant("sum of short blocks", {"chunk_size": 8, "period": 1, "normalize": "sum", "output_final_state": True}, given=("g", *_CARRIED)),
    ),
)  # fmt: skip
