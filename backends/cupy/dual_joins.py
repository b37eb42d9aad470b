"""The launches around dual_core's parts: operands of unit norm, beta v and the cores' weights before them, their gradients' sums behind (cuda/dual_joins.cu)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from titans_backends.contracts.dual_core import DualCore

from .chunks import three_strides
from .dual_fast import alpha_strides
from .launch import DTYPES, Arg, Kernel
from .serving import padded
from .strides import aligned_rows

__all__ = ["SOURCE", "joined", "normalize_states", "prepared", "unit_operands"]

SOURCE = "dual_joins.cu"
_LAYOUT = "32P21q11i2If"
BEFORE, BEHIND = Kernel(SOURCE, "dual_before", _LAYOUT), Kernel(SOURCE, "dual_behind", _LAYOUT)
SUMS, NORMALIZE = Kernel(SOURCE, "dual_sums", "2P3i"), Kernel(SOURCE, "dual_normalize", "P")
_POINTERS = (
    "q", "k", "v", "beta", "alpha", "fast_gate", "slow_gate", "q_unit", "k_unit", "values", "fast_weight", "slow_weight", "fast_q", "slow_q", "fast_k",
    "slow_k", "below_k", "fast_v", "below_v", "below_beta", "slow_g", "below_g", "of_fast", "of_slow", "dq", "dk", "dv", "dbeta", "dg", "d_alpha",
    "d_fast_gate", "d_slow_gate",
)  # fmt: skip
_THREADS, _MANY, _EACH = 128, 1024, 4
_PARTS = 128
"""Bytes of a block's partial sums."""
Found = Mapping[str, Tensor]


def unit_operands(call: DualCore) -> tuple[Tensor, Tensor]:
    """q and k `[B, T, G, K]`, whose rows are contiguous, as they are, or under `qk_l2norm` with rows of unit norm, in their dtype."""
    if not call.qk_l2norm:
        return call.q, call.k
    q, k = (torch.empty(call.k.shape, dtype=call.k.dtype, device=call.k.device) for _ in range(2))
    _launch(BEFORE, call, {"q_unit": q, "k_unit": k}, queries=True, keys=True, values=False)
    return q, k


