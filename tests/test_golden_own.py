"""The project's own golden files on every backend, and on the references that made them: every op, packed, grouped, with gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import titans_backends as tb
from tests.golden.make import FILES
from tests.golden.stored import Golden, compute, load
from tests.golden_table import Ledger
from titans_backends import registry
from titans_backends.contracts import CONTRACTS
from titans_backends.machine import detect

FOLDER = Path(__file__).parent / "golden"
PATHS = pytest.mark.parametrize("path", sorted(FOLDER.glob("*.safetensors")), ids=lambda path: path.stem)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def run(golden: Golden, dtype: torch.dtype, backend: str, *, training: bool) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    """The outputs by name and the leaves; a skip with the reason where the backend refuses the machine or the call."""
    available = registry.availability(registry.get(backend), detect("cpu"))
    if not available:
        pytest.skip(f"{backend} refuses this machine: {available}")
    made, call = golden.contract, golden.call(dtype)
    tensors = made.tensors(call)
    leaves = {name: tensors[name].requires_grad_(training) for name in made.differentiable if name in tensors}
    try:
        outputs = tb.get_op(golden.op, backend=backend)(**{name: getattr(call, name) for name in made.parameters})
    except tb.BackendRefusedError as refusal:
        pytest.skip(str(refusal))
    return {spec.name: o for spec, o in zip(made.outputs, outputs, strict=True)}, leaves


@PATHS
@DTYPES
def test_outputs_and_states(path: Path, dtype: torch.dtype, backend_name: str) -> None:
    golden, ledger = load(path), Ledger.of("float64 inside", dtype)
    outputs, _ = run(golden, dtype, backend_name, training=False)
    assert {name for name, o in outputs.items() if o is not None} == set(golden.outputs)
    for name, stored in golden.outputs.items():
        ledger.add(name, outputs[name], stored)
    ledger.settle()


@PATHS
@DTYPES
def test_gradients(path: Path, dtype: torch.dtype, backend_name: str) -> None:
    golden, ledger = load(path), Ledger.of("float64 inside", dtype)
    outputs, leaves = run(golden, dtype, backend_name, training=True)
    reached = {name: o for name, o in outputs.items() if o is not None}
    arriving = [golden.cotangents[name].to(dtype) for name in reached]
    found = torch.autograd.grad(list(reached.values()), list(leaves.values()), arriving, allow_unused=True)
    assert set(golden.gradients) == set(leaves)
    for (name, leaf), gradient in zip(leaves.items(), found, strict=True):
        ledger.add(name, torch.zeros_like(leaf) if gradient is None else gradient, golden.gradients[name], gradient=True)
    ledger.settle()


@PATHS
def test_the_references_still_give_these_numbers(path: Path) -> None:
    golden = load(path)
    outputs, gradients = compute(golden.contract, golden.call(torch.float64), golden.cotangents)
    for got, stored in ((outputs, golden.outputs), (gradients, golden.gradients)):
        assert set(got) == set(stored)
        for name in stored:
            torch.testing.assert_close(got[name], stored[name], rtol=1e-10, atol=1e-12)


def test_every_op_has_a_file_and_every_file_is_small_and_says_where_it_comes_from() -> None:
    paths = {path.stem: path for path in FOLDER.glob("*.safetensors")}
    assert set(paths) == set(FILES)
    assert {load(path).op for path in paths.values()} == set(CONTRACTS)
    for path in paths.values():
        assert path.stat().st_size < 100_000
        assert {"producer", "command", "seed"} <= set(load(path).metadata)
