"""The parent's side of the child: one request, one answer, a time-out on each; and what a death means for the candidate that was running.

Every request is about one candidate at most, so a child that dies or hangs has failed exactly that one. The next request starts a new child.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from types import TracebackType
from typing import IO

import torch

from titans_backends.tuning import wire

__all__ = ["ChildAnswerError", "ChildDied", "Host", "OpenFailed"]

_START_TIMEOUT_S = 120.0
_OPEN_TIMEOUT_S = 300.0
_TAIL = 300


class ChildDied(Exception):
    """The child is gone while it was at a request; the message says by what."""


class ChildAnswerError(Exception):
    """The child could not do what was asked; it lives on."""


class OpenFailed(Exception):
    """The inputs of a bucket could not be made; no candidate is to blame."""


class Host:
    """A child process that is started when it is needed and replaced when it dies; a context manager that kills it on the way out."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._child: _Child | None = None
        self._opening: wire.Message | None = None
        self._opened = False

    def __enter__(self) -> Host:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()

    def open(self, request: wire.Message | None) -> None:
        """Names the bucket that the next requests are about (None: none); a new child is told it again. OpenFailed where it cannot."""
        self._opening, self._opened = request, False
        if request is not None:
            self._ready()

    def ask(self, request: wire.Message, timeout_s: float) -> dict[str, object]:
        """An answer; ChildDied where the child died or did not answer in time, ChildAnswerError where it answers with an error."""
        return self._ready().ask(request, timeout_s)

    def kill(self) -> None:
        """Ends the child with everything that it has started."""
        child, self._child, self._opened = self._child, None, False
        if child is not None:
            child.kill()

    def _ready(self) -> _Child:
        try:
            if self._child is None or not self._child.alive:
                self.kill()
                self._child = _Child(self.device)
            if self._opening is not None and not self._opened:
                self._child.ask(self._opening, _OPEN_TIMEOUT_S)
                self._opened = True
        except (ChildDied, ChildAnswerError) as error:
            raise OpenFailed(str(error)) from error
        return self._child


class _Child:
    """One process with its two pipes and a file for what it prints."""

    def __init__(self, device: str) -> None:
        self.alive = True
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed by kill)
        requests_read, self._requests = os.pipe()
        self._answers, answers_write = os.pipe()
        given = (requests_read, answers_write, os.getpid(), device, torch.get_num_threads())
        command = [sys.executable, "-P", "-m", "titans_backends.tuning.worker", *map(str, given)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path)}
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(requests_read, answers_write),
                start_new_session=True,  # Ctrl-C is the parent's to handle, and its group can be killed whole
            )
        finally:
            os.close(requests_read)
            os.close(answers_write)
        os.set_blocking(self._answers, False)
        self._buffer = b""
        try:
            self._receive(_START_TIMEOUT_S)
        except BaseException:
            self.kill()
            raise

    def ask(self, request: wire.Message, timeout_s: float) -> dict[str, object]:
        try:
            os.write(self._requests, wire.dump(request))
        except BrokenPipeError:
            raise ChildDied(self._obituary()) from None
        answer = wire.load(self._receive(timeout_s))
        if "error" in answer:
            raise ChildAnswerError(str(answer["error"]))
        return answer

    def _receive(self, timeout_s: float) -> bytes:
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    self.kill()
                    raise ChildDied(f"no answer within {timeout_s:g} s: it was killed")
                part = os.read(self._answers, 1 << 16)
                if not part:
                    raise ChildDied(self._obituary())
                self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _obituary(self) -> str:
        """What ended the process: the signal by name, or its exit status with the last thing that it printed."""
        try:
            status = self._process.wait(10)
        except subprocess.TimeoutExpired:
            status = None
        said = self._last_words()
        self.kill()
        if status is None:
            return "its process closed its end and did not exit: it was killed"
        if status >= 0:
            return f"its process exited with status {status}{said}"
        try:
            name = f" ({signal.Signals(-status).name})"
        except ValueError:
            name = ""
        return f"killed by signal {-status}{name}{', perhaps for want of memory' if -status == signal.SIGKILL else said}"

    def _last_words(self) -> str:
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - 2000))
        lines = [line.strip() for line in self._log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        return f": {lines[-1][:_TAIL]}" if lines else ""

    def kill(self) -> None:
        if not self.alive:
            return
        self.alive = False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._requests)
        os.close(self._answers)
        self._log.close()
