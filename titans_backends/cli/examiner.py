"""Examines conformance items in a child process, so that a kernel that dies or hangs is one failed item and not the end of `verify`."""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType

from titans_backends.conformance import Item, Result

__all__ = ["Examiner"]


class Examiner:
    """A child that is started when it is needed and replaced when it is gone; a context manager that ends it."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._child: tuple[BaseProcess, Connection] | None = None

    def __enter__(self) -> Examiner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def examine(self, item: Item) -> Result:
        """The item's result; failed, with what happened, where the child did not live to tell."""
        process, connection = self._child or self._start()
        try:
            connection.send(item)
            if connection.poll(self._timeout_s):
                found = connection.recv()
                assert isinstance(found, Result)
                return found
            reason = f"no answer within {self._timeout_s:g} s: it was killed"
        except (EOFError, OSError):
            process.join(10)
            reason = f"its process died with {_exit(process.exitcode)}"
        self._end()
        return Result(item, "failed", f"{item}: {reason}")

    def _start(self) -> tuple[BaseProcess, Connection]:
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads, and a CUDA context that cannot be used
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        self._child = process, ours
        return self._child

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child[0].kill()
            child[0].join()
            child[1].close()


def _exit(code: int | None) -> str:
    if code is None:
        return "no exit status"
    return f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit status {code}"


def _serve(connection: Connection) -> None:
    """The child: an item in, a result out. Ctrl-C is the parent's to handle."""
    from titans_backends.conformance import examine

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        try:
            result = examine(item)
        except Exception as error:  # a fault of the examination itself is told, too
            result = Result(item, "failed", f"{item}: examining it raised {type(error).__name__}: {error}")
        connection.send(result)
