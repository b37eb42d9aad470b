"""Cache files on disk: read with every problem graded, and updated by read, merge and replace under a lock.

Reading never raises for what a file holds: damaged content is set aside with one warning, a foreign or future file is left alone, and
both are reported as a value. Writing raises CacheError with what to type next.
"""

from __future__ import annotations

import glob
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, Literal, TypeVar

from titans_backends.cache.document import ForeignDevice, FutureSchema, OtherFile
from titans_backends.cache.nodes import SchemaError
from titans_backends.cache.paths import timings_path
from titans_backends.cache.reading import read_text
from titans_backends.cache.schema import Bucket, DefaultsOf, Device, Entry, Environment, Table, canonical_when, merge
from titans_backends.cache.table_text import dump_table, parse_table
from titans_backends.cache.timings import Measurement, Timings, dump_timings, merge_timings, parse_timings
from titans_backends.cache.writing import CacheError, CacheLocked, locked, permission, real_path, replace_text, try_writing, world_writable
from titans_backends.verdict import ACCEPTED, Verdict, refused

__all__ = [
    "CacheError",
    "CacheLocked",
    "Loaded",
    "Problem",
    "SchemaError",
    "check_writable",
    "edit",
    "edit_timings",
    "load",
    "read",
    "read_timings",
    "set_aside",
    "update",
    "update_timings",
]

Content = TypeVar("Content", Table, Timings)

LOCK_TIMEOUT_S = 60.0
_READER_LOCK_TIMEOUT_S = 1.0
_ELSEWHERE = "To write another file: titans-backends tune --output OTHER.yaml"


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a file that exists is not used; `message` is a sentence with the path, `moved_to` where damaged content went."""

    kind: Literal["damaged", "foreign", "future", "unreadable"]
    message: str
    moved_to: Path | None = None


@dataclass(frozen=True, slots=True)
class Loaded(Generic[Content]):
    """What a path holds: neither table nor problem where there is no file.

    `writable`: an update would be allowed by modes and mounts. `world_writable`: anybody could have written this, `doctor` warns.
    """

    path: Path
    table: Content | None
    problem: Problem | None
    writable: bool
    world_writable: bool

    @property
    def reason(self) -> str:
        """Why the file is not used, without the path that the problem's message begins with: for where that stands beside it. Empty where there is no problem."""
        told = self.problem.message.removeprefix(str(self.path)) if self.problem is not None else ""
        return re.sub(r"^:(\d+):", r"line \1:", told).lstrip(": ")


@dataclass(frozen=True, slots=True)
class _Format(Generic[Content]):
    parse: Callable[[str, str, DefaultsOf, Device | None], Content]
    dump: Callable[[Content, DefaultsOf], str]
    empty: Callable[[Device], Content]
    written: dict[Path, tuple[str, DefaultsOf, Content]] = field(default_factory=dict)
    """What this process wrote last: a tuner that writes row by row need not parse its own text each time."""


_TABLE = _Format(parse_table, dump_table, lambda device: Table(device, {}, {}))
_TIMINGS = _Format(parse_timings, dump_timings, lambda device: Timings(device, {}, {}))


def read(path: Path | str, defaults_of: DefaultsOf, device: Device | None = None) -> Loaded[Table]:
    """The table at a path, touching nothing: for shipped tables and for `explain`. With a device, another one's file is foreign."""
    return _examine(_TABLE, Path(path), defaults_of, device)


def load(path: Path | str, defaults_of: DefaultsOf, device: Device | None = None) -> Loaded[Table]:
    """`read`, and damaged content renamed to `<name>.damaged-N` with one warning, where the folder allows it."""
    file = Path(path)
    loaded = _examine(_TABLE, file, defaults_of, device)
    if loaded.problem is None or loaded.problem.kind != "damaged" or not loaded.writable:
        return loaded
    try:
        with locked(real_path(file), _READER_LOCK_TIMEOUT_S):
            now = _examine(_TABLE, file, defaults_of, device)  # another process may have begun a fresh one
            return _set_aside(now)
    except CacheError:
        return loaded  # a writer is at it, or no lock is to be had: the problem is reported all the same


def set_aside(*paths: Path) -> list[Path]:
    """What `load` and the writers renamed because it was damaged, of these files."""
    return sorted(Path(found) for path in paths for found in glob.glob(f"{glob.escape(str(path))}.damaged-*"))


def read_timings(path: Path | str, defaults_of: DefaultsOf, device: Device | None = None) -> Loaded[Timings]:
    """`read` for a timings file."""
    return _examine(_TIMINGS, Path(path), defaults_of, device)


def check_writable(path: Path | str, *, device: Device, defaults_of: DefaultsOf) -> Verdict:
    """Whether `update` and, beside it, `update_timings` would be let in, with every reason against it; `tune` asks before it measures."""
    beside = timings_path(path)
    verdict = try_writing(path)
    verdict &= permission(beside) if verdict else ACCEPTED  # of the same folder, so that it would say the same again
    for problem in (read(path, defaults_of, device).problem, read_timings(beside, defaults_of, device).problem):
        if problem is not None and problem.kind != "damaged" and not any(reason in problem.message for reason in verdict.reasons):
            verdict &= refused(problem.message)
    return verdict if verdict else verdict & refused(_ELSEWHERE.replace("To", "to", 1))


