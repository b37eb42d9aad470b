"""The call that `explain` and `bench` are asked about: from the words of the command line to a case, and to a signature without any memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from titans_backends.cli import words
from titans_backends.cli.failures import MisuseError, user_input
from titans_backends.contracts.case import Case, build
from titans_backends.contracts.contract import Contract, OptionValue, Work
from titans_backends.contracts.validate import validate
from titans_backends.contracts.work import work_of
from titans_backends.facts import signature_of
from titans_backends.signature import Signature
from titans_backends.tuning.plan import PRESENT
from titans_backends.tuning.problem import BESIDE

_MOST_PACKED = 2**20

__all__ = ["AskedCall", "optional_tensors", "sized"]


@dataclass(frozen=True, slots=True)
class AskedCall:
    """An op with the sizes, options and optional tensors of one call, on a device, in inference or training."""

    op: Contract
    case: Case
    device: str
    training: bool

    def signature(self) -> Signature:
        """Its signature, from sizes only. MisuseError for what the contract refuses."""
        with user_input():
            call = build(self.op, self.case, "meta")
            dims = validate(self.op, call)
        return replace(signature_of(self.op, call, dims, regime="training" if self.training else "inference"), device=self.device)

    def work(self) -> Work:
        """What it cannot avoid."""
        with user_input():
            call = build(self.op, self.case, "meta")
            return work_of(self.op, call, validate(self.op, call))

    @property
    def described(self) -> str:
        """Its sizes for people."""
        case = self.case
        parts = [f"{case.B} x {case.T}", f"heads {case.G}/{case.H}" if case.G != case.H else f"{case.H} heads"]
        parts += [f"head_dim {case.K}" if case.K == case.V else f"head_dim {case.K}x{case.V}", str(case.dtype).removeprefix("torch.")]
        parts += ["training" if self.training else "inference", *case.given]
        parts += [f"{name}={value}" for name, value in case.options.items() if not name.startswith("_")]
        return " · ".join(parts)


def optional_tensors(op: Contract, given: Sequence[str] | None) -> tuple[str, ...]:
    """The optional tensors of the call: those named, else those that the tuner's own grid gives the op; `none` for none."""
    found = words.names(given)
    if found is None:
        return (*PRESENT.get(op.name, ()), *BESIDE.get(op.name, ()))
    known = [a.name for a in op.arguments if a.optional and a.name != "cu_seqlens"]
    for name in found:
        if name not in known and found != ["none"]:
            raise MisuseError(f"--with must name optional tensors of {op.name}, or none, got {name!r}; it has: {', '.join(known) or 'none'}")
    return () if found == ["none"] else tuple(found)


def sized(
    op: Contract,
    *,
    seq_len: int | None,
    batch: int,
    heads: str,
    head_dim: str,
    dtype: str,
    regime: str,
    device: str,
    options: dict[str, OptionValue],
    given: tuple[str, ...],
    packed: bool = False,
) -> AskedCall:
    """The call of these words; `packed`: `batch` sequences of that length in one row. MisuseError says what would do."""
    keys, values = words.heads(heads)
    k_dim, v_dim = words.head_dim(head_dim)
    if regime not in ("inference", "training"):
        raise MisuseError(f"--regime must be inference or training, got {regime!r}")
    length = seq_len if seq_len is not None else 1 if op.max_tokens else 512
    if op.max_tokens and not 1 <= length <= op.max_tokens:
        raise MisuseError(f"{op.name} takes 1 to {op.max_tokens} tokens, got --seq-len {length}; more are {op.step_of}'s")
    if not (0 <= length <= words.MOST and 0 <= batch <= words.MOST):
        raise MisuseError(f"--seq-len and --batch must be from 0 to {words.MOST}, got {length} and {batch}")
    words.computable(length, batch, values, max(k_dim, v_dim))
    if packed and batch > _MOST_PACKED:
        raise MisuseError(f"--packed takes at most {_MOST_PACKED} sequences, got --batch {batch}")
    if packed and "cu_seqlens" not in op.argument_by_name:
        raise MisuseError(f"{op.name} takes no cu_seqlens; leave out --packed")
    case = Case(
        op.name, B=batch, T=length, G=keys, H=values, K=k_dim, V=v_dim, dtype=words.dtype_named(dtype), options=options, given=given,
        lengths=(length,) * batch if packed else None,
    )  # fmt: skip
    return AskedCall(op, case, str(torch.device(device)), regime == "training")
