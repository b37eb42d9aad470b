"""From a bucket back to inputs: the case that its timings are taken on, and the signature that its candidates are asked with.

The bucket of that signature is the bucket again. What a key leaves open is chosen as the layers use it: gates where the op has them (but
for `gated_delta_rule`, whose layers gate outside), and the final state in inference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Literal

import torch

from titans_backends.buckets import Bucket, WhenValue, defaults_of, field
from titans_backends.contracts import contract
from titans_backends.contracts.case import Case, build
from titans_backends.contracts.contract import Contract, OptionValue
from titans_backends.contracts.validate import check_option, validate
from titans_backends.facts import signature_of
from titans_backends.signature import Signature

__all__ = ["BESIDE", "case_of", "ends_in_a_state", "integer", "present", "set_torch", "signature_of_bucket", "signature_of_case"]

BESIDE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "fast_core": ("gate",),
        "slow_core": ("gate",),
        "dual_core": ("fast_gate", "slow_gate"),
        "dual_core_step": ("fast_gate", "slow_gate"),
        "short_conv": ("bias",),
        "qkv_prepare": ("q_bias", "k_bias", "v_bias"),
        "coupled_core": ("fast_decay", "slow_decay", "fast_gate", "slow_gate"),
        "deep_core": ("gate",),
        "deep_core_step": ("gate",),
    }
)
"""The optional tensors that timed inputs have although the key does not name them."""

_MOST_HEADS = 64
_MOST_NUMBERS, _MOST_PACKED = 2**56, 2**20


def integer(bucket: Bucket, name: str) -> int:
    """A field of the key that is a number."""
    value = field(bucket, name)
    if not isinstance(value, int):
        raise ValueError(f"{bucket.op}: the bucket's {name} must be a whole number, got {value!r}")
    return value


def set_torch(bucket: Bucket) -> None:
    """Torch's settings become the bucket's. The deterministic switch is set where that changes it: torch imports Inductor with it, for a second."""
    torch.set_float32_matmul_precision(str(field(bucket, "float32")))
    deterministic = bool(field(bucket, "deterministic"))
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)


def _key_options(bucket: Bucket) -> dict[str, OptionValue]:
    """The options that the key fixes."""
    found: dict[str, OptionValue] = {}
    for option in contract(bucket.op).options:
        value = field(bucket, option.name)
        if option.in_key and not isinstance(value, tuple):
            found[option.name] = value
    return found


def present(bucket: Bucket) -> tuple[str, ...]:
    """The optional tensors of the bucket's inputs: those that the key says are there, and those that come beside them."""
    of_key = [name for name in contract(bucket.op).argument_by_name if name in defaults_of(bucket.op) and field(bucket, name) is True]
    return (*of_key, *BESIDE.get(bucket.op, ()))


def _heads(streams: int, group: int, hint: int | None) -> int:
    """The number of v heads of one sequence: the hint where it divides, else as many as a layer has."""
    if streams < group or streams % group:
        raise ValueError(f"streams = {streams} is not a multiple of group = {group}")
    if hint is not None and group <= hint <= streams and hint % group == 0 and streams % hint == 0:
        return hint
    return max((count for count in range(group, min(streams, _MOST_HEADS) + 1, group) if streams % count == 0), default=group)


def _lengths(sequences: int, seq_len: int) -> tuple[int, ...]:
    """Ragged lengths with the given mean: half of it and one and a half of it in turn."""
    half = seq_len // 2
    lengths = [seq_len - half if i % 2 == 0 else seq_len + half for i in range(sequences)]
    if sequences % 2:
        lengths[-1] = seq_len
    return tuple(lengths)


def ends_in_a_state(made: Contract, options: Mapping[str, OptionValue]) -> bool:
    """Whether the op can be asked for a final state with these options."""
    return "output_final_state" in made.option_by_name and options.get("memory") != "flat" and not options.get("lookahead")