def update(
    path: Path | str,
    *,
    device: Device,
    environment: Environment,
    changes: Mapping[Bucket, Entry],
    defaults_of: DefaultsOf,
    timeout_s: float = LOCK_TIMEOUT_S,
) -> Table:
    """Merges entries measured in `environment` (their `env` is set here) into a file, and gives what it now holds.

    Raises CacheError where the file may not be written, is foreign or of a future schema; CacheLocked after `timeout_s`.
    """
    rows = {_canonical(bucket, defaults_of): replace(entry, env="a") for bucket, entry in changes.items()}
    newer = Table(device, {"a": environment}, rows)
    return edit(path, lambda older: merge(older, newer), device=device, defaults_of=defaults_of, timeout_s=timeout_s)


def update_timings(
    path: Path | str,
    *,
    device: Device,
    environment: Environment,
    changes: Mapping[Bucket, Sequence[Measurement]],
    defaults_of: DefaultsOf,
    timeout_s: float = LOCK_TIMEOUT_S,
) -> Timings:
    """`update` for a timings file."""
    rows = {_canonical(bucket, defaults_of): tuple(replace(one, env="a") for one in found) for bucket, found in changes.items()}
    newer = Timings(device, {"a": environment}, rows)
    return edit_timings(path, lambda older: merge_timings(older, newer), device=device, defaults_of=defaults_of, timeout_s=timeout_s)


def edit(path: Path | str, change: Callable[[Table], Table], *, device: Device, defaults_of: DefaultsOf, timeout_s: float = LOCK_TIMEOUT_S) -> Table:
    """Replaces a file by `change` of what it holds (an empty table where there is none), under its lock. Raises as `update` does."""
    return _edit(_TABLE, Path(path), change, device, defaults_of, timeout_s)


def edit_timings(
    path: Path | str, change: Callable[[Timings], Timings], *, device: Device, defaults_of: DefaultsOf, timeout_s: float = LOCK_TIMEOUT_S
) -> Timings:
    """`edit` for a timings file."""
    return _edit(_TIMINGS, Path(path), change, device, defaults_of, timeout_s)


def _canonical(bucket: Bucket, defaults_of: DefaultsOf) -> Bucket:
    return bucket._replace(when=canonical_when(bucket.when, defaults_of(bucket.op) or {}))


def _examine(form: _Format[Content], path: Path, defaults_of: DefaultsOf, device: Device | None) -> Loaded[Content]:
    table, problem = None, None
    try:
        text = read_text(path)
        known = form.written.get(real_path(path))
        if known is not None and known[:2] == (text, defaults_of) and (device is None or known[2].device.same(device)):
            table = known[2]
        else:
            table = form.parse(text, str(path), defaults_of, device)
    except FileNotFoundError:
        pass  # no file is no problem: nothing was tuned yet
    except OSError as error:
        problem = Problem("unreadable", f"{path} cannot be read: {error.strerror or error}")
    except FutureSchema as error:
        problem = Problem("future", f"{error}: ignored and left as it is")
    except (ForeignDevice, OtherFile) as error:
        problem = Problem("foreign", f"{error}: ignored and left as it is")
    except UnicodeDecodeError as error:
        problem = Problem("damaged", f"{path}: not UTF-8 at byte {error.start}")
    except SchemaError as error:
        problem = Problem("damaged", str(error))
    return Loaded(path, table, problem, bool(permission(path)), world_writable(path))


def _edit(
    form: _Format[Content], path: Path, change: Callable[[Content], Content], device: Device, defaults_of: DefaultsOf, timeout_s: float
) -> Content:
    allowed = permission(path)
    if not allowed:
        raise CacheError(f"{allowed}. {_ELSEWHERE}")
    target = real_path(path)
    with locked(target, timeout_s):
        loaded = _set_aside(_examine(form, path, defaults_of, device))
        if loaded.problem is not None and loaded.problem.moved_to is None:
            raise CacheError(f"{loaded.problem.message}. {_ELSEWHERE}")
        changed = change(loaded.table if loaded.table is not None else form.empty(device))
        text = form.dump(changed, defaults_of)
        replace_text(target, text)
        form.written.clear()
        form.written[target] = (text, defaults_of, changed)
    return changed


def _set_aside(loaded: Loaded[Content]) -> Loaded[Content]:
    """Renames damaged content and says so; anything else comes back as it is. Call it under the lock."""
    if loaded.problem is None or loaded.problem.kind != "damaged":
        return loaded
    target = real_path(loaded.path)
    number = 1
    while os.path.lexists(aside := target.with_name(f"{target.name}.damaged-{number}")):
        number += 1
    try:
        os.rename(target, aside)
    except OSError as error:
        raise CacheError(f"{loaded.problem.message}; it cannot be renamed either: {error}. {_ELSEWHERE}") from error
    message = f"titans_backends cache: {loaded.problem.message}. Moved to {aside}; a fresh one begins with: titans-backends tune"
    warnings.warn(message, UserWarning, stacklevel=4)
    return replace(loaded, problem=Problem("damaged", loaded.problem.message, aside))
