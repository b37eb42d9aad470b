"""`cache`: the tuned tables as files: show, path, diff, merge, prune, reset. Only the last three change a file, and say which."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from titans_backends import plans
from titans_backends.buckets import Bucket, defaults_of
from titans_backends.cache import file, paths, schema
from titans_backends.cache.nodes import SchemaError
from titans_backends.cache.schema import Entry, Table, device_of
from titans_backends.cache.staleness import Staleness
from titans_backends.cache.timings import Measurement, Timings, merge_timings, prune_timings
from titans_backends.cli import exit_codes, words
from titans_backends.cli.cache_rows import changes_json, rows_json, show_changes, show_rows
from titans_backends.cli.failures import CommandGroup, MisuseError
from titans_backends.cli.row_state import measurement_state, renewals, row_state
from titans_backends.cli.show import Column, Group, command, console, facts, print_json, say, status_console
from titans_backends.cli.show import table as show_table
from titans_backends.machine import Machine, detect
from titans_backends.reporting import numbers

__all__ = ["cache"]

cache = typer.Typer(cls=CommandGroup, no_args_is_help=True, help="The tuned tables: show, path, diff, merge, prune, reset.")

DeviceOption = Annotated[str | None, typer.Option(metavar="DEVICE", help="Whose user cache: cpu, cuda.", show_default="the first GPU, else cpu")]
JsonOption = Annotated[bool, typer.Option("--json", help="The same rows as JSON.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would change; change nothing.")]


@cache.command("show")
def show(
    path: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="A table.", show_default="the user's")] = None,
    op: Annotated[list[str] | None, typer.Option(metavar="OP", help="Only these ops.", show_default="all")] = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the rows of the user's cache, or of a file: what won, how fast, and whether it still holds here."""
    machine = detect(words.device_named(device))
    table = _existing(path or paths.user_cache_path(machine.slug))
    wanted = words.op_names(op)
    table = replace(table, rows={bucket: entry for bucket, entry in table.rows.items() if wanted is None or bucket.op in wanted})
    states = _states(table, machine)
    if as_json:
        print_json(rows_json(table, states))
        return
    out = console()
    facts(out, [("file", str(path or paths.user_cache_path(machine.slug))), ("device", table.device.name), ("rows", str(len(table.rows)))], indent=0)
    out.print()
    show_rows(out, table, states)
    doubtful = any(entry.doubt is not None for entry in table.rows.values())
    if doubtful and states and paths.timings_path(path or paths.user_cache_path(machine.slug)).exists():
        command(out, shlex.join(["titans-backends", "tune", "--doubtful", *(["--output", str(path)] if path else []), *_on(device)]))
    worn = renewals(states)
    if worn:
        out.print()
    for one in worn:
        say(out, Text(str(one), "yellow"))
        if one.command:
            command(out, one.command)


@cache.command("path")
def path(device: DeviceOption = None) -> None:
    """Print where the user's cache is, or would be."""
    typer.echo(paths.user_cache_path(detect(words.device_named(device)).slug))


