"""Where a layer's ops come from: as every call is chosen, or from one backend, except for ops that this one does not have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from titans_backends import registry
from titans_backends.op import Op, get_op

__all__ = ["Forced"]


@dataclass(frozen=True, slots=True)
class Forced:
    """`backend`: None, or the backend that every op is forced to; `lacks`: the ops that it does not have, which are chosen as ever."""

    backend: str | None = None
    lacks: tuple[str, ...] = ()

    @staticmethod
    def to(backend: str | None, ops: Iterable[str]) -> Forced:
        """Of a layer that calls these ops; UnknownNameError for a backend that there is not."""
        if backend is None:
            return Forced()
        held = registry.get(backend).ops
        return Forced(backend, tuple(name for name in ops if name not in held))

    def op(self, name: str) -> Op:
        """The op of that name."""
        return get_op(name, backend=None if name in self.lacks else self.backend)