def _expect_possible(bucket: Bucket, made: Contract, head_dim: WhenValue) -> None:
    """ValueError where a file's key is one that no call has, or no machine has the memory for."""
    if not isinstance(head_dim, tuple) or len(head_dim) != 2:
        raise ValueError(f"{bucket.op}: the bucket's head_dim must be [K, V], got {head_dim!r}")
    dtype = getattr(torch, str(field(bucket, "dtype")), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{bucket.op}: the bucket's dtype must be one of torch's floating ones, got {field(bucket, 'dtype')!r}")
    for option in made.options:
        if option.in_key:
            try:
                check_option(made, option, field(bucket, option.name))
            except TypeError as error:
                raise ValueError(str(error)) from error
    streams = integer(bucket, "streams")
    for name in ("group", *(["chunk_size"] if bucket.op == "fused_uw" else [])):
        if integer(bucket, name) < 1:
            raise ValueError(f"{bucket.op}: the bucket's {name} must be at least 1, got {integer(bucket, name)}")
    wide = max(1, *(size for size in head_dim if isinstance(size, int)))
    if streams * wide * max(bucket.seq_len, wide) >= _MOST_NUMBERS or (field(bucket, "packed") and streams >= _MOST_PACKED):
        raise ValueError(f"{bucket.op}: no machine holds a call of {streams} streams of {bucket.seq_len} tokens with head_dim {list(head_dim)}")


def case_of(bucket: Bucket, heads: int | None = None) -> Case:
    """The timed case of a bucket; `heads` says how many v heads a sequence has, where that divides the streams. ValueError where no call is such a bucket's."""
    made = contract(bucket.op)
    head_dim = field(bucket, "head_dim")
    _expect_possible(bucket, made, head_dim)
    assert isinstance(head_dim, tuple)
    dtype = getattr(torch, str(field(bucket, "dtype")))
    view: Literal["contiguous", "misaligned"] = "contiguous" if field(bucket, "aligned") else "misaligned"
    base = Case(f"{bucket.op} at {bucket.seq_len}", K=head_dim[0], V=head_dim[1], dtype=dtype, view=view)
    if bucket.op == "fused_uw":
        return replace(base, B=1, G=1, H=1, T=bucket.seq_len, options={"_chunk": integer(bucket, "chunk_size")})
    streams, group = integer(bucket, "streams"), integer(bucket, "group")
    count = _heads(streams, group, heads)
    sequences = streams // count
    if field(bucket, "packed") and sequences == 1 and heads is None:  # packing one sequence is no packing: take fewer heads where that divides
        smaller = [c for c in range(group, count, group) if count % c == 0]
        count = max(smaller, default=count)
        sequences = streams // count
    options = _key_options(bucket)
    if ends_in_a_state(made, options) and field(bucket, "regime") == "inference":
        options["output_final_state"] = True
    sized = replace(base, H=count, G=count // group, options=options, given=present(bucket))
    if field(bucket, "packed"):
        return replace(sized, B=1, T=bucket.seq_len * sequences, lengths=_lengths(sequences, bucket.seq_len))
    return replace(sized, B=sequences, T=bucket.seq_len)


def signature_of_case(bucket: Bucket, case: Case, device: str) -> Signature:
    """The signature of a case in a bucket's regime and settings, from sizes only: no memory is taken."""
    made = contract(bucket.op)
    call = build(made, replace(case, view="contiguous") if case.view == "misaligned" else case, "meta")
    training = field(bucket, "regime") == "training"
    signature = signature_of(
        made,
        call,
        validate(made, call),
        regime="training" if training else "inference",
        launch="graph" if field(bucket, "launch") == "graph" else "eager",
        may_save=field(bucket, "saves") == "any",
    )
    tensors = tuple((name, replace(facts, aligned=_aligned(bucket.op, name, case))) for name, facts in signature.tensors)
    return replace(
        signature, device=device, tensors=tensors, float32=str(field(bucket, "float32")), deterministic=bool(field(bucket, "deterministic"))
    )


def _aligned(op: str, name: str, case: Case) -> bool:
    return case.view != "misaligned" or contract(op).argument_by_name[name].role in ("state", "index")


def signature_of_bucket(bucket: Bucket, device: str = "cpu", heads: int | None = None) -> Signature:
    """The signature of a bucket's timed case."""
    return signature_of_case(bucket, case_of(bucket, heads), device)
