"""The work of a bucket's timed call: what its contract says that it cannot avoid. Sizes only; no memory is taken."""

from __future__ import annotations

from titans_backends.buckets import Bucket, field
from titans_backends.contracts import contract
from titans_backends.contracts.case import build
from titans_backends.contracts.contract import Work
from titans_backends.contracts.validate import validate
from titans_backends.contracts.work import work_of
from titans_backends.tuning.problem import case_of

__all__ = ["work_of_bucket"]


def work_of_bucket(bucket: Bucket) -> Work:
    """FLOP and bytes of the call that the tuner times in a bucket; raises ValueError or KeyError for a bucket of another version.

    Training: three times the forward's products; inputs, outputs, the gradients that arrive and those that leave, each once.
    """
    made, case = contract(bucket.op), case_of(bucket)
    call = build(made, case, "meta")
    forward = work_of(made, call, validate(made, call))
    if field(bucket, "regime") != "training":
        return forward
    tensors = made.tensors(call)
    given = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    leaving = sum(given[name] for name in made.differentiable if name in given)
    arriving = forward.bytes - sum(given.values())  # what is not an input is an output, and a gradient of its size comes back to it
    return Work(3 * forward.flop, forward.bytes + leaving + max(0.0, arriving))
