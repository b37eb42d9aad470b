"""Where FLA is installed, its kernels in Triton's interpreter: our adapter runs what FLA's autograd runs (`fla_interpreted.py`, in a process of its own)."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from tests import fresh

ROOT = Path(__file__).resolve().parent.parent
FILE = "tests/fla_interpreted.py"


def test_flas_kernels_are_right_in_the_interpreter_through_the_adapter() -> None:
    pytest.importorskip("triton", reason="the package triton is not installed: pip install -c constraints.txt -e '.[test]'")
    try:
        importlib.metadata.version("fla-core")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("FLA is not installed: pip install 'fla-core>=0.6,<0.7'")
    done = fresh.run_pytest(FILE, cwd=ROOT, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    if done.returncode:
        pytest.fail(f"TRITON_INTERPRET=1 pytest {FILE}\n{done.stdout}\n{done.stderr}", pytrace=False)
    assert " passed" in done.stdout
