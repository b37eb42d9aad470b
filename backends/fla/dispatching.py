"""FLA's own dispatch, switched off for the length of a call, but for the one kernel that it hands to TileLang where its own is wrong.

What is called lies below the function that asks FLA's backends, FlashQLA and titans_backends itself among them, so that no call can come back here. The
functions below it ask TileLang and a context-parallel variant by switches in the environment, which FLA reads at every call.
"""

from __future__ import annotations

import os
from types import TracebackType

__all__ = ["fla_alone"]

_OFF = (("FLA_FLASH_QLA", "0"), ("FLA_INTRACARD_CP", "0"), ("FLA_TILELANG", "0"))
_TILELANG = (*_OFF[:2], ("FLA_TILELANG", "1"))


class fla_alone:  # a context, as contextlib's functions are, for a fraction of their time
    """Inside, FLA takes its own Triton kernels; `tilelang`: but TileLang's for the gradients of q, k and g. The switches are the process's, and put back."""

    __slots__ = ("_before", "_wanted")

    def __init__(self, tilelang: bool = False) -> None:
        self._wanted = _TILELANG if tilelang else _OFF
        self._before: list[tuple[str, str | None]] = []

    def __enter__(self) -> None:
        for name, value in self._wanted:
            was = os.environ.get(name)
            if was != value:
                self._before.append((name, was))
                os.environ[name] = value

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for name, was in self._before:
            if was is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = was
