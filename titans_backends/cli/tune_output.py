"""`tune --output FILE`: refused at once where what lies there is no table of this device, before anything is read, planned or measured.

Whether it may be written is asked when there is something to write: a read-only table whose rows are all current is no misuse.
"""

from __future__ import annotations

from pathlib import Path

from titans_backends.buckets import defaults_of
from titans_backends.cache import file
from titans_backends.cache.paths import TIMINGS_SUFFIX, timings_path
from titans_backends.cache.schema import device_of
from titans_backends.cli.failures import MisuseError
from titans_backends.machine import Machine

__all__ = ["expect_table"]


def expect_table(path: Path, machine: Machine) -> None:
    """MisuseError where the file, or the timings beside it, is of another kind, device or schema or cannot be read, and for a name that timings have."""
    if path.name.endswith(TIMINGS_SUFFIX):
        table = path.with_name(path.name.removesuffix(TIMINGS_SUFFIX) + ".yaml")
        raise MisuseError(f"--output {path}: such a name belongs to the measurements beside a table; name the table: --output {table}")
    device = device_of(machine)
    for loaded in (file.read(path, defaults_of, device), file.read_timings(timings_path(path), defaults_of, device)):
        if loaded.problem is not None and loaded.problem.kind != "damaged":
            raise MisuseError(f"--output {path}: no table can be written there: {loaded.problem.message}; name another file: --output OTHER.yaml")
