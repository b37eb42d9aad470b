"""Every backend on every case of every op, forward and backward, through `get_op` and candidate by candidate."""

from __future__ import annotations

import pytest
import torch

from titans_backends import registry
from titans_backends.conformance import Item, examine, items
from titans_backends.contracts import CONTRACTS
from titans_backends.machine import detect

EXACT = (torch.float64, torch.float32)
HALF = (torch.bfloat16, torch.float16)


def chosen(backend: str, op: str) -> list[Item]:
    """Everything in float64 and float32; in half precision all forwards, and the training of the first variant."""
    first = CONTRACTS[op].variants[0].name
    half = items(backend, ops=[op], dtypes=HALF)
    return items(backend, ops=[op], dtypes=EXACT) + [i for i in half if i.regime == "inference" or i.case.name == first]


@pytest.mark.parametrize("op", CONTRACTS)
def test_conformance(backend_name: str, op: str) -> None:
    backend = registry.get(backend_name)
    available = registry.availability(backend, detect("cpu"))
    if not available:
        pytest.skip(f"{backend_name} refuses this machine: {available}")
    if op not in backend.ops:
        pytest.skip(f"{backend_name} does not declare {op}")
    results = [examine(item) for item in chosen(backend_name, op)]
    failed = [result.detail for result in results if result.status == "failed"]
    assert not failed, "\n".join([f"{len(failed)} of {len(results)} cases fail", *failed[:20]])
    if not any(result.status == "passed" for result in results):
        pytest.skip(f"{backend_name} refuses every case: {results[0].detail}")
