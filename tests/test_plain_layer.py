"""The benchmark's plain layer computes what the original computed; the documents' steps give one output with and without the registry's ops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.golden_table import Ledger
from tests.scripts import script

plain = script("benchmarks/plain_layer.py")
ladder = script("benchmarks/ladder.py")


@pytest.mark.golden("lam_*_layer_*")
def test_it_is_the_originals_layer(golden_file: Path) -> None:
    mode = "flat" if golden_file.stem.startswith("lam_after") else "loop"
    stored = load_file(golden_file)
    layer = plain.PlainLayer(64, 2, replace(plain.PLANS[mode], chunking="original"))
    layer.load_state_dict({name.removeprefix("sd."): t for name, t in stored.items() if name.startswith("sd.")}, strict=True)
    ledger = Ledger.of("layer", torch.float64)
    with torch.no_grad():
        ledger.add("y", layer.double()(stored["x"].double()), stored["y"])
    ledger.settle()


@pytest.mark.parametrize("step", plain.LADDER, ids=lambda step: step.name)
def test_a_step_of_the_documents_has_one_output_with_and_without_the_ops(step: object) -> None:
    torch.manual_seed(0)
    layer, by_ops = (plain.PlainLayer(32, 2, step.plan, core=core).double().requires_grad_(False) for core in (None, ladder.op_core))
    for parameter in layer.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    by_ops.load_state_dict(layer.state_dict())
    x = torch.randn(2, 150, 32, dtype=torch.float64)
    torch.testing.assert_close(by_ops(x), layer(x), rtol=1e-7, atol=1e-7)