def prepared(call: DualCore, scaled: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q and k as `unit_operands` has them, beta v `[B, T, H, V]` if `scaled`, else v, and alpha f and (1 - alpha) s `[B, T, H]` in float32: one launch.

    Rows of q, k and v are contiguous.
    """
    v, k = call.v, call.k
    q_unit, k_unit = (torch.empty(k.shape, dtype=k.dtype, device=k.device) if call.qk_l2norm else None for _ in range(2))
    values = torch.empty(v.shape, dtype=v.dtype, device=v.device) if scaled else None
    fast, slow = (torch.empty(v.shape[:3], dtype=torch.float32, device=v.device) for _ in range(2))
    made = {"q_unit": q_unit, "k_unit": k_unit, "values": values, "fast_weight": fast, "slow_weight": slow}
    _launch(BEFORE, call, made, queries=call.qk_l2norm, keys=call.qk_l2norm, values=True)
    return call.q if q_unit is None else q_unit, k if k_unit is None else k_unit, v if values is None else values, fast, slow


def joined(call: DualCore, fast: Found, slow: Found, below: Found, needs: Iterable[str]) -> dict[str, Tensor]:
    """The gradients of q, k, v, beta, g, alpha and the gates that `needs` has, contiguous, from the parts' contiguous ones.

    `slow` has those of q, k, g and the weight of the slow core, `fast` those of q, k, beta v and the weight of the fast one, `below` those of k, v, beta
    and g behind the slow core's operands; what a part lacks is zero. Rows of q, k and v are contiguous.
    """
    alpha, v = call.alpha, call.v
    summed = isinstance(alpha, Tensor) and alpha.dim() < 3
    given = {name: getattr(call, name) for name in ("q", "k", "v", "beta", "g", "alpha", "fast_gate", "slow_gate")}
    into: dict[str, Tensor] = {}
    for name, x in given.items():
        if name in needs and isinstance(x, Tensor):
            per_token = name == "alpha" and summed
            into[name] = torch.empty(v.shape[:3] if per_token else x.shape, dtype=torch.float32 if per_token else x.dtype, device=x.device)
    if not into:
        return into
    made = {
        "fast_q": fast.get("q"), "slow_q": slow.get("q"), "fast_k": fast.get("k"), "slow_k": slow.get("k"), "below_k": below.get("k"),
        "fast_v": fast.get("v"), "below_v": below.get("v"), "below_beta": below.get("beta"), "slow_g": slow.get("g"), "below_g": below.get("g"),
        "of_fast": fast.get("gate"), "of_slow": slow.get("gate"), "dq": into.get("q"), "dk": into.get("k"), "dv": into.get("v"),
        "dbeta": into.get("beta"), "dg": into.get("g"), "d_alpha": into.get("alpha"), "d_fast_gate": into.get("fast_gate"),
        "d_slow_gate": into.get("slow_gate"),
    }  # fmt: skip
    _launch(BEHIND, call, made, queries="q" in into, keys="k" in into, values=bool(into.keys() - {"q", "k"}))
    if summed and "alpha" in into:
        assert isinstance(alpha, Tensor)
        into["alpha"] = _summed(call, into["alpha"], alpha)
    return into


def normalize_states(call: DualCore, states: Tensor) -> None:
    """Every matrix of `[N, H, K, V]`, float32 and contiguous, divided by its Frobenius norm + 1e-8, in place."""
    NORMALIZE((states.shape[0] * states.shape[1], 1, 1), _MANY, _macros(call, False), (states,), _PARTS)


def _summed(call: DualCore, each: Tensor, alpha: Tensor) -> Tensor:
    """The float32 `each` `[B, T, H]` summed to `[H]` or to one number, in alpha's dtype: over tokens, then over heads, in an order of their own."""
    batch, tokens, heads = each.shape
    total = torch.empty(alpha.shape, dtype=alpha.dtype, device=alpha.device)
    by_head = total if alpha.dim() else torch.empty((heads,), dtype=torch.float32, device=alpha.device)
    macros = _macros(call, False)
    SUMS((heads, 1, 1), _MANY, macros, (each, by_head, batch * tokens, heads, by_head.dtype == torch.float32), _PARTS)
    if not alpha.dim():
        SUMS((1, 1, 1), _MANY, macros, (by_head, total, heads, 1, total.dtype == torch.float32), _PARTS)
    return total


def _macros(call: DualCore, aligned: bool) -> tuple[tuple[str, int | str | bool], ...]:
    sizes = (("KEYS", call.k.shape[3]), ("VALUES", call.v.shape[3]))
    return (("DTYPE", DTYPES[call.v.dtype]), *sizes, ("ALIGNED", aligned), ("L2NORM", bool(call.qk_l2norm)))


def _launch(kernel: Kernel, call: DualCore, made: Mapping[str, Tensor | None], *, queries: bool, keys: bool, values: bool) -> None:
    """One of the two kernels that share their parameters, over the rows that are asked for."""
    q, k, v, alpha = call.q, call.k, call.v, call.alpha
    weight = alpha if isinstance(alpha, Tensor) else None
    pointers: dict[str, Arg] = {"q": q, "k": k, "v": v, "beta": call.beta, "alpha": weight, "fast_gate": call.fast_gate, "slow_gate": call.slow_gate}
    pointers |= made
    batch, tokens, groups, width = k.shape
    heads, size = v.shape[2], v.element_size()

    def blocks(rows: int, columns: int) -> int:
        return -(-rows // (_EACH * _THREADS * (16 // size) // padded(columns, 32)))

    key_rows, value_rows = batch * tokens * groups, batch * tokens * heads
    key_blocks, value_blocks = blocks(key_rows, width), blocks(value_rows, v.shape[3])
    of_q, of_k = key_blocks if queries else 0, key_blocks if keys else 0
    gates = (call.beta, weight, call.fast_gate, call.slow_gate, call.g)
    kernel(
        (of_q + of_k + (value_blocks if values else 0), 1, 1),
        _THREADS,
        _macros(call, all(aligned_rows(x, whole=True) for x in (q, k, v))),
        (
            *(pointers.get(name) for name in _POINTERS),
            *three_strides(q), *three_strides(k), *three_strides(v), *three_strides(call.beta), *alpha_strides(alpha), *three_strides(call.fast_gate),
            *three_strides(call.slow_gate), tokens, heads, groups, *(x is not None and x.dtype == torch.float32 for x in gates),
            weight is not None and (weight.dim() < 3 or weight.dtype == torch.float32), of_q, of_k, key_rows, value_rows,
            0.0 if weight is not None else float(alpha),
        ),
    )  # fmt: skip
