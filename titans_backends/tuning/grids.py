"""The problems that `bench --grid` times, by name: the shapes of known models and of the published comparisons. Pure: no tensor is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from titans_backends.buckets import Bucket
from titans_backends.errors import unknown
from titans_backends.signature import Launch
from titans_backends.tuning.plan import FLAT, LAM, SMALL, STREAMED, Cells, buckets_of

__all__ = ["BENCH_GRIDS", "Cell", "cells_of"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One problem: a bucket and the v heads of its sequences."""

    bucket: Bucket
    heads: int


_BF16, _FP32, _BOTH = ("bfloat16",), ("float32",), ("float32", "bfloat16")
_ANY: tuple[Launch, ...] = ("eager", "graph")
_LONG = (512, 2048, 8192, 32768)
_PARTS = ("fast_core", "fused_uw", "uw_transform", "slow_core")
_STEPS = ("gated_delta_step", "dual_core_step")

BENCH_GRIDS: Mapping[str, tuple[Cells, ...]] = MappingProxyType(
    {
        "seeds": (
            Cells(_PARTS, (8192,), ((16, 32),), dtypes=_BF16, launches=_ANY),
            Cells(_PARTS, (8192, 65536), *SMALL, dtypes=_FP32, launches=_ANY),
            Cells(("uw_transform",), (8192,), ((16, 32),), dtypes=_BF16, launches=_ANY, when=LAM),
            Cells(("dual_core",), (128, 2048, 8192, 65536), *SMALL, dtypes=_FP32, launches=_ANY),
        ),
        "qwen": (
            Cells(("gated_delta_rule",), _LONG, ((2, 8), (16, 32), (16, 64)), dtypes=_BF16, launches=_ANY),
            Cells(("gated_delta_rule",), (1024,), ((16, 32),), dtypes=_BF16, launches=_ANY, batch=8),
            Cells(("gated_delta_rule",), _LONG, ((12, 12),), ((32, 32), (64, 64)), dtypes=_BF16, launches=_ANY),
            Cells(("qkv_prepare", "gated_rms_norm"), (512, 8192), ((16, 32),), dtypes=_BF16, launches=_ANY),
        ),
        "lam": (
            Cells(("dual_core",), (128, 512, 2048, 8192, 65536), *SMALL, dtypes=_BOTH, launches=_ANY, when=FLAT),
            Cells(("coupled_core",), (128, 512, 8192), *SMALL, dtypes=_FP32, launches=_ANY, when=LAM),
            Cells(("token_flux", "chunk_flux"), (512, 8192), *SMALL, dtypes=_FP32, launches=_ANY),
        ),
        "decode": tuple(
            Cells(_STEPS, (1,), heads, head_dims, dtypes, launches=_ANY, batch=batch)
            for heads, head_dims, dtypes in ((((16, 32),), ((128, 128),), _BF16), (*SMALL, _FP32))
            for batch in (1, 8, 64)
        ),
        "train": (
            Cells(("gated_delta_rule",), (2048, 8192, 32768), ((2, 8), (16, 32), (16, 64)), dtypes=_BF16, regimes=("training",), launches=_ANY),
            Cells(("gated_delta_rule",), (1024,), ((16, 32),), dtypes=_BF16, regimes=("training",), launches=_ANY, batch=8),
            Cells(("gated_delta_rule",), (8192,), ((12, 12),), ((32, 32), (64, 64)), dtypes=_BF16, regimes=("training",), launches=_ANY),
            Cells(("dual_core",), (512, 8192), *SMALL, dtypes=_BOTH, regimes=("training",), launches=_ANY),
        ),
        "cpu": (
            Cells((*STREAMED, "fused_uw"), (128, 512, 2048), *SMALL),
            Cells(("gated_delta_rule", "dual_core"), (512,)),
            Cells(_STEPS, (1,), *SMALL),
            Cells(("gated_delta_rule", "dual_core"), (512,), *SMALL, regimes=("training",)),
        ),
    }
)
"""By name, in the order of their use. Inference in eager and graph launches; a device without graphs takes the eager ones."""


def cells_of(name: str, kind: str) -> tuple[Cell, ...]:
    """A grid's problems on a kind of device; UnknownNameError lists the grids."""
    if name not in BENCH_GRIDS:
        raise unknown("grid", name, BENCH_GRIDS)
    blocks = [block if kind == "cuda" else replace(block, launches=("eager",)) for block in BENCH_GRIDS[name]]
    return tuple(dict.fromkeys(Cell(bucket, heads) for block in blocks for bucket, heads in buckets_of(block)))
