"""Options of `pytest benchmarks/`: the sizes, and how many threads torch takes. Here the user's own cache and switches are in force.

The test-suite's isolation is undone on purpose: a benchmark shows what a call of this user on this machine costs.
"""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("titans_backends benchmarks")
    group.addoption("--seq-lens", default="512", metavar="N,N", help="tokens of each sequence (default 512); decode always takes one")
    group.addoption("--batch", type=int, default=1, metavar="N", help="sequences (default 1)")
    group.addoption("--heads", default="4", metavar="QK/V", help="heads of q and k / of v: 16/32, or 16 (default 4)")
    group.addoption("--head-dim", default="64", metavar="K[xV]", help="128, or 128x64 for K = 128 and V = 64 (default 64)")
    group.addoption("--dtype", default="float32", choices=("float32", "float64", "bfloat16", "float16"))
    group.addoption("--threads", type=int, default=None, metavar="N", help="torch's threads (default: torch's own)")


@pytest.fixture(scope="session", autouse=True)
def isolated_user() -> None:
    """In place of the suite's fixture of this name: nothing is hidden."""


@pytest.fixture(scope="session", autouse=True)
def one_thread(request: pytest.FixtureRequest) -> None:
    """In place of the suite's fixture of this name: as many threads as asked for."""
    threads: int | None = request.config.getoption("--threads")
    if threads is not None:
        torch.set_num_threads(threads)
