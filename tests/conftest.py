"""Fixtures: a loopback backend in front of the others for one test, or eager the first; child processes that begin at once; Ctrl-C for the tests that send it."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

import titans_backends as tb
from tests.fresh import ForkedPopen, can_fork
from tests.loopback import by_length, install


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """A shell starts what it puts in the background with SIGINT ignored, and children inherit that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def forked_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuner's child processes are forked from one that has imported torch, which takes two seconds; how a user's begin is tested without this."""
    if can_fork():
        names = {name: getattr(subprocess, name) for name in ("DEVNULL", "STDOUT", "TimeoutExpired")}
        monkeypatch.setattr("titans_backends.tuning.child.subprocess", SimpleNamespace(Popen=ForkedPopen, **names))


@pytest.fixture
def eager_first(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Numba switched off, for tests of how a choice is made: its default on a CPU is then eager, whether Numba is installed or not."""
    monkeypatch.setenv("TITANS_BACKENDS_DISABLE", "numba_cpu")
    tb.reset()
    yield
    monkeypatch.undo()
    tb.reset()


@pytest.fixture
def plugin_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """`plugin_backend(name, **functions)` registers a loopback backend and returns what it ran; `by_length` chooses a variant per length."""

    def make(name: str, **changes: object) -> list[str]:
        if name == "by_length":
            changes = {"candidates": by_length(name), "run_backward": None, **changes}
        return install(monkeypatch, name, **changes)  # type: ignore[arg-type]

    yield make
    monkeypatch.undo()
    tb.reset()