@cache.command("diff")
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="A table.", show_default=False)],
    second: Annotated[Path | None, typer.Argument(metavar="[B]", help="Another.", show_default="the user's")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the buckets in which two tables differ."""
    old = _existing(first)
    new = _existing(second or paths.user_cache_path(old.device.slug))
    if not old.device.same(new.device):
        say(status_console(), f"of two devices: {old.device.name} and {new.device.name}", "yellow")
    changes = schema.diff(old, new)
    if as_json:
        print_json(changes_json(changes, old, new))
        return
    out = console()
    show_changes(out, changes)
    say(out, f"\n{numbers.amount(len(changes), 'bucket differs', 'buckets differ')}" if changes else "no difference")


@cache.command("merge")
def merge(
    tables: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Tables of one device; where two have a bucket, the later one's row is taken.", show_default=False),
    ],
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Merge into this file.", show_default="the user's cache")] = None,
    device: DeviceOption = None,
) -> None:
    """Merge tables, with their timings, into one: the user's cache, or another file."""
    loaded = [_existing(one) for one in tables]
    owner = loaded[0].device
    for source, table in zip(tables, loaded, strict=True):
        if not table.device.same(owner):
            raise MisuseError(f"{source} was measured on {table.device.slug}, {tables[0]} on {owner.slug}; only tables of one device merge")
    target = output
    if target is None:
        machine = detect(words.device_named(device))
        if not owner.same(device_of(machine)):
            raise MisuseError(f"{tables[0]} was measured on {owner.slug}, this machine is {machine.slug}; name a file with --output")
        target = paths.user_cache_path(machine.slug)

    def joined(older: Table) -> Table:
        for table in loaded:
            older = schema.merge(older, table)
        return older

    changed = file.edit(target, joined, device=owner, defaults_of=defaults_of)
    measured = [found for one in tables if (found := _timings(one)) is not None]
    if measured:
        file.edit_timings(paths.timings_path(target), lambda older: _join_timings(older, measured), device=owner, defaults_of=defaults_of)
    plans.invalidate()
    say(console(), f"{target} now has {numbers.amount(len(changed.rows), 'row')}")


@cache.command("prune")
def prune(
    stale: Annotated[bool, typer.Option("--stale", help="Also rows of another torch, triton or numba, which still decide calls.")] = False,
    device: DeviceOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Remove the rows of the user's cache that no longer decide anything: candidates that are gone or whose source changed."""
    machine = detect(words.device_named(device))
    target = paths.user_cache_path(machine.slug)
    table = _existing(target)
    unwanted = {"ignored", "stale"} if stale else {"ignored"}
    states = {bucket: state for bucket, state in _states(table, machine).items() if state.kind in unwanted}
    if not dry_run:
        _drop(machine, target, unwanted)
    if as_json:
        print_json(rows_json(replace(table, rows={bucket: table.rows[bucket] for bucket in states}), states))
        return
    out = console()
    columns = (Column("op"), Column("seq_len", "right"), Column("winner", flexible=True), Column("why", flexible=True))
    rows = [[bucket.op, str(bucket.seq_len), table.rows[bucket].label, state.reason] for bucket, state in states.items()]
    if rows:
        show_table(out, columns, [Group("", rows)])
        out.print()
    say(
        out,
        f"{'would remove' if dry_run else 'removed'} {len(rows)} of {numbers.amount(len(table.rows), 'row')} in {target}"
        if rows
        else "nothing to prune",
    )


@cache.command("reset")
def reset(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    damaged: Annotated[bool, typer.Option("--damaged", help="Remove the damaged files that were set aside, too.")] = False,
    device: DeviceOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Remove the user's cache of a device, with its timings."""
    target = paths.user_cache_path(detect(words.device_named(device)).slug)
    beside = paths.timings_path(target)
    aside = file.set_aside(target, beside)
    doomed = [one for one in (target, beside) if one.exists() or one.is_symlink()] + (aside if damaged else [])
    out = console()
    if not doomed:
        say(out, f"nothing to remove: there is no {target}")
    for one in doomed:
        say(out, f"{'would remove' if dry_run else 'to remove'}: {one}" if dry_run or not yes else f"removing {one}")
    if aside and not damaged:
        say(out, f"kept: {numbers.amount(len(aside), 'damaged file')} beside it; remove with --damaged", "dim")
    if dry_run or not doomed:
        return
    if not yes:
        _confirm()
    for one in doomed:
        try:
            one.unlink(missing_ok=True)
        except OSError as error:
            raise MisuseError(f"{one} cannot be removed: {error.strerror or error}") from error
    plans.invalidate()


def _on(device: str | None) -> list[str]:
    """The words that name the device again."""
    return [] if device is None else ["--device", device]


def _confirm() -> None:
    if not sys.stdin.isatty():
        raise MisuseError("nobody is there to ask; to remove them: titans-backends cache reset --yes")
    if not typer.confirm("Remove?"):
        say(console(), "kept")
        raise typer.Exit(exit_codes.FALLS_SHORT)


def _existing(path: Path) -> Table:
    """The table of a file that must be there and sound."""
    loaded = file.read(path, defaults_of)
    if loaded.table is not None:
        return loaded.table
    if loaded.problem is None:
        raise MisuseError(f"there is no file {path}; to make one: titans-backends tune")
    if loaded.problem.kind == "damaged":
        raise SchemaError(loaded.problem.message)
    raise MisuseError(loaded.problem.message)


def _timings(table_path: Path) -> Timings | None:
    return file.read_timings(paths.timings_path(table_path), defaults_of).table


def _join_timings(older: Timings, measured: list[Timings]) -> Timings:
    for found in measured:
        older = merge_timings(older, found)
    return older


def _states(table: Table, machine: Machine) -> dict[Bucket, Staleness]:
    """Every row's grade; none for a table of another device, whose candidates this one cannot ask for."""
    if not table.device.same(device_of(machine)):
        return {}
    return {bucket: row_state(machine, table, bucket, entry) for bucket, entry in table.rows.items()}


def _drop(machine: Machine, target: Path, unwanted: set[str]) -> None:
    def fine(table: Table) -> Callable[[Bucket, Entry], bool]:
        return lambda bucket, entry: row_state(machine, table, bucket, entry).kind not in unwanted

    def current(timings: Timings) -> Callable[[Bucket, Measurement], bool]:
        return lambda bucket, one: measurement_state(machine, timings, bucket, one).kind not in unwanted

    device = device_of(machine)
    file.edit(target, lambda table: schema.prune(table, fine(table)), device=device, defaults_of=defaults_of)
    beside = paths.timings_path(target)
    if beside.exists():
        file.edit_timings(beside, lambda timings: prune_timings(timings, current(timings)), device=device, defaults_of=defaults_of)
    plans.invalidate()
