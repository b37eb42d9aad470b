"""A process that compiles and runs nothing: one job a line, one answer a line, by the hook `compile_ahead`. Started by `ahead`, never by a person.

A candidate is compiled for all that it will meet where it is measured: the timed call, of which there are sizes only, and the gate's cases.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

from titans_backends.tuning.tether import tether

if TYPE_CHECKING:
    from titans_backends.backend import Candidate, OpModule
    from titans_backends.buckets import Bucket
    from titans_backends.contracts.case import Case
    from titans_backends.contracts.contract import Call
    from titans_backends.machine import Machine

__all__ = ["main", "prepare", "serve"]


def prepare(bucket: Bucket, candidate: Candidate, machine: Machine, device: str, heads: int | None) -> None:
    """Compiles a candidate for a bucket; raises what its hook raises."""
    import torch

    from titans_backends import registry
    from titans_backends.tuning.problem import set_torch

    module, reason = registry.module(registry.get(candidate.backend), bucket.op)
    hook = None if module is None else registry.compiling_ahead(module)
    if module is None or hook is None:
        raise RuntimeError(f"it has no compile_ahead: {reason}")
    set_torch(bucket)
    for call in _calls(bucket, candidate, module, machine, device, heads):
        with torch.no_grad():
            hook.compile_ahead(call, candidate, machine)


def _calls(bucket: Bucket, candidate: Candidate, module: OpModule, machine: Machine, device: str, heads: int | None) -> Iterator[Call]:
    from titans_backends.contracts import contract
    from titans_backends.contracts.case import build
    from titans_backends.tuning.gate import taken
    from titans_backends.tuning.problem import case_of
    from titans_backends.tuning.suite import suite_key

    yield build(contract(bucket.op), case_of(bucket, heads), "meta")
    known = _cases(suite_key(bucket))
    takes = taken(bucket, candidate, module, machine, device, [case for case, _ in known], heads)
    yield from (call for (_, call), taking in zip(known, takes, strict=True) if taking is not None)


@functools.lru_cache(maxsize=8)
def _cases(key: Bucket) -> Sequence[tuple[Case, Call]]:
    """The gate's cases on the CPU, where strides and addresses are what they are on the device."""
    from titans_backends.contracts import contract
    from titans_backends.contracts.case import build
    from titans_backends.tuning.suite import hostile_cases

    return tuple((case, build(contract(key.op), case, "cpu")) for case in hostile_cases(key))


def serve(read: Callable[[], bytes], write: Callable[[bytes], object]) -> None:
    """Answers jobs until there are no more: in how many of its buckets a candidate could not be compiled, and the first reason."""
    from titans_backends.tuning import wire

    write(wire.dump({"ready": os.getpid()}))
    while line := read():
        job = wire.load(line)
        candidate, machine = wire.candidate_from(job["candidate"]), wire.machine_from(job["machine"])
        failed, reason = 0, ""
        for data, heads in zip(cast("list[object]", job["buckets"]), cast("list[int | None]", job["heads"]), strict=True):
            bucket = wire.bucket_from(data)
            try:
                prepare(bucket, candidate, machine, str(job["device"]), heads)
            except Exception as error:  # whatever a compiler raises is said, and judged elsewhere
                failed += 1
                said = (str(error).strip() or "no message").split("\n", 1)[0][:300]
                reason = reason or f"{bucket.op} {bucket.seq_len}: {candidate.label}: {type(error).__name__}: {said}"
        write(wire.dump({"failed": failed, "reason": reason}))


def main() -> None:
    """`ahead_worker REQUESTS ANSWERS PARENT`: two inherited descriptors and the parent's id."""
    requests, answers, parent = sys.argv[1:]
    tether(int(parent))
    import torch

    torch.set_num_threads(1)
    with open(int(requests), "rb") as source, open(int(answers), "wb", buffering=0) as sink:
        serve(source.readline, sink.write)


if __name__ == "__main__":
    main()
