"""`report`: what the tuned tables say, as one page, as pictures, or as a table here. What it shows is `titans_backends.reporting`'s to decide."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer

from titans_backends.cache.writing import try_writing
from titans_backends.cli import words
from titans_backends.cli.failures import MisuseError
from titans_backends.cli.report_rows import report_json, show_report
from titans_backends.cli.row_state import row_state, tune_command
from titans_backends.cli.show import command, console, print_json, say, status_console
from titans_backends.machine import detect
from titans_backends.precision import float32_precision
from titans_backends.reporting.facts import Ceilings, Facts
from titans_backends.reporting.gather import Edge, gather
from titans_backends.tuning import ceilings as now

__all__ = ["report"]

RESULTS = Path("benchmarks") / "results"
"""Where a checkout keeps benchmark results, from its root."""


def report(
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the page: report.html.", show_default=False)] = None,
    pictures: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the page's charts as SVG and PNG.", show_default=False)] = None,
    results: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Benchmark results: timings, ceilings.", show_default="benchmarks/results, where it is")
    ] = None,
    op: Annotated[list[str] | None, typer.Option(metavar="OP", help="Only these ops.", show_default="all")] = None,
    ceilings: Annotated[bool, typer.Option("--ceilings", help="Measure now what this machine can do at best, for the floors of its rows.")] = False,
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="Which is this machine: cpu, cuda.", show_default="the first GPU, else cpu")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Every row as JSON on stdout.")] = False,
) -> None:
    """Show what the tuned tables say: who wins where and by how much, share of the floor, what tuning bought, what to renew.

    Reads the shipped tables, the user's cache and benchmark results; changes none of them, and runs no kernel.
    """
    target = words.device_named(device)
    ops = words.op_names(op)
    if results is not None and not results.is_dir():
        raise MisuseError(f"--results must be a folder of benchmark results, and {results} is {'a file' if results.exists() else 'not there'}")
    for option, needed in (("--output", ("jinja2", "matplotlib")), ("--pictures", ("matplotlib",))):
        if {"--output": output, "--pictures": pictures}[option] is not None:
            _require(option, needed)
    _expect_writable(output, pictures)
    folder = results if results is not None else RESULTS if RESULTS.is_dir() else None
    err = status_console()
    measured = _measured(target) if ceilings else None
    with err.status("reading tables, asking backends"):
        facts = gather(Edge(detect(target), row_state, lambda bucket: tune_command(bucket, [bucket.seq_len]), folder, ops, measured))
    if output is not None:
        with err.status("drawing"):
            _write_page(facts, output)
        say(err, f"wrote {output}")
    if pictures is not None:
        with err.status("drawing"):
            written = _write_pictures(facts, pictures)
        say(err, f"wrote {len(written)} pictures into {pictures}")
    if as_json:
        print_json(report_json(facts))
        return
    out = console()
    show_report(out, facts)
    if output is None and pictures is None:
        out.print()
        say(out, "the charts, every candidate and how each figure comes about:")
        command(out, "titans-backends report --output report.html")


def _require(option: str, packages: Sequence[str]) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise MisuseError(f"{option} needs {' and '.join(missing)}, not installed here: pip install 'titans-backends[report]'")


def _expect_writable(output: Path | None, pictures: Path | None) -> None:
    """MisuseError for a place that cannot be written, before anything is read or drawn."""
    if output is not None and not (allowed := try_writing(output)):
        raise MisuseError(f"--output {output} cannot be written: {allowed}; name another file: --output report.html")
    if output is not None and _is_stdout(output):
        raise MisuseError(
            f"--output {output} is the file that stdout goes to, and what is printed would overwrite the page; name another: --output report.html"
        )
    if pictures is None:
        return
    if pictures.exists() and not pictures.is_dir():
        raise MisuseError(f"--pictures wants a folder, and {pictures} is a file; name another: --pictures pictures")
    if not (allowed := try_writing(pictures / "picture.svg")):
        raise MisuseError(f"--pictures {pictures} cannot be written: {allowed}; name another folder: --pictures pictures")


def _is_stdout(path: Path) -> bool:
    """Whether the shell opened this file for what is printed."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError, AttributeError):  # no such file yet; or a stdout that is no file
        return False


def _write_page(facts: Facts, path: Path) -> None:
    from titans_backends.reporting.page import page
    from titans_backends.reporting.view import page_view

    text = page(page_view(facts))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MisuseError(f"--output {path} cannot be written: {error.strerror or error}") from error


def _write_pictures(facts: Facts, folder: Path) -> list[Path]:
    from titans_backends.reporting.pictures import write_pictures

    try:
        return write_pictures(facts, folder)
    except OSError as error:
        raise MisuseError(f"--pictures {folder} cannot be written: {error.strerror or error}") from error


def _measured(device: str) -> Ceilings:
    """This machine's ceilings, as `bench` measures them; in float32 at torch's present precision."""
    kinds = {"fp32" if float32_precision(device != "cpu") == "highest" else "tf32": torch.float32}
    if torch.device(device).type != "cpu":
        kinds["bf16"] = torch.bfloat16
    found = {kind: now.measure(device, dtype) for kind, dtype in kinds.items()}
    rates = {kind: one.flop_per_s for kind, one in found.items()}
    return Ceilings({"copy": max(one.bytes_per_s for one in found.values()), **rates}, ())
