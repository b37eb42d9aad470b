"""`verify`: is every usable candidate right on this machine? It runs the conformance cases and counts; what is right is theirs to say."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from titans_backends import registry
from titans_backends.cli import exit_codes, words
from titans_backends.cli.examiner import Examiner
from titans_backends.cli.show import Column, Group, Json, console, heading, print_json, say, status_console, table
from titans_backends.conformance import Item, Result, items
from titans_backends.machine import Machine, detect
from titans_backends.reporting import numbers
from titans_backends.signature import Regime

__all__ = ["verify"]

_REFUSALS = 6
"""So many reasons of what is refused altogether are printed; `--json` has all."""


@dataclass(frozen=True, slots=True)
class Tally:
    """The results of one op on one backend in one dtype and regime. `worst` and `limit` are relative errors against float64."""

    op: str
    backend: str
    dtype: str
    regime: str
    results: tuple[Result, ...]

    def count(self, status: str) -> int:
        """How many results have a status."""
        return sum(result.status == status for result in self.results)

    @property
    def candidates(self) -> list[str]:
        """The candidates that ran, each with its direction."""
        ran = {kernel for result in self.results for kernel in result.kernels}
        return sorted(kernel for kernel in ran if kernel.startswith(("forward ", "backward ")))

    @property
    def worst(self) -> float:
        """The largest error."""
        return max((result.worst for result in self.results), default=0.0)

    @property
    def limit(self) -> float:
        """What it may be."""
        return max((result.limit for result in self.results), default=0.0)


def verify(
    op: Annotated[list[str] | None, typer.Option(metavar="OP", help="Only these ops; repeat, or separate with commas.", show_default="all")] = None,
    backend: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only these backends.", show_default="all")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(metavar="DTYPE", help="float32, float64, bfloat16, float16.", show_default="float32; on a GPU bfloat16 too")
    ] = None,
    regime: Annotated[list[str] | None, typer.Option(metavar="REGIME", help="inference, training.", show_default="both")] = None,
    device: Annotated[str | None, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1.", show_default="the first GPU, else cpu")] = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="For one case.")] = 300.0,
    as_json: Annotated[bool, typer.Option("--json", help="The table's rows as JSON on stdout.")] = False,
) -> None:
    """Check every usable candidate of every op against its float64 reference, on this machine, ordinary and hostile cases.

    Exit status: 0 when everything is right, 1 when something is not or nothing could run.
    """
    target = words.device_named(device)
    words.seconds("--timeout", timeout)
    machine = detect(target)
    asked, wanted = words.names(backend), words.op_names(op)
    dtypes = words.one_of("--dtype", dtype, words.DTYPES) or (["float32"] if machine.kind == "cpu" else ["bfloat16", "float32"])
    regimes = cast("list[Regime]", words.one_of("--regime", regime, ("inference", "training")) or ["inference", "training"])
    chosen = [registry.get(name).name for name in asked] if asked is not None else list(registry.known())
    unavailable = {name: str(verdict) for name in chosen if not (verdict := registry.availability(registry.get(name), machine))}
    work: list[Item] = []
    for name in chosen:
        if name not in unavailable:
            ops = [one for one in (wanted or registry.get(name).ops) if one in registry.get(name).ops]
            if asked is not None and not ops:
                unavailable[name] = f"it has no {' or '.join(wanted or ())}; its ops: {', '.join(sorted(registry.get(name).ops))}"
            work += items(name, ops=ops, dtypes=[words.dtype_named(one) for one in dtypes], regimes=regimes, device=target)
    started = time.monotonic()
    tallies = _tallies(_examined(work, timeout))
    if as_json:
        print_json([_row(tally) for tally in tallies])
    else:
        _show(console(), machine, tallies, unavailable, time.monotonic() - started)
    if not any(tally.count("passed") for tally in tallies) or any(tally.count("failed") for tally in tallies) or (asked and unavailable):
        raise typer.Exit(exit_codes.FALLS_SHORT)


def _examined(work: Sequence[Item], timeout_s: float) -> list[Result]:
    """Every result, with a bar on a terminal and a line for each op elsewhere."""
    err = status_console()
    found: list[Result] = []
    bar = Progress(
        BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}", markup=False),
        console=err, transient=True, disable=not err.is_terminal,
    )  # fmt: skip
    with Examiner(timeout_s) as examiner, bar:
        task = bar.add_task("", total=len(work))
        for number, item in enumerate(work):
            bar.update(task, description=str(item))
            if not err.is_terminal and (number == 0 or (item.op, item.backend) != (work[number - 1].op, work[number - 1].backend)):
                say(err, f"[{number}/{len(work)}] {item.backend} {item.op}")
            result = examiner.examine(item)
            found.append(result)
            bar.advance(task)
            if result.status == "failed":
                bar.console.print(Text(f"✗ {result.detail}", "red"), overflow="fold")
    return found


def _tallies(results: Sequence[Result]) -> list[Tally]:
    groups: dict[tuple[str, str, str, str], list[Result]] = {}
    for result in results:
        item = result.item
        groups.setdefault((item.op, item.backend, str(item.case.dtype).removeprefix("torch."), item.regime), []).append(result)
    return [Tally(*key, tuple(found)) for key, found in groups.items()]


def _row(tally: Tally) -> dict[str, Json]:
    return {
        "op": tally.op,
        "backend": tally.backend,
        "dtype": tally.dtype,
        "regime": tally.regime,
        "cases": len(tally.results),
        "passed": tally.count("passed"),
        "refused": tally.count("refused"),
        "failed": tally.count("failed"),
        "candidates": tally.candidates,
        "worst": tally.worst if tally.worst < float("inf") else None,
        "limit": tally.limit,
        "failures": [result.detail for result in tally.results if result.status == "failed"],
        "refusals": list(dict.fromkeys(result.detail for result in tally.results if result.status == "refused")),
    }


def _show(out: Console, machine: Machine, tallies: Sequence[Tally], unavailable: dict[str, str], seconds: float) -> None:
    figures = [Column(title, "right") for title in ("candidates", "right", "refused", "worst error", "allowed")]
    columns = [Column("regime"), Column("dtype"), *figures, Column("")]
    groups: dict[tuple[str, str], list[list[str | Text]]] = {}
    for tally in tallies:
        groups.setdefault((tally.op, tally.backend), []).append(_cells(tally))
    table(out, columns, [Group(Text.assemble((op, "bold"), f"  {backend}"), rows) for (op, backend), rows in groups.items()])
    failures = [result.detail for tally in tallies for result in tally.results if result.status == "failed"]
    if failures:
        heading(out, "wrong")
    for detail in failures:
        say(out, f"  {detail}")
    out.print()
    refused = dict.fromkeys(
        f"refused: {tally.op} {tally.backend} {tally.regime} {tally.dtype}: {result.detail}"
        for tally in tallies
        if tally.count("refused") == len(tally.results)
        for result in tally.results[:1]
    )
    for told in list(refused)[:_REFUSALS]:
        say(out, Text(told, "dim"))
    if len(refused) > _REFUSALS:
        say(out, Text(f"{len(refused) - _REFUSALS} more were refused altogether; their reasons: --json", "dim"))
    for name, reason in unavailable.items():
        say(out, Text(f"not run: {name}: {reason}", "dim"))
    total = sum(tally.count("passed") + tally.count("failed") for tally in tallies)
    passed = sum(tally.count("passed") for tally in tallies)
    told = f"{passed} of {numbers.amount(total, 'case')} right on {machine.name}, in {numbers.seconds(seconds)}"
    say(out, Text(told, "green" if passed == total and total else "red"))


def _cells(tally: Tally) -> list[str | Text]:
    ran = len(tally.results) - tally.count("refused")
    failed = tally.count("failed")
    verdict = Text(f"{failed} wrong", "red") if failed else Text("right" if ran else "refused", "green" if ran else "dim")
    worst, limit = (f"{tally.worst:.1e}", f"{tally.limit:.0e}") if ran else ("", "")
    counts = [str(len(tally.candidates)), f"{tally.count('passed')} of {ran}", str(tally.count("refused") or "")]
    return [tally.regime, tally.dtype, *counts, worst, limit, verdict]
