"""FLA's gates as its kernels compute them, in torch: the decay from A_log and dt_bias, beta from its logits. Gradients reach every argument.

Both of a call that wants no gradient are one launch on a GPU, by a function that torch compiles for us (`torch.cuda.jiterator`); else six.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from titans_backends.watching import watched

__all__ = ["decay_of", "gates_of", "rate_of", "wide"]

_CODE = """template <typename T> void delta_gates(T g, T beta, T a, {bias}T factor, T& decay, T& rate) {{
  T x = g{sum};
  decay = (x > T(20) ? x : ::log1p(::exp(x))) * -::exp(a);
  rate = factor / (T(1) + ::exp(-beta));
}}"""
"""One element; torch's softplus is the identity above 20."""
Together = Callable[..., tuple[Tensor, Tensor]]
_warm: set[object] = set()
"""Calls whose code is loaded: what is not cannot be loaded while a graph is captured."""
_MOST_WARM = 4096
"""So many are known at a time; then they are forgotten, and a graph that is captured next launches them one by one."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and computed gates: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def decay_of(function: str, g: Tensor, A_log: Tensor, dt_bias: Tensor | None) -> Tensor:
    """The log decay -exp(A_log) * softplus(g + dt_bias) `[B, T, H]` in float32, or float64 where g is; A_log and dt_bias hold H numbers each."""
    _expect_heads(function, g, A_log, dt_bias)
    dtype = wide(g.dtype)
    x = g.to(dtype) if dt_bias is None else g + dt_bias.to(dtype).reshape(-1)  # a sum of two dtypes is of the wider one, in one launch
    return torch.nn.functional.softplus(x) * -A_log.to(dtype).reshape(-1).exp()


def rate_of(beta: Tensor, sigmoid: bool, doubled: bool) -> Tensor:
    """beta as it is, or the sigmoid of its logits in float32, twice that for eigenvalues down to -1."""
    if not sigmoid:
        return beta
    rate = beta.to(wide(beta.dtype)).sigmoid()
    return 2 * rate if doubled else rate


def gates_of(function: str, g: Tensor, beta: Tensor, A_log: Tensor, dt_bias: Tensor | None, doubled: bool) -> tuple[Tensor, Tensor]:
    """`decay_of` and `rate_of` of logits, in one launch where that may be."""
    given = (g, beta, A_log) if dt_bias is None else (g, beta, A_log, dt_bias)
    if not _in_one(given):
        return decay_of(function, g, A_log, dt_bias), rate_of(beta, True, doubled)
    _expect_heads(function, g, A_log, dt_bias)
    return _together(dt_bias is not None)(g, beta, *(x.reshape(-1) for x in given[2:]), factor=2.0 if doubled else 1.0)


def _in_one(given: Sequence[Tensor]) -> bool:
    """Whether one launch may compute both: on one GPU, of one shape, in float32, for nobody that traces or differentiates, and loaded if one captures."""
    g, beta, *_ = given
    if torch.compiler.is_compiling() or not g.is_cuda or torch.version.hip is not None or g.shape != beta.shape or not g.numel() or watched(given):
        return False
    dtypes = {x.dtype for x in given}
    if torch.float32 not in dtypes or not dtypes <= {torch.float32, torch.bfloat16, torch.float16} or any(x.device != g.device for x in given):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return False
    key = (g.device, *((x.dtype, x.shape, x.stride(), x.data_ptr() & 15) for x in given))
    if key not in _warm:
        if torch.cuda.is_current_stream_capturing():
            return False
        if len(_warm) >= _MOST_WARM:  # every length of a prompt is one
            _warm.clear()
        _warm.add(key)
    return True


@functools.cache
def _together(biased: bool) -> Together:
    """The function of g, beta, A_log and, if `biased`, dt_bias."""
    from torch.cuda import jiterator

    code = _CODE.format(bias="T bias, " if biased else "", sum=" + bias" if biased else "")
    return cast(Together, jiterator._create_multi_output_jit_fn(code, 2, factor=1.0))


def _expect_heads(function: str, g: Tensor, A_log: Tensor, dt_bias: Tensor | None) -> None:
    """ValueError for other than a number a head."""
    heads = g.shape[-1]
    for name, value in (("A_log", A_log), ("dt_bias", dt_bias)):
        if value is not None and value.numel() != heads:
            raise ValueError(
                f"{function}: {name} has shape {tuple(value.shape)}, but g has {heads} heads in shape {tuple(g.shape)}; it must be [{heads}]"
            )
