"""The hostile cases that a candidate must pass before it is timed, with their float64 results, made once per key and kept.

They have the bucket's own dtype, head sizes, head ratio, options and tensors, but few heads and tokens: the gate costs a fraction of a second.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from titans_backends.buckets import Bucket, field
from titans_backends.contracts import contract
from titans_backends.contracts.case import Case, build, cotangents
from titans_backends.contracts.chunks import chunk_spans
from titans_backends.contracts.contract import Call, Contract, state_dtype
from titans_backends.tuning.problem import case_of, ends_in_a_state, integer

__all__ = ["Exam", "Outputs", "chunk_starts", "exam_of", "hostile_cases", "suite", "suite_key", "wanted_gradients"]

Outputs = tuple[Tensor | None, ...]
_SHORT, _LONG, _FORGETTING = 65, 200, 80


@dataclass(frozen=True, slots=True)
class Exam:
    """One case with what has to come out: outputs, chunk-start states where the op has them, and gradients for each set of cotangents."""

    case: Case
    call: Call
    outputs: Outputs
    states: Tensor | None
    grads: tuple[tuple[Outputs, Outputs], ...]


def hostile_cases(bucket: Bucket) -> Iterator[Case]:
    """Strided and ragged; long memory; hard decay, in training fast too; where the bucket is packed or misaligned, the cases are."""
    timed = case_of(bucket)
    if bucket.op == "fused_uw":
        base = replace(timed, B=2, G=2, H=2, T=2 * integer(bucket, "chunk_size"))
        views: tuple[Case, ...] = (replace(base, name="strided", view="transposed"), replace(base, name="ordinary", seed=1))
        yield from views if timed.view == "contiguous" else (replace(case, name=f"{case.name}, misaligned", view="misaligned") for case in views)
        return
    heads = {"G": 2, "H": 2 * integer(bucket, "group")}
    made, options = contract(bucket.op), dict(timed.options)
    if ends_in_a_state(made, options):
        options["output_final_state"] = True
    if "block_offset" in made.option_by_name:  # so that the short cases close a block
        options["block_offset"] = max(0, integer(bucket, "chunk_size") * integer(bucket, "period") - _SHORT // 2)
        if "initial_state" in timed.given:  # an open block's sums come with it
            timed = replace(timed, given=tuple(dict.fromkeys((*timed.given, "initial_error", "initial_mass", "initial_log_decay"))))
    base = replace(timed, B=3 if made.max_tokens else 2, options=options, lengths=None, **heads)  # type: ignore[arg-type]
    gentle = options.get("transform", "exact") != "exact" or options.get("normalize_read") is True
    hard = {} if gentle else {"keys": "correlated", "beta": "extreme"}
    long = {} if gentle else {"keys": "correlated"}
    cases = [
        replace(base, name="strided", T=min(_SHORT, bucket.seq_len), view="transposed"),
        replace(base, name="correlated keys, beta 0 1 2", B=base.B if made.max_tokens else 1, T=min(_SHORT, bucket.seq_len), **hard),  # type: ignore[arg-type]
        replace(base, name="g 0 and -20", T=min(_SHORT, bucket.seq_len), decay="hard", seed=1),
        replace(base, name="long memory", B=base.B if made.max_tokens else 1, T=min(_LONG, bucket.seq_len), decay="zero", **long),  # type: ignore[arg-type]
    ]
    if field(bucket, "regime") == "training" and "g" in timed.given:
        cases.append(_forgetting(base, bucket.seq_len))
    for case in cases:
        if timed.view == "misaligned" and case.view == "contiguous":
            case = replace(case, name=f"{case.name}, misaligned", view="misaligned")
        yield _packed(case) if field(bucket, "packed") else case


def _forgetting(base: Case, seq_len: int) -> Case:
    """Gates that forget within a token, where the gradient of g is a small difference of large sums, over tokens that leave a state.

    What is left of a kernel that does not take apart what cancels is rounding: in 16 bits far above the limit at g of -7 to -3, in float32 surely from -6 on.
    """
    fast = base.dtype.itemsize == 2
    return replace(base, name="g -7 to -3" if fast else "g -7 to -6", B=1, T=min(_FORGETTING, seq_len), decay="fast" if fast else "fleeting")


def _packed(case: Case) -> Case:
    """The tokens of a case as one row of ragged sequences, two of them empty."""
    part = case.T // 2
    lengths = (part, 0, 1, case.T, 0)
    return replace(case, name=f"{case.name}, packed with empty sequences", B=1, T=sum(lengths), lengths=lengths)


@functools.lru_cache(maxsize=8)
def suite(key: Bucket, device: str) -> tuple[Exam, ...]:
    """The exams of a key; buckets that differ in streams, or in a length above the cases' own, share them: see `suite_key`."""
    return tuple(_exam(key, case, device) for case in hostile_cases(key))


