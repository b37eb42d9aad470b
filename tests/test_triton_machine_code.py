"""What ptxas made of the Triton backend's kernels for Hopper, executed on the CPU: right values, and no operand of wgmma that lies elsewhere."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("the package triton is not installed: pip install -c constraints.txt -e '.[test]'", allow_module_level=True)

from tests.hopper_emulator import Fault, assembler
from tests.hopper_emulator.__main__ import error, exact, run, signature
from tests.triton_forms import module_of
from tests.triton_machines import H100
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case, build

MADE = CONTRACTS["gated_delta_rule"]
ODD = Case("odd heads, several blocks", B=1, T=138, G=1, H=1, K=60, V=60, dtype=torch.float16, given=("g",), options={"output_final_state": True})
TOLERANCE = 2e-3
"""float16's, of norms."""


def test_the_scan_on_odd_rows_is_right() -> None:
    call = build(MADE, ODD)
    first = next(one for one in module_of(MADE.name).candidates(signature(MADE, call, "inference"), H100) if one.variant == "scan")
    assert first.param("block") == 64
    found = run(MADE, call, first)
    assert error(found, exact(MADE, call, None)) < TOLERANCE


def test_what_ptxas_gets_wrong_is_seen() -> None:
    if assembler() != "12.8":
        pytest.skip(f"ptxas {assembler()} is another: 12.8 makes a wrong descriptor of this form")
    from titans_backends.backend import Candidate

    call = build(MADE, ODD)
    narrow = (("block", 64), ("prepare_warps", 4), ("value_tile", 32), ("warps", 4), ("stages", 3), ("dot", "tf32"))
    with pytest.raises(Fault, match=r"_scan\(60, .*descriptor"):
        run(MADE, call, Candidate("triton", "scan", narrow))
