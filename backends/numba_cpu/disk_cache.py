"""Where compiled kernels are kept: Numba's own cache on disk, stamped with this backend's whole source, and never a reason for a call to fail.

The folder is NUMBA_CACHE_DIR, else `__pycache__` beside the source, else (an installation that cannot be written) Numba's folder in the user's
cache. Numba looks at one file's age only; a kernel here is made of several files, so the stamp is a digest of all of them. What the disk
refuses is said once, as a warning, and the kernel is compiled in memory.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba.core.caching import CompileResultCacheImpl, FunctionCache

__all__ = ["KernelCache", "kernel_cache"]


@functools.lru_cache(maxsize=1)
def _digest() -> str:
    """Of every file of this folder: which of them a kernel is made of is not worth finding out."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


class _Stamped:
    """A locator of Numba's with our stamp."""

    def __init__(self, locator: Any) -> None:
        self._locator = locator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._locator, name)

    def get_source_stamp(self) -> str:
        return _digest()


class _StampedImpl(CompileResultCacheImpl):
    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__(function)
        self._locator = _Stamped(self._locator)


@functools.lru_cache(maxsize=16)
def _warn(what: str) -> None:
    warnings.warn(
        f"numba_cpu: {what}; its kernels are compiled anew in every process, some seconds each. "
        "Set NUMBA_CACHE_DIR to a folder that can be written, or delete what is damaged there",
        RuntimeWarning,
        stacklevel=3,
    )


class KernelCache(FunctionCache):
    """Numba's cache of one function, which warns where it cannot read or write."""

    _impl_class = _StampedImpl

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled function, or None."""
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # a damaged file raises whatever unpickling raises
            _warn(f"the kernels kept in {self.cache_path} cannot be read ({type(error).__name__}: {error})")
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keeps a compiled function."""
        try:
            super().save_overload(sig, data)
        except Exception as error:  # a full disk, a folder that went away, an index that cannot be unpickled
            _warn(f"kernels cannot be kept in {self.cache_path} ({type(error).__name__}: {error})")


def kernel_cache(function: Callable[..., object]) -> KernelCache | None:
    """The cache of a function, or None with a warning where no folder can be written."""
    try:
        return KernelCache(function)
    except (RuntimeError, OSError) as error:
        _warn(f"no folder for compiled kernels can be written ({error})")
        return None
