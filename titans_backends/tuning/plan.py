"""Which buckets to tune: the default grid per kind of machine, quick or full, and what the command line's options change in it.

Pure and cheap: no tensor is built. The buckets come in the order of their use, so that a budget that ends early has spent itself well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from titans_backends.buckets import Bucket, WhenValue, defaults_of
from titans_backends.cache.schema import canonical_when
from titans_backends.contracts import CONTRACTS, contract
from titans_backends.signature import Launch, Regime

__all__ = ["DEFAULT_GRIDS", "FLAT", "LAM", "PRESENT", "SMALL", "STREAMED", "Cells", "buckets_of", "grid", "plan"]

Heads = tuple[int, int]
HeadDim = tuple[int, int]

PRESENT: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "slow_core": ("g",),
        "uw_transform": ("g",),
        "gated_delta_rule": ("g",),
        "gated_delta_step": ("g",),
        "dual_core": ("g",),
        "dual_core_step": ("g",),
        "deep_core": ("g",),
        "deep_core_step": ("g",),
    }
)
"""The optional tensors in the key that the planned buckets have: decay where the op takes it, as the gated layers call it."""

_DTYPES = ("float32", "float64", "bfloat16", "float16")
STREAMED = ("gated_delta_rule", "slow_core", "dual_core", "uw_transform", "fast_core")
_AROUND = ("short_conv", "qkv_prepare", "gated_rms_norm", "token_flux", "chunk_flux")
"""What a layer has around its memory."""
_MEMORY = (*STREAMED, "gated_delta_step", "dual_core_step", "fused_uw")
_CHOSEN = (*STREAMED, "gated_delta_step", "fused_uw")
"""Of these a CPU has several candidates."""
SMALL: tuple[tuple[Heads, ...], tuple[HeadDim, ...]] = ((12, 12),), ((32, 32),)
"""The heads of the model that the flat and the loop memory come from."""
FLAT: tuple[tuple[str, WhenValue], ...] = (("g", False), ("memory", "flat"), ("transform", "lam"))
LAM: tuple[tuple[str, WhenValue], ...] = (("transform", "lam"),)


@dataclass(frozen=True, slots=True)
class Cells:
    """A block of the grid: every combination of what it lists. `heads` are (q and k heads, v heads), `head_dims` (K, V).

    `when`: more fields of the key, as a layer calls the ops.
    """

    ops: tuple[str, ...] = _CHOSEN
    seq_lens: tuple[int, ...] = (128, 512, 2048)
    heads: tuple[Heads, ...] = ((16, 16),)
    head_dims: tuple[HeadDim, ...] = ((128, 128),)
    dtypes: tuple[str, ...] = ("float32",)
    regimes: tuple[Regime, ...] = ("inference",)
    launches: tuple[Launch, ...] = ("eager",)
    batch: int = 1
    when: tuple[tuple[str, WhenValue], ...] = ()


DEFAULT_GRIDS: Mapping[tuple[str, bool], tuple[Cells, ...]] = MappingProxyType(
    {
        ("cpu", True): (
            Cells(heads=((12, 12),), head_dims=((32, 32),)),
            Cells(),
            Cells(ops=STREAMED, seq_lens=(512,), heads=((12, 12),), head_dims=((32, 32),), regimes=("training",)),
        ),
        ("cpu", False): (
            Cells(seq_lens=(64, 128, 256, 512, 1024, 2048, 4096), heads=((12, 12), (4, 4)), head_dims=((32, 32),)),
            Cells(seq_lens=(64, 128, 256, 512, 1024, 2048, 4096), heads=((16, 16), (16, 32)), head_dims=((128, 128), (64, 64))),
            Cells(ops=STREAMED, heads=((12, 12),), head_dims=((32, 32),), regimes=("training",)),
            Cells(ops=STREAMED, regimes=("training",)),
        ),
        ("cuda", True): (
            Cells(_MEMORY, (512, 2048, 8192), heads=((16, 32),), dtypes=("bfloat16",), launches=("eager", "graph")),
            Cells(ops=("gated_delta_rule",), seq_lens=(512, 2048, 8192, 32768), heads=((2, 8), (16, 64)), dtypes=("bfloat16",), launches=("graph",)),
            Cells(_MEMORY, (512, 2048, 8192), *SMALL, dtypes=("bfloat16",)),
            Cells(("dual_core",), (128, 1024, 8192, 65536), *SMALL),
            Cells(("dual_core",), (128, 1024, 8192, 65536), *SMALL, dtypes=("float32", "bfloat16"), launches=("graph",)),
            Cells(("dual_core",), (128, 512, 2048, 8192, 65536), *SMALL, launches=("eager", "graph"), when=FLAT),
            Cells(("dual_core",), (128, 2048, 65536), *SMALL, dtypes=("bfloat16",), launches=("eager", "graph"), when=FLAT),
            Cells(("coupled_core",), (512, 8192), *SMALL, launches=("graph",), when=LAM),
            Cells(_AROUND, (512, 8192), *SMALL, dtypes=("float32", "bfloat16"), launches=("graph",)),
            Cells(("qkv_prepare",), (512, 8192), *SMALL, dtypes=("float32", "bfloat16"), launches=("graph",), when=(("lookahead", 1),)),
            Cells(_AROUND, (8192,), ((16, 32),), dtypes=("bfloat16",)),
            Cells(ops=STREAMED, seq_lens=(2048, 8192), heads=((16, 32),), dtypes=("bfloat16",), regimes=("training",)),
            Cells(ops=STREAMED, seq_lens=(8192,), heads=((12, 12),), head_dims=((32, 32),), dtypes=("bfloat16",), regimes=("training",)),
            Cells(_AROUND, (8192,), *SMALL, regimes=("training",)),
        ),
        ("cuda", False): (
            Cells(
                (*_MEMORY, *_AROUND),
                (128, 512, 2048, 8192, 32768),
                heads=((16, 32), (2, 8), (16, 64)),
                dtypes=("bfloat16",),
                launches=("eager", "graph"),
            ),
            Cells(
                (*_MEMORY, *_AROUND), (128, 512, 2048, 8192, 32768), heads=((12, 12),), head_dims=((32, 32), (64, 64)), dtypes=("bfloat16", "float32")
            ),
            Cells(ops=STREAMED, seq_lens=(512, 2048, 8192), heads=((16, 32),), dtypes=("bfloat16",), regimes=("training",)),
            Cells(
                ops=STREAMED,
                seq_lens=(512, 2048, 8192),
                heads=((12, 12),),
                head_dims=((32, 32),),
                dtypes=("bfloat16", "float32"),
                regimes=("training",),
            ),
            Cells(("dual_core",), (128, 512, 2048, 8192, 32768), *SMALL, dtypes=("float32", "bfloat16"), launches=("eager", "graph"), when=FLAT),
            Cells(("coupled_core",), (128, 512, 2048, 8192, 32768), *SMALL, regimes=("inference", "training"), when=LAM),
        ),
    }
)
"""What `tune` measures by default, by (kind of device, quick). A kind without an entry of its own takes the CPU's."""


