"""Launches on tape: what a call launches is noted while it runs, or collected instead of being launched.

Each backend has a `Taping` of its own, whose forms are what it compiles.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor

__all__ = ["Again", "AgainBackward", "Arg", "Outputs", "Tape", "Taped", "Taping", "Values"]

Arg = Tensor | int | float | None
Outputs = tuple[Tensor | None, ...]
Values = tuple[object, ...]
"""A call's values, in the order of its fields."""
Again = Callable[[Values], Outputs]
AgainBackward = Callable[[Values, Outputs, Tensor | tuple[Tensor, ...] | None], Outputs]
F = TypeVar("F")


@dataclass(frozen=True, slots=True)
class Taped:
    """One launch as it was made: what repeats it on a stream with other arguments, addresses in place of tensors, and the arguments it had."""

    launch: Callable[[int, tuple[object, ...]], None]
    args: tuple[Arg, ...]


@dataclass(slots=True)
class Tape(Generic[F]):
    """The launches of a recorded call; with `forms` nothing is launched, and what would have been is noted there, each once."""

    launches: list[Taped] = field(default_factory=list)
    forms: dict[F, None] | None = None


class Taping(Generic[F]):
    """One backend's tapes, each of its own thread. `streams()` is what gives, for a device's index, its current stream as the driver's handle."""

    def __init__(self, streams: Callable[[], Callable[[int], int]]) -> None:
        self.streams = streams
        self._local = threading.local()

    @property
    def current(self) -> Tape[F] | None:
        """The tape that this thread's launches go on, if one runs."""
        return getattr(self._local, "tape", None)

    @property
    def is_collecting(self) -> bool:
        """Whether this thread's launches are collected and not made."""
        tape = self.current
        return tape is not None and tape.forms is not None

    @contextmanager
    def taping(self) -> Iterator[Tape[F]]:
        """Notes the launches that this thread makes inside."""
        tape: Tape[F] = Tape()
        with self._noting(tape):
            yield tape

    @contextmanager
    def collecting(self) -> Iterator[dict[F, None]]:
        """Notes in order what this thread would launch inside, and launches nothing; tensors may lie anywhere, or on "meta"."""
        forms: dict[F, None] = {}
        with self._noting(Tape(forms=forms)):
            yield forms

    @contextmanager
    def _noting(self, tape: Tape[F]) -> Iterator[None]:
        before = self.current
        self._local.tape = tape
        try:
            yield
        finally:
            self._local.tape = before
