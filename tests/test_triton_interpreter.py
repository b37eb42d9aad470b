"""Every Triton kernel is right in the interpreter: `triton_interpreted*.py`, in a process for each of the long ops and two for the others, at once on all cores."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import fresh
from tests.triton_forms import AROUND

pytestmark = [
    pytest.mark.slow(longest=True),
    pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed: pip install -c constraints.txt -e '.[test]'"),
]

ROOT = Path(__file__).resolve().parent.parent
LONG = ("dual_core", "gated_delta_rule", "slow_core", "fast_core", "deep_core")
"""The ops with a process each, the longest first, so that the processes end together; the others share one."""
_FILES = ("tests/triton_interpreted.py", "tests/triton_interpreted_gradients.py")


def _of(ops: tuple[str, ...]) -> str:
    return " or ".join(f"{op}-" for op in ops)


PARTS = {
    **{op: (*_FILES, "-k", _of((op,))) for op in LONG},
    "around": (*_FILES, "-k", _of(AROUND)),
    "others": (*_FILES, "tests/triton_interpreted_parts.py", "-k", f"not ({_of((*LONG, *AROUND))})"),
}
"""What pytest is to run: every test of the three files once."""


def _run(part: str) -> subprocess.CompletedProcess[str]:
    return fresh.run_pytest(*PARTS[part], cwd=ROOT, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """The selected parts' processes, all of them under way; a worker of pytest-xdist starts them one at a time, as it comes to them."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        selected = [item.callspec.params["part"] for item in request.session.items if item.path == request.path]  # type: ignore[attr-defined]
        started = {} if "PYTEST_XDIST_WORKER" in os.environ else {part: pool.submit(_run, part) for part in selected}
        yield started
        for future in started.values():
            future.cancel()


@pytest.mark.parametrize("part", PARTS)
def test_every_kernel_is_right_in_the_interpreter(part: str, runs: dict[str, Future[subprocess.CompletedProcess[str]]]) -> None:
    done = runs[part].result() if part in runs else _run(part)
    if done.returncode:
        pytest.fail(f"TRITON_INTERPRET=1 pytest {' '.join(PARTS[part])}\n{done.stdout}\n{done.stderr}", pytrace=False)
    assert " passed" in done.stdout
