"""How a cache file reaches the disk: who may write, one writer at a time, and the whole new file or none of it.

A symlink is written through to its target, a file keeps its mode, and what a killed writer left behind is removed by the next one.
Nothing here knows what the text means.
"""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from titans_backends.verdict import ACCEPTED, Verdict, refused

__all__ = ["CacheError", "CacheLocked", "locked", "permission", "real_path", "replace_text", "try_writing", "world_writable"]

_ELSEWHERE = "titans-backends tune --output OTHER.yaml"
_ANY_WRITE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH


class CacheError(RuntimeError):
    """A cache file that cannot be written; the message says why and what to type next."""


class CacheLocked(CacheError):
    """Another process kept the file's lock for longer than the time-out."""


def real_path(path: Path | str) -> Path:
    """Where a path leads once every symlink is followed; the end need not exist."""
    return Path(os.path.realpath(path))


def permission(path: Path | str) -> Verdict:
    """Whether modes and mounts allow a new version of the file.

    A file or folder without any write bit counts as read-only for the superuser too, who could ignore it: somebody meant it. What is there and
    is neither, a pipe, socket or device, is no place for one: a pipe waits for a reader who may never come, and a device would be replaced.
    """
    if str(path) == "-":
        return refused("- stands for no file, and nothing is written to stdout in its stead")
    if _is_special(path):
        return refused(f"{path} is a device or pipe, not a file")
    target = real_path(path)
    if target.is_dir():
        return refused(f"{path} is a folder, not a file")
    if target.exists() and not _may_write(target):
        return refused(f"{path} is read-only")
    folder = target.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        return refused(f"{folder}, on the way to {path}, is not a folder")
    if not _may_write(folder) or not os.access(folder, os.X_OK):
        return refused(f"the folder {folder} of {path} is read-only")
    return ACCEPTED


def try_writing(path: Path | str) -> Verdict:
    """`permission`, and a file made and removed beside the path, where its folder exists: quotas and full disks show only so."""
    verdict = permission(path)
    target = real_path(path)
    if not verdict or not target.parent.exists():
        return verdict
    try:
        with _temporary(target) as (descriptor, _):
            os.write(descriptor, b"#")
            os.fsync(descriptor)
    except OSError as error:
        return refused(f"a file beside {path} cannot be written: {error.strerror or error}")
    return ACCEPTED


def world_writable(path: Path | str) -> bool:
    """Whether anybody on the machine may change the file, or swap it in a folder that is open and not sticky."""
    target = real_path(path)
    try:
        file_mode, folder_mode = target.stat().st_mode, target.parent.stat().st_mode
    except OSError:
        return False
    return bool(file_mode & stat.S_IWOTH) or bool(folder_mode & stat.S_IWOTH and not folder_mode & stat.S_ISVTX)


@contextlib.contextmanager
def locked(target: Path, timeout_s: float, elsewhere: str = _ELSEWHERE) -> Iterator[None]:
    """Holds `<target>.lock` against every other writer; CacheLocked after `timeout_s`. A dead holder's lock is free at once.

    `elsewhere`: what to type to write another file.
    """
    import filelock  # costs more than the rest of this package; only writers need it

    lock_path = f"{target}.lock"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(lock_path, timeout=timeout_s)
        lock.acquire(poll_interval=0.01)
    except filelock.Timeout as error:
        raise CacheLocked(
            f"{target} is being written by another process, which has held {lock_path} for over {timeout_s:g} s. Wait for it and run again, "
            f"or write elsewhere: {elsewhere}"
        ) from error
    except OSError as error:
        raise CacheError(f"{target} cannot be locked for writing: {error}. Write elsewhere: {elsewhere}") from error
    try:
        yield
    finally:
        lock.release()


def replace_text(target: Path, text: str, elsewhere: str = _ELSEWHERE) -> None:
    """Puts the text in the file's place in one step, synced first; CacheError leaves the old file as it was. Call it under the lock."""
    try:
        for leftover in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
            leftover.unlink(missing_ok=True)
        with _temporary(target) as (descriptor, temporary):
            with contextlib.suppress(FileNotFoundError):
                os.fchmod(descriptor, stat.S_IMODE(target.stat().st_mode))
            with open(descriptor, "w", encoding="utf-8", newline="\n", closefd=False) as file:
                file.write(text)
            os.fsync(descriptor)
            os.replace(temporary, target)
    except OSError as error:
        raise CacheError(
            f"{target} could not be written ({error.strerror or error}); it is as it was. Free the disk and run again, "
            f"or write elsewhere: {elsewhere}"
        ) from error


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[tuple[int, Path]]:
    """A new file beside the target, with the mode that the umask gives; gone afterwards unless it was renamed."""
    path = target.parent / f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        yield descriptor, path
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)


def _is_special(path: Path | str) -> bool:
    """Whether something is there that is neither file nor folder; asked of the path itself, since a pipe under /dev/fd has no other."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _may_write(path: Path) -> bool:
    return bool(path.stat().st_mode & _ANY_WRITE) and os.access(path, os.W_OK)
