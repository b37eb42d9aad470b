"""The key of a measurement: what must match exactly, and what is bucketed: a tuned file's `when` and `seq_len`.

Pure functions of a signature. A field that equals its op's default is left out of the file; left out never means "any".
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType

from titans_backends.cache.schema import Bucket, When, WhenValue, canonical_when
from titans_backends.contracts import CONTRACTS
from titans_backends.signature import Signature

__all__ = ["Bucket", "When", "WhenValue", "bucket_of", "defaults_of", "field", "streams_of"]

_COMMON: Mapping[str, WhenValue] = {
    "dtype": None,  # None: never a real value, so the field is always written
    "head_dim": None,
    "streams": None,
    "group": 1,
    "packed": False,
    "regime": "inference",
    "launch": "eager",
    "float32": "highest",
    "deterministic": False,
    "aligned": True,
    "saves": "any",
}
_PRESENCE = ("g", "chunk_decay", "initial_state", "initial_fast_state", "q_state", "k_state", "v_state", "state_indices")


def field(bucket: Bucket, name: str) -> WhenValue:
    """One field of a bucket's key, its default where it was left out."""
    return dict(bucket.when).get(name, defaults_of(bucket.op).get(name))


@functools.lru_cache(maxsize=64)
def defaults_of(op: str) -> Mapping[str, WhenValue]:
    """Every field of an op's key with its default; a field whose default is None is always written."""
    contract = CONTRACTS[op]
    defaults = dict(_COMMON)
    defaults.update({o.name: o.default for o in contract.options if o.in_key})
    defaults.update({name: False for name in _PRESENCE if name in contract.argument_by_name})
    if op == "fused_uw":
        defaults["chunk_size"] = 64
    return MappingProxyType(defaults)


def streams_of(signature: Signature) -> int:
    """Sequences times v heads: how much independent work there is beside the length."""
    dims = dict(signature.dims)
    return 1 if signature.op == "fused_uw" else max(1, dims["N"] * dims["H"])


def _seq_len(signature: Signature, dims: Mapping[str, int]) -> int:
    if signature.op == "fused_uw":
        return max(1, dims["C"] * dims["*"])
    return max(1, round(dims["T"] / max(1, dims["N"])) if signature.packed else dims["T"])


def bucket_of(signature: Signature) -> Bucket:
    """The exact bucket of a call."""
    contract, dims = CONTRACTS[signature.op], dict(signature.dims)
    values: dict[str, WhenValue] = {
        "dtype": str(signature.dtype).removeprefix("torch."),
        "head_dim": (dims["K"], dims["V"]),
        "streams": streams_of(signature),
        "group": 1 if "G" not in dims else dims["H"] // max(1, dims["G"]),
        "packed": signature.packed,
        "regime": signature.regime,
        "launch": signature.launch,
        "float32": signature.float32,
        "deterministic": signature.deterministic,
        "aligned": signature.aligned,
        "saves": "any" if signature.may_save or signature.regime == "inference" else "inputs",
    }
    options = dict(signature.options)
    values.update({o.name: options[o.name] for o in contract.options if o.in_key})
    values.update({name: signature.has(name) for name in _PRESENCE if name in contract.argument_by_name})
    if signature.op == "fused_uw":
        values["chunk_size"] = dims["C"]
    return Bucket(signature.op, canonical_when(values, defaults_of(signature.op)), _seq_len(signature, dims))