def grid(kind: str, *, quick: bool = True) -> tuple[Cells, ...]:
    """The default grid of a kind of device."""
    return DEFAULT_GRIDS.get((kind, quick), DEFAULT_GRIDS["cpu", quick])


def plan(
    kind: str,
    *,
    quick: bool = True,
    ops: Sequence[str] | None = None,
    seq_lens: Sequence[int] | None = None,
    heads: Sequence[Heads] | None = None,
    head_dims: Sequence[HeadDim] | None = None,
    dtypes: Sequence[str] | None = None,
    regimes: Sequence[Regime] | None = None,
    launches: Sequence[Launch] | None = None,
    batch: int | None = None,
) -> tuple[Bucket, ...]:
    """The buckets of a kind of device's default grid, each option replacing one axis of it.

    `seq_lens` that an op cannot have (more than 8 tokens of a decode op) fall away for it, unless nothing is left, when its own
    default stands. Raises ValueError for what no op accepts, UnknownNameError for an unknown op.
    """
    for name in ops or ():
        contract(name)
    _check(kind, seq_lens, heads, head_dims, dtypes, regimes, launches, batch)
    changes = {
        "seq_lens": seq_lens, "heads": heads, "head_dims": head_dims, "dtypes": dtypes, "regimes": regimes, "launches": launches, "batch": batch,
    }  # fmt: skip
    given = {name: tuple(value) if isinstance(value, Sequence) else value for name, value in changes.items() if value is not None}
    cells = [replace(block, **given) for block in grid(kind, quick=quick)]  # type: ignore[arg-type]  # names and values were checked
    if ops is not None:
        cells = _with_ops(cells, tuple(ops))
    return tuple(dict.fromkeys(bucket for block in cells for bucket, _ in buckets_of(block)))


