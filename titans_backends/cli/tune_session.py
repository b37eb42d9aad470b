"""One tune from its first line to its exit status: what is said before, while it runs and after. Decides what to say, never what wins."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from titans_backends import registry
from titans_backends.cache.paths import user_cache_path
from titans_backends.cli import exit_codes
from titans_backends.cli.plan_rows import plan_json, show_plan
from titans_backends.cli.progress import showing
from titans_backends.cli.show import command, console, facts, print_json, say, status_console
from titans_backends.cli.tune_from import Recorded, coverage_json, show_coverage
from titans_backends.cli.tune_rows import rows_json, show_rows
from titans_backends.machine import Machine
from titans_backends.reporting import numbers
from titans_backends.tuning import ranks
from titans_backends.tuning.midpoints import midpoints
from titans_backends.tuning.report import Row, TuneInterrupted, TuneReport
from titans_backends.tuning.request import TuneRequest
from titans_backends.tuning.run import tune as run_tune

__all__ = ["TuneSession", "show_dry_run"]

NOTHING = "nothing to do"


@dataclass(frozen=True, slots=True)
class TuneSession:
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
            f"{self.machine.name}: {numbers.amount(len(self.request.buckets), 'bucket')} planned ({grid}), into {_path(self.request, self.machine)}",
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
        current = numbers.amount(len(report.rows), "bucket is", "buckets are")
        say(out, f"all {current} current in {report.path}" if len(report.rows) != 1 else f"the bucket is current in {report.path}")
        facts(out, [("see them", f"titans-backends cache show{_file(self.request)}"), ("measure again", f"{self.again} --force")])

    def _show(self, report: TuneReport) -> None:
        shown = [row for row in (*report.rows, *report.midpoints) if row.entry is not None or row.reason]
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
        if self.recorded is None:
            print_json(told)
            return
        between = {"measured": len(report.midpoints), "left": len(report.unrefined)}
        print_json({"rows": told, "coverage": coverage_json(self.recorded.covered(report)), "midpoints": between})

    def _show_coverage(self, report: TuneReport) -> None:
        if self.recorded is not None:
            show_coverage(console(), self.recorded.covered(report))
            console().print()

    def _ended(self, to: Console, report: TuneReport) -> None:
        measured, between = sum(row.measured for row in report.rows), len(report.midpoints)
        rows = any(row.entry is not None for row in report.rows)
        what = numbers.amount(measured, "bucket") + (f" and {numbers.amount(between, 'midpoint')}" if between else "")
        say(to, f"measured {what} in {numbers.seconds(report.seconds)}; {'the winners are in' if rows else 'nothing won'}")
        if rows:
            command(to, str(report.path))
        without = [row for row in report.rows if row.entry is None and row.bucket not in report.remaining]
        if without:
            slow = any("no answer within" in row.reason for row in without)
            what = f"the same with --force and a --timeout above {self.request.timeout_s:g}" if slow else "titans-backends doctor"
            say(to, Text(f"{numbers.amount(len(without), 'bucket')} without a winner; the table says why. What to do: {what}", "yellow"))
        if report.remaining:
            say(to, Text(f"the budget ended with {numbers.amount(len(report.remaining), 'bucket')} left. Go on with:", "yellow"))
            self._go_on(to)
            return
        if report.unrefined:
            say(to, Text(f"the budget ended with {numbers.amount(len(report.unrefined), 'midpoint')} left. Go on with:", "yellow"))
            self._go_on(to)
        if not rows:
            return
        op = report.rows[0].bucket.op if report.rows else "gated_delta_rule"
        steps = [("see it again", f"titans-backends cache show{_file(self.request)}"), ("ask why", f"titans-backends explain {op}")]
        if self.request.output is not None:
            steps.append(("use it", f"TITANS_BACKENDS_CACHE={shlex.quote(str(self.request.output))}"))
        facts(to, steps)

    def _interrupted(self, err: Console, report: TuneReport) -> None:
        kept = sum(row.entry is not None for row in report.rows)
        say(
            err,
            f"interrupted: {kept} of {numbers.amount(len(self.request.buckets), 'bucket')} have a row in {report.path}, and are kept. Go on with:",
        )
        self._go_on(err)

    def _go_on(self, to: Console) -> None:
        command(to, self.again + (f" --budget {self.request.budget_s:g}" if self.request.budget_s is not None else ""))
        if self.request.force:
            say(to, "it measures what is not current; with --force it begins with the first bucket again")


def show_dry_run(request: TuneRequest, machine: Machine, as_json: bool, from_file: Path | None = None) -> None:
    """What would be measured, by whom, and where it would be written."""
    racing = request.backends or tuple(b.name for b in registry.known().values() if b.quick or not request.quick)
    if as_json:
        print_json(plan_json(request, machine, racing))
        return
    out = console()
    if request.doubtful and not request.buckets:
        say(out, _no_doubt(_path(request, machine), from_file))
        return
    show_plan(out, request, machine, racing)
    say(out, f"\n{numbers.amount(len(request.buckets), 'bucket')} would be measured on {machine.name}, and written to {_path(request, machine)}")
    most = len(midpoints(request.buckets)) if request.midpoints and not request.doubtful else 0
    if most:
        said = f"then up to {numbers.amount(most, 'midpoint')}, where neighbouring lengths choose differently: their two choices alone"
        say(out, f"{said} (--no-midpoints leaves them out)")


def _path(request: TuneRequest, machine: Machine) -> Path:
    return request.output if request.output is not None else user_cache_path(machine.slug)


def _no_doubt(path: Path, among: Path | None) -> str:
    of_them = f" that {among} asks for" if among is not None else ""
    return f"no row of {path}{of_them} is in doubt: nobody may save more than 5 % of a winner's time"


def _file(request: TuneRequest) -> str:
    return f" {shlex.quote(str(request.output))}" if request.output is not None else ""
