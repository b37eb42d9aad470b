"""FLA's own dispatch, switched off for the length of a call, but for the one kernel that it hands to TileLang where its own is wrong.

What is called lies below the function that asks FLA's backends, FlashQLA and titans_backends itself among them, so that no call can come back here. The
functions below it ask TileLang and a context-parallel variant by switches in the environment, which FLA reads at every call.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

__all__ = ["fla_alone"]

_SWITCHES = ("FLA_FLASH_QLA", "FLA_INTRACARD_CP", "FLA_TILELANG")


@contextlib.contextmanager
def fla_alone(tilelang: bool = False) -> Iterator[None]:
    """Inside, FLA takes its own Triton kernels; `tilelang`: but TileLang's for the gradients of q, k and g. The switches are the process's, and put back."""
    wanted = {name: "1" if tilelang and name == "FLA_TILELANG" else "0" for name in _SWITCHES}
    before = {name: os.environ.get(name) for name in _SWITCHES}
    changed = {name: value for name, value in wanted.items() if before[name] != value}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name in changed:
            was = before[name]
            if was is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = was
