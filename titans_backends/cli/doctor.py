"""`doctor`: what this machine is, which backends work on it, which switches and cache files are in force, and what to do about what is wrong."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.text import Text

from titans_backends import __version__, switches
from titans_backends.cli import exit_codes, words
from titans_backends.cli.backend_check import BackendReport, check_backends, traceback_of
from titans_backends.cli.cache_check import CacheReport, check_caches
from titans_backends.cli.show import Column, Group, Json, command, console, facts, heading, print_json, say, status_console, table
from titans_backends.machine import Machine, detect

__all__ = ["doctor"]

_PACKAGES = ("triton", "cupy-cuda12x", "cupy-cuda13x", "numba", "numba-cuda")
_STYLES = {"usable": "green", "importable": "yellow", "refused": "dim", "broken": "red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to know: a note, something that falls short, or something without which nothing works; and what to type."""

    level: Literal["note", "falls short", "broken"]
    text: str
    command: str = ""


def doctor(
    device: Annotated[str | None, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1.", show_default="the first GPU, else cpu")] = None,
    run: Annotated[bool, typer.Option("--run/--no-run", help="Run each backend's smallest cases in a child process.")] = True,
    traceback: Annotated[
        str | None, typer.Option(metavar="BACKEND", help="Show the traceback of a broken backend, and no more.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """Look at this machine: its facts, every backend with its reasons, switches, cache files, and what to type next.

    Exit status: 0 fine, 1 something falls short, 2 nothing can run.
    """
    switches.current()
    target = words.device_named(device)
    machine = detect(target)
    if traceback is not None:
        _show_traceback(traceback, machine)
        return
    err = status_console()
    if run and err.is_terminal:
        with err.status("running each backend's smallest cases"):
            backends = list(check_backends(target, run=True))
    else:
        backends = list(check_backends(target, run=run))
    caches = list(check_caches(machine))
    findings = find(backends, caches)
    if as_json:
        print_json(_json(machine, backends, caches, findings))
    else:
        _show(console(), machine, backends, caches, findings)
    worst = {finding.level for finding in findings}
    if "broken" in worst:
        raise typer.Exit(exit_codes.MISUSED)
    if "falls short" in worst:
        raise typer.Exit(exit_codes.FALLS_SHORT)


def find(backends: Sequence[BackendReport], caches: Sequence[CacheReport]) -> list[Finding]:
    """What follows from the reports; a backend that refuses is no fault."""
    found = []
    if not any(one.state in ("usable", "importable") for one in backends):
        found.append(Finding("broken", "no backend is usable: every call raises", "pip install --force-reinstall titans-backends"))
    for one in backends:
        if one.state == "broken":
            found.append(Finding("falls short", f"backend {one.name} is broken: {one.reason}", f"titans-backends doctor --traceback {one.name}"))
        if one.install:
            found.append(Finding("note", f"backend {one.name} would need a package", one.install))
    for cache in caches:
        found += _cache_findings(cache)
    return found


def _cache_findings(cache: CacheReport) -> list[Finding]:
    found = []
    if cache.problem:
        found.append(Finding("falls short", f"{cache.path}: {cache.problem}", "titans-backends tune"))
    if cache.world_writable:
        text = f"anybody on this machine can change {cache.path}, and with it which kernels run"
        folder = f" {cache.path.parent}" if cache.kind == "user cache" else ""  # a folder of ours; another's may be shared on purpose
        found.append(Finding("falls short", text, f"chmod o-w {cache.path}{folder}"))
    if cache.damaged:
        found.append(Finding("note", f"damaged files were set aside: {', '.join(map(str, cache.damaged))}", "titans-backends cache reset --damaged"))
    if cache.kind == "user cache" and not cache.exists:
        found.append(Finding("note", "this machine is not tuned: the manifests' ranks decide", "titans-backends tune"))
    if cache.kind == "user cache" and cache.exists and not cache.writable:
        found.append(Finding("note", f"{cache.path} is read-only: it is used, and tune cannot renew it", "titans-backends tune --output OTHER.yaml"))
    return found + [Finding("note", str(one), one.command) for one in cache.renewals]


def _show_traceback(name: str, machine: Machine) -> None:
    trace = traceback_of(name, machine)
    if not trace:
        say(console(), f"backend {name} has no traceback: it is not broken in this process; see: titans-backends doctor")
        return
    typer.echo(trace.rstrip())
    raise typer.Exit(exit_codes.FALLS_SHORT)


def _machine_facts(machine: Machine) -> list[tuple[str, str]]:
    facts_found = [("device", f"{machine.name} ({machine.kind})"), ("slug", machine.slug)]
    if machine.threads is not None:
        facts_found.append(("threads", f"{machine.threads} of {os.cpu_count()} cores, {machine.isa}"))
    if machine.sm is not None:
        facts_found.append(("compute", f"sm_{machine.sm}, {machine.sms} multiprocessors"))
    return [*facts_found, ("system", f"{platform.system()} {platform.release()} {platform.machine()}")]


def _versions() -> dict[str, str]:
    found = {"titans_backends": __version__, "python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _switches() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(switches.PREFIX) and value}


def _show(out: Console, machine: Machine, backends: Sequence[BackendReport], caches: Sequence[CacheReport], findings: Sequence[Finding]) -> None:
    say(out, Text("machine", "bold"))
    facts(out, [*_machine_facts(machine), ("versions", ", ".join(f"{name} {version}" for name, version in _versions().items()))])
    heading(out, "backends")
    columns = (Column("  name"), Column("status"), Column("ops right", "right"), Column("", flexible=True))
    table(out, columns, [Group("", [_backend_cells(one) for one in backends])])
    if _switches():
        heading(out, "switches")
        facts(out, [(name, f"{value}  ({switches.SWITCHES[name.removeprefix(switches.PREFIX)]})") for name, value in _switches().items()])
    heading(out, "tables, in the order in which they are asked")
    facts(out, [(cache.kind, Text.assemble(cache.described, "\n", (str(cache.path), "dim"))) for cache in caches])
    heading(out, "what to do")
    if not findings:
        say(out, Text("  nothing: all is well", "green"))
    for finding in findings:
        style = {"note": "", "falls short": "yellow", "broken": "bold red"}[finding.level]
        facts(out, [(finding.level, Text(finding.text, style))])
        if finding.command:
            command(out, finding.command, indent=len(finding.level) + 4)


def _backend_cells(one: BackendReport) -> list[str | Text]:
    tried = f"{len(one.right)} of {len(one.ops)}" if one.right else ""
    origin = f" ({one.origin})" if one.origin != "built in" else ""
    return [f"  {one.name}", Text(one.state, _STYLES[one.state]), tried, (one.reason or one.summary) + origin]


def _json(machine: Machine, backends: Sequence[BackendReport], caches: Sequence[CacheReport], findings: Sequence[Finding]) -> dict[str, Json]:
    return {
        "machine": asdict(machine),
        "versions": _versions(),
        "backends": [asdict(one) for one in backends],
        "switches": _switches(),
        "tables": [
            {
                **{name: value for name, value in asdict(cache).items() if name not in ("path", "damaged")},
                "path": str(cache.path),
                "damaged": [str(path) for path in cache.damaged],
            }
            for cache in caches
        ],
        "findings": [asdict(finding) for finding in findings],
    }