def suite_key(bucket: Bucket) -> Bucket:
    """The bucket without what no hostile case depends on."""
    group = 1 if bucket.op == "fused_uw" else integer(bucket, "group")
    when = tuple((name, group if name == "streams" else value) for name, value in bucket.when if name not in ("launch", "saves"))
    return Bucket(bucket.op, when, integer(bucket, "chunk_size") if bucket.op == "fused_uw" else min(bucket.seq_len, _LONG))


def _exam(bucket: Bucket, case: Case, device: str) -> Exam:
    made = contract(bucket.op)
    return exam_of(made, case, build(made, case, device), training=field(bucket, "regime") == "training")


def exam_of(made: Contract, case: Case, call: Call, *, training: bool) -> Exam:
    """What has to come out of a case's call; in training with gradients, for all cotangents and for that of o alone."""
    wide = made.to(call, torch.float64)
    with torch.no_grad():
        outputs = made.reference(wide)
    if not training:
        return Exam(case, call, outputs, None, ())
    grads = cotangents(made, call, _in_dtypes(made, call, outputs), 0)
    partial = tuple(grad if index == 0 else None for index, grad in enumerate(grads))
    sets = (grads,) if partial == grads else (grads, partial)
    return Exam(case, call, outputs, chunk_starts(made, wide), tuple((given, wanted_gradients(made, wide, given)) for given in sets))


def _in_dtypes(made: Contract, call: Call, outputs: Outputs) -> Outputs:
    """The reference's outputs in the dtypes that a kernel returns them in."""
    dtype = made.tensors(call)[made.operands[0]].dtype
    return tuple(None if o is None else o.to(dtype if spec.like else state_dtype(dtype)) for o, spec in zip(outputs, made.outputs, strict=True))


def wanted_gradients(made: Contract, wide: Call, grads: Outputs) -> Outputs:
    """The float64 gradients of a float64 call, in the order of `contract.differentiable`; None for what was not given."""
    given = made.tensors(wide)
    leaves = {name: given[name].detach().clone().requires_grad_() for name in made.differentiable if name in given}
    outputs = made.reference(made.with_tensors(wide, leaves))
    reached = [(o, grad.to(o.dtype)) for o, grad in zip(outputs, grads, strict=True) if o is not None and grad is not None and o.requires_grad]
    found = torch.autograd.grad([o for o, _ in reached], list(leaves.values()), [grad for _, grad in reached], allow_unused=True)
    by_name = {name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in zip(leaves.items(), found, strict=True)}
    return tuple(by_name.get(name) for name in made.differentiable)


def chunk_starts(made: Contract, wide: Call) -> Tensor | None:
    """The float64 state at each chunk's start, before its decay factor, `[B, M, H, K, V]`; None where the op saves none.

    Chunk after chunk by the reference itself, each from the state that the one before it ended with.
    """
    tensors = made.tensors(wide)
    if made.grid is None or "output_final_state" not in made.option_by_name:
        return None
    packed, seq_len = tensors.get("cu_seqlens"), tensors[made.operands[0]].shape[1]
    by_token = {name for name in tensors if made.argument_by_name[name].dims[-1].startswith("B T")}
    plain = {"output_final_state": True, **({"normalize_final": False} if "normalize_final" in made.option_by_name else {})}
    starts: list[Tensor] = []
    state: Tensor | None = None
    for span in chunk_spans(seq_len, made.grid(wide), packed):
        if span.first:
            initial = tensors.get("initial_state")
            state = None if initial is None else initial if packed is None else initial[span.sequence : span.sequence + 1]
        changed: dict[str, object] = {name: tensors[name][:, span.start : span.stop] for name in by_token}
        if "chunk_decay" in tensors:
            changed["chunk_decay"] = tensors["chunk_decay"][:, span.index : span.index + 1]
        given = {name: getattr(wide, name) for name in made.parameters}
        with torch.no_grad():
            outputs = made.reference(made.make_call(**{**given, **changed, **plain, "initial_state": state, "cu_seqlens": None}))
        after = outputs[1]
        assert after is not None
        starts.append(torch.zeros_like(after) if state is None else state.to(after.dtype))
        state = after
    if starts:
        return torch.stack(starts, 1)
    sizes = {letter: size for name, t in tensors.items() for letter, size in zip(made.argument_by_name[name].dims[-1].split(), t.shape, strict=True)}
    return tensors[made.operands[0]].new_zeros([sizes["B"], 0, *(sizes[letter] for letter in "HKV")])
