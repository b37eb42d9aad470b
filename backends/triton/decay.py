"""The running log decay G of a block, kept so that differences of it are exact to float32's last digits.

After a few tokens of g = -20 the sum is in the hundreds, and float32 leaves its differences with errors of 1e-5. For float32 operands each g is
therefore split into a multiple of 2^-10, whose sums and differences are exact, and a small rest. A token's g counts as at least -128:
e^-128 is 0 in float32, and -inf becomes a clean reset.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["between", "running_log"]


@triton.jit
def running_log(step, SPLIT: tl.constexpr):
    """(coarse, fine) running sums of g `[BLOCK]` and their last values; fine is zero unless SPLIT."""
    step = tl.maximum(step, -128.0)
    if SPLIT:
        coarse = tl.floor(step * 1024.0 + 0.5) * (1.0 / 1024.0)
        fine = step - coarse
        return tl.cumsum(coarse, 0), tl.cumsum(fine, 0), tl.sum(coarse, 0), tl.sum(fine, 0)
    else:
        return tl.cumsum(step, 0), step * 0.0, tl.sum(step, 0), 0.0


@triton.jit
def between(coarse, fine, causal, SPLIT: tl.constexpr):
    """Gamma_ij = exp(G_i - G_j) where `causal [BLOCK, BLOCK]`, else 1: masked before exp."""
    log = coarse[:, None] - coarse[None, :]
    if SPLIT:
        log += fine[:, None] - fine[None, :]
    return tl.exp2(tl.where(causal, log * 1.4426950408889634, 0.0))
