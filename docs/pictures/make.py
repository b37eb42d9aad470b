"""Draws the README's picture: the table that `tune` ends with, from this machine's cache, as it looks in a terminal.

    titans-backends tune && python docs/pictures/make.py [--op NAME ...]

It measures nothing: a bucket that is not tuned is an error that says what to type. Writes docs/pictures/tune.svg.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

import titans_backends as tb
from titans_backends.buckets import field
from titans_backends.cli.tune_rows import show_rows
from titans_backends.tuning.plan import plan
from titans_backends.tuning.run import TuneRequest, tune

PICTURE = Path(__file__).with_name("tune.svg")


def main() -> int:
    """Draws the rows of some ops, by default the ones that the README talks about."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help="an op to show; may be repeated")
    options = parser.parse_args()
    machine = tb.detect()
    buckets = plan(machine.kind, ops=options.op or ["gated_delta_rule", "dual_core", "slow_core"])
    settled = tune(TuneRequest(buckets, budget_s=1e-9))  # no time to measure: what is current comes back, nothing else
    rows = [row for row in settled.rows if row.entry is not None and field(row.bucket, "regime") == "inference"]
    if not rows:
        print("error: nothing is tuned here yet; type: titans-backends tune", file=sys.stderr)
        return 1
    console = Console(record=True, width=140, file=io.StringIO(), force_terminal=True)
    console.print("[bold]$ titans-backends tune[/bold]")
    show_rows(console, rows)
    PICTURE.write_text(
        console.export_svg(
            title=machine.name + (f", {machine.threads} thread{'s' * (machine.threads > 1)}" if machine.threads else ""), theme=MONOKAI
        ),
        encoding="utf-8",
    )
    print(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
