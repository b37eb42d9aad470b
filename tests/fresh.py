"""Processes that have imported torch and nothing of ours, forked from one server, so that a test run imports torch for them once.

A Python process of its own costs two seconds, nearly all of them torch's import. What a fork sees is what a script that begins with `import torch` sees: the
test's modules, threads and patches are not there, its environment is the one given.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import reduction
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerProcess

__all__ = ["ForkedPopen", "can_fork", "run", "run_pytest"]

_NOT_THE_CHILDS = ("PYTEST_XDIST", "PYTEST_CURRENT_TEST", "PYTEST_ADDOPTS")
_PLAIN = ("-q", "--tb=short", "--no-header", "--color=no", "-p", "no:cacheprovider", "-p", "no:xdist")


def can_fork() -> bool:
    """Whether this platform has the server; without it `run` starts an interpreter."""
    return "forkserver" in multiprocessing.get_all_start_methods()


def run(code: str, *, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
    """What the code came to, as of `python -c`. `env`: its whole environment (default: this process's); PYTHONPATH comes first on its sys.path."""
    if not can_fork():
        return subprocess.run([sys.executable, "-c", code], env=env, cwd=cwd, capture_output=True, text=True, check=False, timeout=timeout)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        task = (code, dict(os.environ if env is None else env), str(cwd or Path.cwd()))
        process = _forked(_run_code, task, (out.fileno(), err.fileno()))
        try:
            process.join(timeout)
            if process.exitcode is None:
                raise subprocess.TimeoutExpired(code, timeout)
            return subprocess.CompletedProcess(code, process.exitcode, *map(_text, (out, err)))
        finally:
            process.kill()


def run_pytest(*words: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """`pytest` with these words and short reports, as if below no other pytest, in this environment with `more`."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_THE_CHILDS)}
    return run(f"import sys, pytest\nsys.exit(pytest.main({[*words, *_PLAIN]!r}))", env={**env, **more}, cwd=cwd, timeout=900.0)


class ForkedPopen:
    """As much of `subprocess.Popen` as `titans_backends.tuning.child` needs, for `python -P -m MODULE READS WRITES PARENT ...` in a session of its own."""

    def __init__(self, command: Sequence[str], *, stdout: IO[bytes], env: Mapping[str, str], pass_fds: tuple[int, int], **_: object) -> None:
        module, words = command[3], command[7:]
        assert [*command[1:3], *map(int, command[4:6])] == ["-P", "-m", *pass_fds], command
        self._process = _forked(_run_module, (module, tuple(words), dict(env)), (stdout.fileno(), stdout.fileno()), pass_fds, daemon=True)
        self.pid = self._process.pid

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, or less a signal's number; TimeoutExpired where it runs on."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked child", timeout or 0.0)
        return self._process.exitcode


def _forked(target: Any, task: tuple[object, ...], said: tuple[int, int], more: Sequence[int] = (), *, daemon: bool = False) -> ForkServerProcess:
    """A process that runs `target(*task, *more)`, leader of a group of its own, its two streams in those files; a daemon ends with this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    ready, begun = context.Pipe(duplex=False)
    process = context.Process(target=_begin, args=(begun, target, task, [_Descriptor(each) for each in (*said, *more)]), daemon=daemon)
    process.start()
    begun.close()
    ready.recv()
    return process


class _Descriptor:
    """A file descriptor that a child gets under a number of its own."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, tuple[Any]]:
        return _detached, (reduction.DupFd(self.number),)


def _detached(duplicate: Any) -> int:
    number: int = duplicate.detach()
    return number


def _begin(begun: Any, target: Any, task: tuple[object, ...], descriptors: list[int]) -> None:
    """Runs in the fork."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(descriptors[0], 1)
    os.dup2(descriptors[1], 2)
    begun.send(None)
    begun.close()
    target(*task, *descriptors[2:])


def _place(env: dict[str, str], cwd: str | None = None) -> None:
    os.environ.clear()
    os.environ.update(env)
    if cwd is not None:
        os.chdir(cwd)
    sys.path[:0] = [entry for entry in env.get("PYTHONPATH", "").split(os.pathsep) if entry]


def _run_code(code: str, env: dict[str, str], cwd: str) -> None:
    _place(env, cwd)
    sys.argv = ["-c"]
    exec(compile(code, "<fresh process>", "exec"), {"__name__": "__main__"})


def _run_module(module: str, words: tuple[str, ...], env: dict[str, str], *pipes: int) -> None:
    _place(env)
    sys.argv = [module, *map(str, pipes), str(os.getppid()), *words]  # its parent is the server, which it is to end with
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")
