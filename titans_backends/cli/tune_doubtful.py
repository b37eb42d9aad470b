"""`tune --doubtful`: the rows of a table whose choice its measurements leave open, and the words that cannot stand beside it."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from pathlib import Path

from titans_backends.buckets import Bucket
from titans_backends.cache.paths import timings_path
from titans_backends.cache.schema import Table
from titans_backends.cli.failures import MisuseError
from titans_backends.cli.show import say, status_console
from titans_backends.machine import Machine
from titans_backends.tuning.doubt import doubtful
from titans_backends.tuning.store import Store

__all__ = ["doubtful_rows"]


def doubtful_rows(
    output: Path | None,
    contradicting: Mapping[str, object],
    machine: Machine,
    device: str,
    max_memory_mib: float | None = None,
    among: Collection[Bucket] | None = None,
) -> tuple[Bucket, ...]:
    """The buckets to measure again, the most doubtful first: those tuned within the same limit of memory; `among`: of these alone.

    Rows in doubt that were tuned within another limit are told, with the command for them.

    MisuseError for options that would change them, and where there is no table or no timings.
    """
    given = [name for name, value in contradicting.items() if value not in (None, False)]
    if given:
        raise MisuseError(f"--doubtful measures the rows of a table again as they are; leave out {', '.join(given)}, or leave out --doubtful")
    store = Store.opened(machine, output)
    if store.table is None:
        raise MisuseError(
            f"--doubtful: there is no table of {machine.name} at {store.path}. Make it with titans-backends tune, or name one with --output"
        )
    if store.timings is None:
        raise MisuseError(
            f"--doubtful: {store.path} has no measurements beside it, in {timings_path(store.path)}, and they alone say what is in doubt. "
            "Put them there, or measure everything again with titans-backends tune --force"
        )
    for options in _of_other_limits(store.table, max_memory_mib, among):
        how = f"with {options}" if options else "without a limit of memory"
        again = shlex.join(["titans-backends", "tune", "--doubtful", *options.split(), *([] if output is None else ["--output", str(output)])])
        say(status_console(), f"rows in doubt that were tuned {how} stay as they are; to measure them again: {again}", "yellow")
    return tuple(bucket for bucket, _ in doubtful(store, machine, device, max_memory_mib) if among is None or bucket in among)


def _of_other_limits(table: Table, max_memory_mib: float | None, among: Collection[Bucket] | None) -> tuple[str, ...]:
    """The options that the rows in doubt within another limit were tuned with, each once."""
    rows = [entry for bucket, entry in table.rows.items() if entry.doubt is not None and (among is None or bucket in among)]
    return tuple(dict.fromkeys(entry.tuned_with for entry in rows if entry.max_memory_mib != max_memory_mib))
