"""`tune`, also called `autotune`: measures this machine and writes what won. Decides what to say, never what wins."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, cast

import typer
from rich.console import Console
from rich.text import Text

from titans_backends import registry
from titans_backends.cache.paths import user_cache_path
from titans_backends.cache.schema import Bucket
from titans_backends.cli import exit_codes, units, words
from titans_backends.cli.assess import run_assessment
from titans_backends.cli.failures import MisuseError, user_input
from titans_backends.cli.plan_rows import plan_json, show_plan
from titans_backends.cli.progress import showing
from titans_backends.cli.show import command, console, facts, print_json, say, status_console
from titans_backends.cli.tune_doubtful import doubtful_rows
from titans_backends.cli.tune_from import Recorded, coverage_json, show_coverage
from titans_backends.cli.tune_from import from_file as read_problems
from titans_backends.cli.tune_output import expect_table
from titans_backends.cli.tune_rows import rows_json, show_rows
from titans_backends.contracts import CONTRACTS
from titans_backends.machine import Machine, detect
from titans_backends.signature import Launch, Regime
from titans_backends.tuning import ranks
from titans_backends.tuning.plan import plan
from titans_backends.tuning.run import TIMEOUT_S, Row, TuneInterrupted, TuneReport, TuneRequest
from titans_backends.tuning.run import tune as run_tune

__all__ = ["tune"]

NOTHING = "nothing to do"


def tune(
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
    small = True if quick is None else quick
    racing = _backends(backend)
    for one in registry.broken().values():
        say(status_console(), f"backend {one.name} is broken and does not race: {one.reason}; see: titans-backends doctor", "yellow")
    pairs = words.heads_list(heads)
    lengths, dims = words.integers("--seq-lens", seq_lens), words.head_dims(head_dim)
    most_heads, most_dim = (max((n for pair in given or () for n in pair), default=1) for given in (pairs, dims))
    words.computable(max(lengths or [1]), max(batch or 1, 1), most_heads, most_dim)
    grid = {
        "--op": op, "--seq-lens": seq_lens, "--heads": heads, "--head-dim": head_dim, "--dtype": dtype, "--regime": regime, "--launch": launch,
        "--batch": batch,
    }  # fmt: skip
    recorded = None if from_file is None else read_problems(from_file, grid, machine, target)
    if recorded is not None:
        buckets = recorded.buckets
    if doubtful:
        among = None if recorded is None else recorded.buckets
        buckets = doubtful_rows(output, {**grid, "--force": force, "--assess": assess}, machine, target, among)
    elif recorded is None:
        with user_input():
            buckets = plan(
                machine.kind,
                quick=small,
                ops=words.op_names(op),
                seq_lens=lengths,
                heads=pairs,
                head_dims=dims,
                dtypes=words.one_of("--dtype", dtype, words.DTYPES),
                regimes=cast("Sequence[Regime] | None", words.one_of("--regime", regime, ("inference", "training"))),
                launches=cast("Sequence[Launch] | None", words.one_of("--launch", launch, ("eager", "graph"))),
                batch=batch,
            )
        _say_other_lengths(lengths, buckets)
    if objective not in ("time", "memory"):
        raise MisuseError(f"--objective must be time or memory, got {objective!r}")
    words.seconds("--budget", budget)
    words.seconds("--timeout", timeout)
    if max_memory is not None and not 0 < max_memory < math.inf:
        raise MisuseError(f"--max-memory must be MiB above 0, got {max_memory:g}")
    request = TuneRequest(
        buckets,
        device=target,
        quick=small,
        backends=racing,
        objective=cast(Literal["time", "memory"], objective),
        max_memory_mib=max_memory,
        budget_s=budget,
        timeout_s=timeout,
        output=output,
        force=force,
        doubtful=doubtful,
        heads=pairs[0][1] if pairs is not None and len(pairs) == 1 else None,
        heads_by_bucket={} if recorded is None else recorded.heads,
    )
    if limit is not None and (limit < 1 or not assess):
        raise MisuseError(f"--limit must be at least 1 and stand with --assess, got {limit}{'' if assess else ' without it'}")
    if assess:
        beside = [name for name, value in (("--force", force), ("--dry-run", dry_run)) if value]
        if beside:
            raise MisuseError(f"--assess tunes into files of its own; leave out {', '.join(beside)}")
        cheapest_first = request if recorded is None else replace(request, buckets=buckets[::-1])
        run_assessment(cheapest_first, machine, budget, limit, as_json)
        return
    if dry_run and ranks.launched_rank():
        return  # rank 0 shows it
    if dry_run:
        _show_dry_run(request, machine, as_json, from_file)
        return
    typed = [] if from_file is None else ["--from", str(from_file)]
    typed += [word for name, given in {**grid, "--backend": backend}.items() if isinstance(given, list) for value in given for word in (name, value)]
    typed += ["--doubtful"] if doubtful else []
    typed += ["--batch", str(batch)] if batch is not None else []
    typed += ["--timeout", f"{timeout:g}"] if timeout != TIMEOUT_S else []
    typed += [] if quick is None else ["--quick" if quick else "--full"]
    typed += ["--objective", objective] if objective != "time" else []
    typed += ["--max-memory", f"{max_memory:g}"] if max_memory is not None else []
    typed += ["--output", str(output)] if output is not None else []
    typed += ["--device", device] if device is not None else []
    whole = None if doubtful else recorded  # what the doubtful rows alone cover says nothing of the recording
    _Session(request, machine, shlex.join(["titans-backends", "tune", *typed]), as_json, whole, from_file).run()


def _say_other_lengths(asked: Sequence[int] | None, buckets: Sequence[Bucket]) -> None:
    """An op that cannot have a length that was asked for is told with what it is measured at instead."""
    for name, made in CONTRACTS.items():
        most = made.max_tokens
        planned = sorted({bucket.seq_len for bucket in buckets if bucket.op == name})
        beyond = [length for length in asked or () if most is not None and length > most]
        if planned and beyond:
            told = f"{name} takes 1 to {most} tokens: it is measured at {', '.join(map(str, planned))}, not at {', '.join(map(str, beyond))}"
            say(status_console(), told, "yellow")


def _backends(given: list[str] | None) -> tuple[str, ...] | None:
    found = words.names(given)
    for name in found or ():
        registry.get(name)
    return None if found is None else tuple(found)


def _path(request: TuneRequest, machine: Machine) -> Path:
    return request.output if request.output is not None else user_cache_path(machine.slug)


def _show_dry_run(request: TuneRequest, machine: Machine, as_json: bool, from_file: Path | None) -> None:
    racing = request.backends or tuple(b.name for b in registry.known().values() if b.quick or not request.quick)
    if as_json:
        print_json(plan_json(request, machine, racing))
        return
    out = console()
    if request.doubtful and not request.buckets:
        say(out, _no_doubt(_path(request, machine), from_file))
        return
    show_plan(out, request, machine, racing)
    say(out, f"\n{units.amount(len(request.buckets), 'bucket')} would be measured on {machine.name}, and written to {_path(request, machine)}")


@dataclass(frozen=True, slots=True)
class _Session:
    """One tune from the first line to the exit status; `again` is the command that goes on with it."""

    request: TuneRequest
    machine: Machine
    again: str
    as_json: bool
    recorded: Recorded | None = None
    from_file: Path | None = None

    def run(self) -> None:
        """Raises typer.Exit for every status but 0."""
        with ranks.launched() as together:
            if together is not None and together.rank:
                ranks.tune(self.request, ranks=together, keep=True)
                return
            report = self._measured(together)
        if report.nothing_to_do:
            self._nothing(report)
            return
        self._show(report)
        self._ended(status_console() if self.as_json else console(), report)
        if not report.complete:
            raise typer.Exit(exit_codes.FALLS_SHORT)

    def _measured(self, together: ranks.Ranks | None) -> TuneReport:
        """The tune itself, shown while it runs; with other ranks they receive what it finds."""
        err = status_console()
        self._announce(err)
        if together is not None:
            say(err, f"{together.size} ranks: rank 0 measures, the others receive", "dim")
        try:
            with showing(err) as on_event:
                if together is None:
                    return run_tune(self.request, on_event)
                report = ranks.tune(self.request, on_event, ranks=together, keep=True)
                assert report is not None  # rank 0 has one
                return report
        except TuneInterrupted as stop:
            self._show(stop.report)
            self._interrupted(err, stop.report)
            raise typer.Exit(exit_codes.INTERRUPTED) from stop

    def _announce(self, err: Console) -> None:
        grid = "recorded, the most expensive first" if self.recorded is not None else "quick grid" if self.request.quick else "full grid"
        among = f" of {self.from_file}" if self.from_file is not None else ""
        grid = f"in doubt{among}, the most doubtful first" if self.request.doubtful else grid
        say(
            err,
            f"{self.machine.name}: {units.amount(len(self.request.buckets), 'bucket')} planned ({grid}), into {_path(self.request, self.machine)}",
            "dim",
        )
        for said in self.recorded.left_out if self.recorded is not None else ():
            say(err, f"left out: {said}", "yellow")
        for name in self.request.backends or ():
            verdict = registry.availability(registry.get(name), self.machine)
            if not verdict:
                say(err, f"{name} does not race: {verdict}", "yellow")

    def _nothing(self, report: TuneReport) -> None:
        if self.as_json:
            self._print(report, report.rows)
            say(status_console(), NOTHING)
            return
        out = console()
        self._show_coverage(report)
        say(out, NOTHING)
        if self.request.doubtful and not report.rows:
            say(out, _no_doubt(report.path, self.from_file))
            return
        current = units.amount(len(report.rows), "bucket is", "buckets are")
        say(out, f"all {current} current in {report.path}" if len(report.rows) != 1 else f"the bucket is current in {report.path}")
        facts(out, [("see them", f"titans-backends cache show{_file(self.request)}"), ("measure again", f"{self.again} --force")])

    def _show(self, report: TuneReport) -> None:
        shown = [row for row in report.rows if row.entry is not None or row.reason]
        if self.as_json:
            self._print(report, shown)
        elif shown:
            out = console()
            out.print()
            show_rows(out, shown)
            out.print()
            self._show_coverage(report)

    def _print(self, report: TuneReport, rows: Sequence[Row]) -> None:
        """The rows; of a recording with what they cover."""
        told = rows_json(rows)
        print_json(told if self.recorded is None else {"rows": told, "coverage": coverage_json(self.recorded.covered(report))})

    def _show_coverage(self, report: TuneReport) -> None:
        if self.recorded is not None:
            show_coverage(console(), self.recorded.covered(report))
            console().print()

    def _ended(self, to: Console, report: TuneReport) -> None:
        measured = sum(row.measured for row in report.rows)
        rows = any(row.entry is not None for row in report.rows)
        say(to, f"measured {units.amount(measured, 'bucket')} in {units.seconds(report.seconds)}; {'the winners are in' if rows else 'nothing won'}")
        if rows:
            command(to, str(report.path))
        without = [row for row in report.rows if row.entry is None and row.bucket not in report.remaining]
        if without:
            slow = any("no answer within" in row.reason for row in without)
            what = f"the same with --force and a --timeout above {self.request.timeout_s:g}" if slow else "titans-backends doctor"
            say(to, Text(f"{units.amount(len(without), 'bucket')} without a winner; the table says why. What to do: {what}", "yellow"))
        if report.remaining:
            say(to, Text(f"the budget ended with {units.amount(len(report.remaining), 'bucket')} left. Go on with:", "yellow"))
            command(to, self.again + self._budget())
            return
        if not rows:
            return
        op = report.rows[0].bucket.op if report.rows else "gated_delta_rule"
        steps = [("see it again", f"titans-backends cache show{_file(self.request)}"), ("ask why", f"titans-backends explain {op}")]
        if self.request.output is not None:
            steps.append(("use it", f"TITANS_BACKENDS_CACHE={shlex.quote(str(self.request.output))}"))
        facts(to, steps)

    def _interrupted(self, err: Console, report: TuneReport) -> None:
        kept = sum(row.entry is not None for row in report.rows)
        say(err, f"interrupted: {kept} of {units.amount(len(self.request.buckets), 'bucket')} have a row in {report.path}, and are kept. Go on with:")
        command(err, self.again + self._budget())

    def _budget(self) -> str:
        return f" --budget {self.request.budget_s:g}" if self.request.budget_s is not None else ""


def _no_doubt(path: Path, among: Path | None) -> str:
    of_them = f" that {among} asks for" if among is not None else ""
    return f"no row of {path}{of_them} is in doubt: nobody may save more than 5 % of a winner's time"


def _file(request: TuneRequest) -> str:
    return f" {shlex.quote(str(request.output))}" if request.output is not None else ""
