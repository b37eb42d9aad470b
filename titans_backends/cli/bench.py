"""`bench`: what dispatch chooses, the untuned default and the plain reference, side by side; each is checked before it is timed.

Nothing is written: what is measured here changes no choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from titans_backends import registry
from titans_backends.cli import exit_codes, words
from titans_backends.cli.asked_call import AskedCall, optional_tensors, sized
from titans_backends.cli.bench_grid import run_grid
from titans_backends.cli.failures import MisuseError
from titans_backends.cli.keys import key_json, key_title
from titans_backends.cli.show import Column, Group, Json, console, print_json, say, status_console, table
from titans_backends.contracts import contract
from titans_backends.reporting import numbers
from titans_backends.request import request
from titans_backends.tuning.benchmark import Timed, timed
from titans_backends.tuning.ceilings import Ceilings, measure
from titans_backends.tuning.grids import BENCH_GRIDS

__all__ = ["bench"]


def bench(
    op: Annotated[list[str] | None, typer.Argument(help="Ops; see: titans-backends ops", show_default=False)] = None,
    grid: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"A known set of problems instead: {', '.join(BENCH_GRIDS)}.", show_default=False)
    ] = None,
    seq_len: Annotated[list[str] | None, typer.Option(metavar="N", help="Tokens of each sequence: 512,2048.", show_default="512; decode 1")] = None,
    batch: Annotated[int | None, typer.Option(metavar="N", help="Sequences.", show_default="1")] = None,
    heads: Annotated[str | None, typer.Option(metavar="QK/V", help="Heads of q and k / of v: 16/32, or 16.", show_default="16")] = None,
    head_dim: Annotated[str | None, typer.Option(metavar="K[xV]", help="128, or 128x64 for K = 128 and V = 64.", show_default="128")] = None,
    dtype: Annotated[str | None, typer.Option(metavar="DTYPE", help="float32, float64, bfloat16, float16.", show_default="float32")] = None,
    regime: Annotated[str | None, typer.Option(metavar="REGIME", help="inference or training.", show_default="inference")] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="An option in the op's key: chunk_size=64.", show_default=False)
    ] = None,
    backend: Annotated[str | None, typer.Option(metavar="NAME", help="As if this backend were forced.", show_default=False)] = None,
    budget: Annotated[float, typer.Option(metavar="SECONDS", help="For the rounds of one call.")] = 2.0,
    within: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="With --grid: begin no problem after so many seconds.", show_default="none")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="With --grid: the first so many problems.", show_default="all")] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --grid: write FILE.json and FILE.csv.", show_default="benchmarks/results/bench_<grid>_<machine>"),
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1.", show_default="the first GPU, else cpu")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The table's rows as JSON on stdout.")] = False,
) -> None:
    """Time what dispatch chooses against the untuned default and the plain reference, in this process, as the tuner times.

    Outputs (in training gradients too) are compared with the float64 reference first.
    The floor is the work that the contract counts, at the speed that this machine multiplies and copies; in training it is not known.
    Exit status: 0 when everything was right, 1 when a kernel was wrong or every backend refuses.
    """
    target = words.device_named(device)
    words.seconds("--budget", budget)
    if backend is not None:
        registry.get(backend)
    if grid is not None:
        here = {"OP": op, "--seq-len": seq_len, "--batch": batch, "--heads": heads, "--head-dim": head_dim, "--dtype": dtype, "--regime": regime}
        beside = [name for name, value in {**here, "--option": option, "--backend": backend}.items() if value is not None]
        if beside:
            raise MisuseError(f"--grid {grid} has its own problems and backends; leave out {', '.join(beside)}, or leave out --grid")
        run_grid(grid, target, budget, within, limit, output, as_json)
        return
    beside = [name for name, value in {"--within": within, "--limit": limit, "--output": output}.items() if value is not None]
    if beside or not op:
        raise MisuseError(
            f"{', '.join(beside)} stand{'s' if len(beside) == 1 else ''} with --grid"
            if beside
            else f"bench takes ops, or --grid with one of {', '.join(BENCH_GRIDS)}"
        )
    given = words.integers("--seq-len", seq_len)
    lengths: list[int | None] = [None] if given is None else [*given]
    if batch is not None and batch < 1:
        raise MisuseError(f"--batch must be at least 1, got {batch}: without sequences there is nothing to time")
    sizes = (
        1 if batch is None else batch,
        "16" if heads is None else heads,
        "128" if head_dim is None else head_dim,
        "float32" if dtype is None else dtype,
        "inference" if regime is None else regime,
    )
    asked = [_asked(name, length, *sizes, option, target) for name in op for length in lengths]
    ceilings = measure(target, words.dtype_named(sizes[3]))
    err = status_console()
    rows: list[Timed] = []
    for call in asked:
        say(err, f"{call.op.name}  {call.described}", "dim")
        rows += timed(call.signature(), call.case.H, ceilings, budget, forced=request(backend, training=call.training).forced)
    if as_json:
        print_json([_row(row) for row in rows])
    else:
        _show(console(), rows, ceilings)
    if any(row.wrong for row in rows):
        raise typer.Exit(exit_codes.FALLS_SHORT)


def _asked(
    op: str, length: int | None, batch: int, heads: str, head_dim: str, dtype: str, regime: str, option: list[str] | None, device: str
) -> AskedCall:
    made = contract(op)
    options = words.options_of(made, option)
    for name in options:
        if not made.option_by_name[name].in_key:
            raise MisuseError(f"--option {name}: it is not in the key of {op} and bench leaves it at its default; in the key are: {_in_key(op)}")
    return sized(
        made, seq_len=length, batch=batch, heads=heads, head_dim=head_dim, dtype=dtype, regime=regime, device=device, options=options,
        given=optional_tensors(made, None),
    )  # fmt: skip


def _in_key(op: str) -> str:
    return ", ".join(o.name for o in contract(op).options if o.in_key) or "none"


def _row(row: Timed) -> dict[str, Json]:
    return {
        **key_json(row.bucket),
        "what": row.what,
        "candidate": row.label,
        "median_us": row.us,
        "spread": row.spread,
        "peak_mib": row.peak_mib,
        "floor_us": row.floor_us,
        "share_of_floor": row.share_of_floor,
        "problem": row.problem,
    }


def _show(out: Console, rows: Sequence[Timed], ceilings: Ceilings) -> None:
    figures = [Column(title, "right") for title in ("median", "±", "peak", "of floor", "gain")]
    groups = []
    for bucket in dict.fromkeys(row.bucket for row in rows):
        mine = [row for row in rows if row.bucket == bucket]
        title = Text.assemble(key_title(bucket), (f" · seq_len {bucket.seq_len}", "dim"))
        groups.append(Group(title, [_cells(row, mine[0].label, mine[-1].us) for row in mine]))
    table(out, [Column(""), Column("candidate", flexible=True), *figures], groups)
    out.print()
    say(out, Text(f"gain: over the reference; of floor: the share of what this machine could reach, at {ceilings}", "dim"))


def _cells(row: Timed, chosen: str, reference_us: float | None) -> list[str | Text]:
    if row.what == "default" and row.label == chosen:
        return [row.what, Text("the same", "dim"), "", "", "", "", ""]
    if row.us is None:
        return [row.what, Text(f"{row.label}: {row.problem}", "red" if row.wrong else "dim"), "", "", "", "", ""]
    share = numbers.percent(row.floor_us / row.us) if row.floor_us else ""
    label = row.label.replace(" + ", "\n+ ", 1)
    spread = numbers.percent(row.spread) if row.spread is not None else ""
    return [row.what, label, numbers.time_us(row.us), spread, numbers.mib(row.peak_mib), share, numbers.gain(reference_us, row.us)]
