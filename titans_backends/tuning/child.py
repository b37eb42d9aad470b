"""A process of the tuner's: one JSON line to it, one back, a time-out on each wait, and what its death was. Killed with all that it started.

It says one line when it is ready. What it is for is its module's business: `worker` runs candidates, `ahead_worker` compiles them.
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
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import IO

from titans_backends.tuning import wire

__all__ = ["START_TIMEOUT_S", "Child", "ChildDied"]

START_TIMEOUT_S = 120.0
_TAIL = 300
_NOTHING: Mapping[str, str] = MappingProxyType({})


class ChildDied(Exception):
    """The child is gone while it was at a request; the message says by what."""


class Child:
    """One process with its two pipes and a file for what it prints. `arguments` follow the pipes' descriptors and our process id."""

    def __init__(self, module: str, arguments: Sequence[str], environment: Mapping[str, str] = _NOTHING) -> None:
        self.alive = True
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed by kill)
        requests_read, self._requests = os.pipe()
        self._answers, answers_write = os.pipe()
        command = [sys.executable, "-P", "-m", module, *map(str, (requests_read, answers_write, os.getpid())), *arguments]
        inherited = {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path)}
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env={**inherited, **environment},
                pass_fds=(requests_read, answers_write),
                start_new_session=True,  # Ctrl-C is the parent's to handle, and its group can be killed whole
            )
        except BaseException:
            os.close(self._requests)
            os.close(self._answers)
            self._log.close()
            raise
        finally:
            os.close(requests_read)
            os.close(answers_write)
        os.set_blocking(self._answers, False)
        self._buffer = b""

    def fileno(self) -> int:
        """The descriptor that becomes readable when there is something to `take`."""
        return self._answers

    def send(self, message: wire.Message) -> None:
        """Says one line; ChildDied where nobody reads."""
        try:
            os.write(self._requests, wire.dump(message))
        except BrokenPipeError:
            raise ChildDied(self._obituary()) from None

    def receive(self, timeout_s: float) -> dict[str, object]:
        """The next line, waited for; ChildDied where it does not come."""
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self, selectors.EVENT_READ)
            while True:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    self.kill()
                    raise ChildDied(f"no answer within {timeout_s:g} s: it was killed")
                line = self.take()
                if line is not None:
                    return line

    def take(self) -> dict[str, object] | None:
        """The next line if it is there, without waiting; ChildDied at the end."""
        if b"\n" not in self._buffer:
            try:
                part = os.read(self._answers, 1 << 16)
            except BlockingIOError:
                return None
            if not part:
                raise ChildDied(self._obituary())
            self._buffer += part
        if b"\n" not in self._buffer:
            return None
        line, _, self._buffer = self._buffer.partition(b"\n")
        return wire.load(line)

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
        """Ends the process with everything that it has started."""
        if not self.alive:
            return
        self.alive = False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._requests)
        os.close(self._answers)
        self._log.close()
