"""`tune`, also called `autotune`: measures this machine and writes what won. Decides what to say, never what wins."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from titans_backends import registry
from titans_backends.cli import words
from titans_backends.cli.assess import run_assessment
from titans_backends.cli.failures import MisuseError
from titans_backends.cli.show import say, status_console
from titans_backends.cli.tune_doubtful import doubtful_rows
from titans_backends.cli.tune_from import from_file as read_problems
from titans_backends.cli.tune_grid import TypedGrid
from titans_backends.cli.tune_output import expect_table
from titans_backends.cli.tune_session import TuneSession, show_dry_run
from titans_backends.cli.typed import typed_again
from titans_backends.machine import detect
from titans_backends.tuning import ranks
from titans_backends.tuning.request import TIMEOUT_S, TuneRequest

__all__ = ["tune"]


def tune(
    ctx: typer.Context,
    op: Annotated[list[str] | None, typer.Option(metavar="OP", help="Ops to tune; repeat, or separate with commas.", show_default="all")] = None,
    seq_lens: Annotated[list[str] | None, typer.Option(metavar="N", help="Sequence lengths: 512,2048.", show_default="the grid's")] = None,
    heads: Annotated[list[str] | None, typer.Option(metavar="QK/V", help="Heads of q and k / of v: 16/32, or 16.", show_default="the grid's")] = None,
    head_dim: Annotated[
        list[str] | None, typer.Option(metavar="K[xV]", help="128, or 128x64 for K = 128 and V = 64.", show_default="the grid's")
    ] = None,
    batch: Annotated[int | None, typer.Option(metavar="N", help="Sequences in a call.", show_default="1")] = None,
    dtype: Annotated[list[str] | None, typer.Option(metavar="DTYPE", help="float32, float64, bfloat16, float16.", show_default="the grid's")] = None,
    regime: Annotated[list[str] | None, typer.Option(metavar="REGIME", help="inference, training.", show_default="the grid's")] = None,
    launch: Annotated[list[str] | None, typer.Option(metavar="LAUNCH", help="eager, graph (CUDA only).", show_default="the grid's")] = None,
    from_file: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Tune what titans_backends.record wrote, the most expensive first.", show_default=False),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Stop after this many seconds; type the command again to go on.", show_default="none")
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="What one candidate's compilation and check may take; other people's kernels compile for minutes."),
    ] = TIMEOUT_S,
    quick: Annotated[bool | None, typer.Option("--quick/--full", help="The small or the whole grid.", show_default="quick")] = None,
    backend: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Backends that race.", show_default="all; with --quick the quick ones")
    ] = None,
    objective: Annotated[str, typer.Option(metavar="WHAT", help="time, or memory: the least peak, then the fastest.")] = "time",
    max_memory: Annotated[
        float | None, typer.Option(metavar="MIB", help="Nothing wins that needs more beyond its inputs.", show_default="none")
    ] = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write this file.", show_default="the user's cache")] = None,
    device: Annotated[str | None, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1.", show_default="the first GPU, else cpu")] = None,
    force: Annotated[bool, typer.Option("--force", help="Measure again what is current.")] = False,
    doubtful: Annotated[
        bool,
        typer.Option(
            "--doubtful",
            help="Measure again the rows that noise decided, the most doubtful first, and those alone; with --from those of the recording.",
        ),
    ] = False,
    assess: Annotated[
        bool, typer.Option("--assess", help="Say how good the tuner is: two fresh tunes against every candidate timed fully. Changes no table.")
    ] = False,
    limit: Annotated[int | None, typer.Option(metavar="N", help="With --assess: so many buckets of the grid.", show_default="all")] = None,
    no_midpoints: Annotated[
        bool,
        typer.Option("--no-midpoints", help="Measure what is asked for alone: no lengths between neighbours that chose differently."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be measured; measure nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The table's rows as JSON on stdout.")] = False,
) -> None:
    """Measure this machine, write the winners to a YAML file, and show what that bought.

    Only what is missing or no longer current is measured. Ctrl-C keeps every finished bucket.
    Exit status: 0 when every bucket has a row, 1 when some are left or nothing could win, 2 when it could not run, 130 on Ctrl-C.
    """
    target = words.device_named(ranks.launched_device() if device is None else device)
    machine = detect(target)
    if output is not None and not assess:
        expect_table(output, machine)
    racing = _backends(backend)
    for one in registry.broken().values():
        say(status_console(), f"backend {one.name} is broken and does not race: {one.reason}; see: titans-backends doctor", "yellow")
    grid = TypedGrid(op, seq_lens, heads, head_dim, dtype, regime, launch, batch)
    recorded = None if from_file is None else read_problems(from_file, grid.by_option, machine, target)
    if doubtful:
        among = None if recorded is None else recorded.buckets
        other = {**grid.by_option, "--force": force, "--assess": assess, "--objective": objective != "time"}
        buckets = doubtful_rows(output, other, machine, target, max_memory, among)
    else:
        buckets = grid.buckets(machine.kind, quick=quick is not False) if recorded is None else recorded.buckets
    if objective not in ("time", "memory"):
        raise MisuseError(f"--objective must be time or memory, got {objective!r}")
    words.seconds("--budget", budget)
    words.seconds("--timeout", timeout)
    if max_memory is not None and not 0 < max_memory < math.inf:
        raise MisuseError(f"--max-memory must be MiB above 0, got {max_memory:g}")
    request = TuneRequest(
        buckets,
        device=target,
        quick=quick is not False,
        backends=racing,
        objective=cast(Literal["time", "memory"], objective),
        max_memory_mib=max_memory,
        budget_s=budget,
        timeout_s=timeout,
        output=output,
        force=force,
        doubtful=doubtful,
        heads=grid.value_heads,
        heads_by_bucket={} if recorded is None else recorded.heads,
        midpoints=not no_midpoints,
    )
    if limit is not None and (limit < 1 or not assess):
        raise MisuseError(f"--limit must be at least 1 and stand with --assess, got {limit}{'' if assess else ' without it'}")
    if assess:
        _expect_alone({"--force": force, "--dry-run": dry_run})
        cheapest_first = request if recorded is None else replace(request, buckets=buckets[::-1])
        run_assessment(cheapest_first, machine, budget, limit, as_json, typed_again(ctx, without=("output", "as_json")))
    elif not dry_run:
        again = typed_again(ctx, without=("budget", "force", "as_json"))
        whole = None if doubtful else recorded  # what the doubtful rows alone cover says nothing of the recording
        TuneSession(request, machine, again, as_json, whole, from_file).run()
    elif not ranks.launched_rank():  # rank 0 shows it
        show_dry_run(request, machine, as_json, from_file)


def _expect_alone(given: dict[str, bool]) -> None:
    beside = [name for name, value in given.items() if value]
    if beside:
        raise MisuseError(f"--assess tunes into files of its own; leave out {', '.join(beside)}")


def _backends(given: list[str] | None) -> tuple[str, ...] | None:
    found = words.names(given)
    for name in found or ():
        registry.get(name)
    return None if found is None else tuple(found)
