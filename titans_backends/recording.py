"""Which problems a model meets, counted while somebody records: `with titans_backends.record("shapes.yaml"): model(batch)`.

Every call of an op in this process counts, whichever way it came to its kernel and in whichever thread; nested recordings each count it. While nobody
records, a call looks at one empty list and nothing else. Nothing is timed here, and no choice changes.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, TracebackType
from typing import TYPE_CHECKING, Self

from titans_backends.buckets import bucket_of, defaults_of
from titans_backends.cache.schema import canonical_when
from titans_backends.signature import Signature

if TYPE_CHECKING:
    from titans_backends.cache.problems import Count, Met, Problem

__all__ = ["Recording", "count", "listening", "problem_of", "read", "record"]

_LOCK_TIMEOUT_S = 60.0
_MOST_SIGNATURES = 4096
_SIZES = ("B", "T", "N", "G", "H")

listening: list[Recording] = []
"""The recordings that are open, in this process: one list for good, so that a call looks whether it is empty and at nothing else."""
_opening = threading.Lock()


@dataclass(slots=True, eq=False, repr=False)
class Recording:
    """What one `record` has met so far. `path`: the file that it is added to when the context ends."""

    path: Path
    _folded: dict[Problem, Count] = field(default_factory=dict)
    _counts: dict[int, tuple[Signature, list[int]]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, signature: Signature, backward: bool) -> None:
        """One run of a signature. A plan holds one signature object, so that its identity finds it."""
        with self._lock:
            known = self._counts.get(id(signature))
            if known is None:
                if len(self._counts) >= _MOST_SIGNATURES:
                    self._fold()
                known = self._counts[id(signature)] = (signature, [0, 0])
            known[1][backward] += 1

    def __repr__(self) -> str:
        found = self.problems
        runs = sum(one.forward + one.backward for one in found.values())
        return f"<recording into {self.path}: {len(found)} problem{'s' * (len(found) != 1)}, {runs} run{'s' * (runs != 1)}>"

    @property
    def problems(self) -> dict[Problem, Count]:
        """The distinct problems with their counts."""
        with self._lock:
            self._fold()
            return dict(self._folded)

    def _fold(self) -> None:
        from titans_backends.cache.problems import Count, merge_problems

        for signature, (forward, backward) in self._counts.values():
            problem = problem_of(signature)
            if problem is not None:
                self._folded = merge_problems(self._folded, {problem: Count(forward, backward)})
        self._counts.clear()


def count(signature: Signature, *, backward: bool = False) -> None:
    """Tells every open recording of a run that has just succeeded."""
    for recording in tuple(listening):
        recording.count(signature, backward)


def problem_of(signature: Signature) -> Problem | None:
    """The problem that a signature is one of; None where it holds no token, so that there is nothing to measure."""
    from titans_backends.cache.problems import Problem

    dims = dict(signature.dims)
    bucket = bucket_of(signature)
    when = {name: value for name, value in bucket.when if name != "saves"}
    bucket = bucket._replace(when=canonical_when(when, defaults_of(bucket.op)))
    sizes = (("C", dims["C"]), ("matrices", dims["*"])) if signature.op == "fused_uw" else tuple((name, dims[name]) for name in _SIZES)
    if any(size < 1 for _, size in sizes):
        return None
    return Problem(bucket, sizes, signature.device.partition(":")[0], signature.batch_invariant)


class _Context(contextlib.AbstractContextManager[Recording], contextlib.ContextDecorator):
    """What `record` gives: nothing is recorded until it is entered, each time anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entered: list[contextlib.AbstractContextManager[Recording]] = []

    def __repr__(self) -> str:
        word = f"titans_backends.record({str(self._path)!r})"
        return f"<{word}: a context, {'entered' if self._entered else f'not entered; type: with {word}: model(batch)'}>"

    def _recreate_cm(self) -> Self:
        """Of a decorated function each call records for itself, whatever thread it is in."""
        return type(self)(self._path)

    def __enter__(self) -> Recording:
        context = _recorded(self._path)
        recording = context.__enter__()
        self._entered.append(context)
        return recording

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._entered.pop().__exit__(kind, error, trace)


def record(path: str | os.PathLike[str]) -> contextlib.AbstractContextManager[Recording]:
    """A context that writes the distinct problems that calls in it meet, with counts, to a file, also where it ends by an exception.

    A file that is there is added to, under a lock: processes may record to one file. CacheError where it cannot be written, SchemaError with file and line
    where it is no such file: both before anything is recorded. A replayed CUDA graph runs no Python: its calls count once, at the capture.
    TypeError and ValueError for what names no file.
    """
    name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(name, str):
        told = f"the function {path.__name__}" if isinstance(path, FunctionType) else f"{path!r} ({type(path).__name__})"
        raise TypeError(
            f'record: it wants the file to write, as a str or a path, got {told}; type: with titans_backends.record("shapes.yaml"): model(batch)'
        )
    if not name or "\0" in name:
        raise ValueError(
            f'record: it wants the file to write, got {name!r}, which names none; type: with titans_backends.record("shapes.yaml"): model(batch)'
        )
    return _Context(Path(name))


@contextlib.contextmanager
def _recorded(path: Path) -> Iterator[Recording]:
    from titans_backends.cache.writing import CacheError, try_writing

    target = path.absolute()
    allowed = try_writing(target)
    if not allowed:
        raise CacheError(f'record: {allowed}. To write another file: titans_backends.record("OTHER.yaml")')
    read(target)
    recording = Recording(target)
    with _opening:
        listening.append(recording)
    try:
        yield recording
    finally:
        with _opening:
            listening[:] = [one for one in listening if one is not recording]
        _add(recording)


def read(path: Path) -> tuple[Met, ...]:
    """The lines of a file, none where there is no file; SchemaError with file and line, CacheError where it cannot be read."""
    from titans_backends.cache.nodes import SchemaError
    from titans_backends.cache.problems import parse_problems
    from titans_backends.cache.reading import read_text
    from titans_backends.cache.writing import CacheError

    try:
        text = read_text(path)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SchemaError(f"{path}: not UTF-8 at byte {error.start}") from error
    return parse_problems(text, str(path), defaults_of)


def _add(recording: Recording) -> None:
    """Adds what was met to the file."""
    from titans_backends.cache.problems import dump_problems, merge_problems
    from titans_backends.cache.writing import locked, real_path, replace_text

    found = recording.problems
    target = real_path(recording.path)
    with locked(target, _LOCK_TIMEOUT_S, 'titans_backends.record("OTHER.yaml")'):
        older = {met.problem: met.count for met in read(target)}
        replace_text(target, dump_problems(merge_problems(older, found), defaults_of), 'titans_backends.record("OTHER.yaml")')
