"""The parent's side of the child: one request, one answer, a time-out on each; and what a death means for the candidate that was running.

Every request is about one candidate at most, so a child that dies or hangs has failed exactly that one. The next request starts a new child.
"""

from __future__ import annotations

from types import TracebackType

import torch

from titans_backends.tuning import wire
from titans_backends.tuning.child import START_TIMEOUT_S, Child, ChildDied

__all__ = ["ChildAnswerError", "ChildDied", "Host", "OpenFailed"]

_WORKER = "titans_backends.tuning.worker"
_OPEN_TIMEOUT_S = 300.0


class ChildAnswerError(Exception):
    """The child could not do what was asked; it lives on."""


class OpenFailed(Exception):
    """The inputs of a bucket could not be made; no candidate is to blame."""


class Host:
    """A child process that is started when it is needed and replaced when it dies; a context manager that kills it on the way out."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._child: Child | None = None
        self._starting = False
        self._opening: wire.Message | None = None
        self._opened = False

    def __enter__(self) -> Host:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()

    def begin(self) -> None:
        """Starts the child without waiting for it, so that it imports while something else is done."""
        if self._child is None:
            self._start()

    def ready(self) -> None:
        """Waits for a child that has begun; OpenFailed where it cannot be had."""
        self._ready()

    def open(self, request: wire.Message | None) -> None:
        """Names the bucket that the next requests are about (None: none); a new child is told it again. OpenFailed where it cannot."""
        self._opening, self._opened = request, False
        if request is not None:
            self._ready()

    def ask(self, request: wire.Message, timeout_s: float) -> dict[str, object]:
        """An answer; ChildDied where the child died or did not answer in time, ChildAnswerError where it answers with an error."""
        return _answer(self._ready(), request, timeout_s)

    def kill(self) -> None:
        """Ends the child with everything that it has started."""
        child, self._child, self._opened, self._starting = self._child, None, False, False
        if child is not None:
            child.kill()

    def _ready(self) -> Child:
        try:
            if self._child is None or not self._child.alive:
                self.kill()
                self._start()
            child = self._greeted()
            if self._opening is not None and not self._opened:
                _answer(child, self._opening, _OPEN_TIMEOUT_S)
                self._opened = True
        except (ChildDied, ChildAnswerError) as error:
            raise OpenFailed(str(error)) from error
        return child

    def _start(self) -> None:
        self._child, self._starting = Child(_WORKER, (self.device, str(torch.get_num_threads()))), True

    def _greeted(self) -> Child:
        """The child, once it has said that it is ready."""
        child = self._child
        assert child is not None
        if self._starting:
            try:
                child.receive(START_TIMEOUT_S)
            except BaseException:
                self.kill()
                raise
            self._starting = False
        return child


def _answer(child: Child, request: wire.Message, timeout_s: float) -> dict[str, object]:
    child.send(request)
    answer = child.receive(timeout_s)
    if "error" in answer:
        raise ChildAnswerError(str(answer["error"]))
    return answer