def _check(
    kind: str,
    seq_lens: Sequence[int] | None,
    heads: Sequence[Heads] | None,
    head_dims: Sequence[HeadDim] | None,
    dtypes: Sequence[str] | None,
    regimes: Sequence[Regime] | None,
    launches: Sequence[Launch] | None,
    batch: int | None,
) -> None:
    for dtype in dtypes or ():
        if dtype not in _DTYPES:
            raise ValueError(f"tune: dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    for regime in regimes or ():
        if regime not in ("inference", "training"):
            raise ValueError(f"tune: regime must be inference or training, got {regime!r}")
    for launch in launches or ():
        if launch not in ("eager", "graph"):
            raise ValueError(f"tune: launch must be eager or graph, got {launch!r}")
        if launch == "graph" and kind != "cuda":
            raise ValueError(f"tune: launch=graph needs a CUDA device, this one is {kind}; use launch=eager")
    sizes = [*(seq_lens or ()), *(n for pair in (*(heads or ()), *(head_dims or ())) for n in pair), *(() if batch is None else (batch,))]
    if any(size < 1 for size in sizes):
        raise ValueError(f"tune: seq_lens, heads, head_dim and batch must be at least 1, got {min(sizes)}")
    for keys, values in heads or ():
        if values % keys:
            raise ValueError(f"tune: the heads of q and k must divide those of v, got {keys}/{values}")


def _with_ops(cells: list[Cells], ops: tuple[str, ...]) -> list[Cells]:
    """The blocks cut to some ops; an op that no block has takes the first block's sizes."""
    kept = [replace(block, ops=tuple(op for op in ops if op in block.ops)) for block in cells]
    found = {op for block in kept for op in block.ops}
    missing = tuple(op for op in ops if op not in found)
    return [*(block for block in kept if block.ops), *([replace(cells[0], ops=missing)] if missing else [])]


def buckets_of(cells: Cells) -> Iterator[tuple[Bucket, int]]:
    """The buckets of a block, in its order, each with the v heads of a sequence."""
    for regime in cells.regimes:
        for launch in cells.launches:
            for dtype in cells.dtypes:
                for head_dim in cells.head_dims:
                    for heads in cells.heads:
                        for op in cells.ops:
                            for seq_len in _seq_lens(op, cells.seq_lens):
                                yield _bucket(op, seq_len, heads, head_dim, dtype, regime, launch, cells), heads[1]


def _seq_lens(op: str, asked: tuple[int, ...]) -> tuple[int, ...]:
    most = CONTRACTS[op].max_tokens
    if most is None:
        return asked
    return tuple(length for length in asked if length <= most) or CONTRACTS[op].default_seq_lens


def _bucket(op: str, seq_len: int, heads: Heads, head_dim: HeadDim, dtype: str, regime: Regime, launch: Launch, cells: Cells) -> Bucket:
    (keys, values), batch = heads, cells.batch
    given: dict[str, WhenValue] = {"dtype": dtype, "head_dim": head_dim, "regime": regime, "launch": launch}
    if op == "fused_uw":  # one matrix per chunk and head: they all count as length
        chunk = defaults_of(op)["chunk_size"]
        assert isinstance(chunk, int)
        return _made(op, {**given, "streams": 1}, chunk * -(-seq_len // chunk) * values * batch)
    has_groups = "q" in CONTRACTS[op].argument_by_name or "k" in CONTRACTS[op].argument_by_name
    if not has_groups:
        given["head_dim"] = (head_dim[1], head_dim[1])
    group = values // keys if has_groups else 1
    presence = dict.fromkeys(PRESENT.get(op, ()), True)
    return _made(op, {**given, "streams": batch * values, "group": group, **presence, **dict(cells.when)}, seq_len)


def _made(op: str, given: Mapping[str, WhenValue], seq_len: int) -> Bucket:
    return Bucket(op, canonical_when(given, defaults_of(op)), seq_len)
