"""Arguments that several contracts share, said once: the tensors of the `[B, T, H, D]` layout and the usual options."""

from __future__ import annotations

from titans_backends.contracts.contract import Argument, Option

__all__ = [
    "BETA",
    "CHUNK_DECAY",
    "CHUNK_OFFSET",
    "CU_SEQLENS",
    "DELTA",
    "GATE",
    "INITIAL_STATE",
    "LOG_DECAY",
    "NORMALIZE_FINAL",
    "NORMALIZE_READ",
    "OUTPUT_FINAL_STATE",
    "QK_L2NORM",
    "SCALE",
    "SCALE_OR_ROOT",
    "TRANSFORM",
    "K",
    "Q",
    "V",
    "chunk_size",
]  # fmt: skip

Q = Argument("q", ("B T G K",), "operand", "query")
K = Argument("k", ("B T G K",), "operand", "key")
V = Argument("v", ("B T H V",), "operand", "value")
BETA = Argument("beta", ("B T H",), "gate", "beta")
LOG_DECAY = Argument("g", ("B T H",), "gate", "log_decay", optional=True)
GATE = Argument("gate", ("B T H",), "gate", "gate", optional=True)
CHUNK_DECAY = Argument("chunk_decay", ("B M H",), "gate", "decay_factor", optional=True)
INITIAL_STATE = Argument("initial_state", ("N H K V",), "state", "state", optional=True)
CU_SEQLENS = Argument("cu_seqlens", ("E",), "index", "cu_seqlens", optional=True)

SCALE = Option("scale", "float", 1.0, in_key=False)
SCALE_OR_ROOT = Option("scale", "float", None, nullable=True, in_key=False)
OUTPUT_FINAL_STATE = Option("output_final_state", "bool", False, in_key=False)
QK_L2NORM = Option("qk_l2norm", "bool", False)
DELTA = Option("delta", "bool", True)
NORMALIZE_READ = Option("normalize_read", "bool", False)
NORMALIZE_FINAL = Option("normalize_final", "bool", False)
CHUNK_OFFSET = Option("chunk_offset", "int", 0, minimum=0, in_key=False)
TRANSFORM = Option("transform", "str", "exact", choices=("exact", "lam", "none"))


def chunk_size(default: int | None) -> Option:
    """The chunk size: part of the key in every op; None, where it is the default, leaves it to the tuner."""
    return Option("chunk_size", "int", default, minimum=1, nullable=default is None)
