"""The benchmark's plain layer computes what the original computed; the documents' steps give one output with and without the registry's ops."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from tests.golden_table import Ledger

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def plain() -> Iterator[ModuleType]:
    """benchmarks/plain_layer.py, imported as its neighbours import it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import plain_layer

        yield plain_layer
    for name in ("plain_layer", "ladder"):
        sys.modules.pop(name, None)


@pytest.mark.golden("lam_*_layer_*")
def test_it_is_the_originals_layer(golden_file: Path, plain: ModuleType) -> None:
    mode = "flat" if golden_file.stem.startswith("lam_after") else "loop"
    stored = load_file(golden_file)
    layer = plain.PlainLayer(64, 2, replace(plain.PLANS[mode], chunking="original"))
    layer.load_state_dict({name.removeprefix("sd."): t for name, t in stored.items() if name.startswith("sd.")}, strict=True)
    ledger = Ledger.of("layer", torch.float64)
    with torch.no_grad():
        ledger.add("y", layer.double()(stored["x"].double()), stored["y"])
    ledger.settle()


@pytest.mark.parametrize("step", range(8))
def test_a_step_of_the_documents_has_one_output_with_and_without_the_ops(step: int, plain: ModuleType) -> None:
    import ladder

    plan = plain.LADDER[step].plan
    torch.manual_seed(0)
    layer = plain.PlainLayer(32, 2, plan).double().requires_grad_(False)
    by_ops = plain.PlainLayer(32, 2, plan, core=ladder.op_core).double().requires_grad_(False)
    for parameter in layer.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    by_ops.load_state_dict(layer.state_dict())
    x = torch.randn(2, 150, 32, dtype=torch.float64)
    torch.testing.assert_close(by_ops(x), layer(x), rtol=1e-7, atol=1e-7)
