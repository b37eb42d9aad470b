"""`bench --grid`: a known set of problems, every backend in one run, written as JSON and CSV after each problem, with the machine's fingerprint."""

from __future__ import annotations

import csv
import functools
import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.text import Text

from titans_backends.buckets import Bucket
from titans_backends.buckets import field as key_field
from titans_backends.cache.writing import try_writing
from titans_backends.cli import exit_codes, words
from titans_backends.cli.failures import MisuseError
from titans_backends.cli.keys import by_key, key_json, key_title, place
from titans_backends.cli.show import Column, Group, Json, console, heading, print_json, say, status_console, table
from titans_backends.errors import BackendRefusedError
from titans_backends.machine import detect
from titans_backends.reporting import numbers
from titans_backends.tuning import ceilings
from titans_backends.tuning.benchmark import Timed, timed
from titans_backends.tuning.fingerprint import fingerprint
from titans_backends.tuning.grids import Cell, cells_of
from titans_backends.tuning.problem import signature_of_bucket
from titans_backends.verdict import refused

__all__ = ["run_grid"]

_RESULTS = Path("benchmarks") / "results"
_REFERENCE_S = 2.0
_COLUMNS = (
    *(
        "grid",
        "op",
        "regime",
        "launch",
        "dtype",
        "seq_len",
        "streams",
        "v_heads",
        "group",
        "K",
        "V",
        "key",
        "what",
        "candidate",
        "median_us",
        "spread",
    ),
    *("peak_mib", "floor_us", "share_of_floor", "compile_s", "error", "problem", "device", "titans_backends", "torch", "triton", "driver", "date"),
)


@dataclass(slots=True)
class _Results:
    """What has been timed so far."""

    grid: str
    device: str
    path: Path
    machine: dict[str, dict[str, str | int | float | None]]
    rows: list[tuple[Cell, Timed]] = field(default_factory=list)
    left: list[tuple[Bucket, str]] = field(default_factory=list)
    tops: dict[str, ceilings.Ceilings] = field(default_factory=dict)

    def json(self) -> dict[str, Json]:
        """Everything, as the JSON file holds it."""
        tops = {dtype: {"flop_per_s": top.flop_per_s, "bytes_per_s": top.bytes_per_s} for dtype, top in self.tops.items()}
        rows = [_row(cell, one) for cell, one in self.rows]
        left = [{**key_json(bucket), "reason": reason} for bucket, reason in self.left]
        return {**self.machine, "grid": self.grid, "measured_ceilings": tops, "rows": rows, "left": left}

    def csv(self) -> str:
        """One line per row, the machine in each."""
        out = io.StringIO()
        writer = csv.DictWriter(out, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        told = {"grid": self.grid, "device": self.machine["device"]["name"], **self.machine["environment"]}
        for cell, one in self.rows:
            writer.writerow({name: value for name, value in {**told, **_flat(cell, one)}.items() if name in _COLUMNS})
        return out.getvalue()

    def write(self) -> None:
        """Both files, whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.with_name(self.path.name + ".json").write_text(json.dumps(self.json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        self.path.with_name(self.path.name + ".csv").write_text(self.csv(), encoding="utf-8")


def run_grid(grid: str, device: str, budget_s: float, within_s: float | None, limit: int | None, output: Path | None, as_json: bool) -> None:
    """Times a grid, writes and shows it; raises typer.Exit where something was wrong or was not reached. Ctrl-C keeps what is done."""
    machine = detect(device)
    cells = cells_of(grid, machine.kind)
    words.seconds("--within", within_s)
    if limit is not None and limit < 1:
        raise MisuseError(f"--limit must be above 0, got {limit}")
    path = output if output is not None else (_RESULTS if _RESULTS.is_dir() else Path()) / f"bench_{grid}_{machine.slug}"
    path = path.parent / path.name.removesuffix(".json").removesuffix(".csv")
    for ending in (".json", ".csv"):
        allowed = try_writing(path.parent / f"{path.name}{ending}") if path.name else refused(f"{output} names no file")
        if not allowed:
            raise MisuseError(f"--output: the results could not be written: {allowed}; name another file: --output OTHER.json")
    results = _Results(grid, device, path, fingerprint(device))
    err, begun = status_console(), time.monotonic()
    say(err, f"{machine.name}: {numbers.amount(len(cells[:limit]), 'problem')} of the grid {grid}, into {path}.json and .csv", "dim")
    interrupted = False
    for number, cell in enumerate(cells[:limit]):
        late = within_s is not None and time.monotonic() - begun > within_s
        if late or interrupted:
            results.left.append((cell.bucket, "interrupted" if interrupted else f"{within_s:g} s were over"))
            continue
        say(err, f"[{number + 1}/{len(cells[:limit])}] {place(cell.bucket)}", "dim")
        try:
            _time(results, cell, budget_s)
        except KeyboardInterrupt:
            interrupted = True
            results.left.append((cell.bucket, "interrupted"))
        results.write()
    results.write()
    if as_json:
        print_json(results.json())
    else:
        _show(console(), results)
    if interrupted:
        raise typer.Exit(exit_codes.INTERRUPTED)
    if results.left or any(one.wrong for _, one in results.rows):
        raise typer.Exit(exit_codes.FALLS_SHORT)


def _time(results: _Results, cell: Cell, budget_s: float) -> None:
    """One problem; what cannot be timed at all is left, with its reason."""
    dtype = str(key_field(cell.bucket, "dtype"))
    if dtype not in results.tops:
        results.tops[dtype] = _ceilings(results.device, dtype)
    signature = signature_of_bucket(cell.bucket, results.device, cell.heads)
    try:
        found = timed(signature, cell.heads, results.tops[dtype], budget_s, backends=True, reference_s=_REFERENCE_S)
    except (BackendRefusedError, torch.OutOfMemoryError) as error:
        results.left.append((cell.bucket, f"{type(error).__name__}: {str(error).splitlines()[0]}"))
        return
    results.rows += [(cell, one) for one in found]


@functools.cache
def _ceilings(device: str, dtype: str) -> ceilings.Ceilings:
    return ceilings.measure(device, getattr(torch, dtype))


def _row(cell: Cell, one: Timed) -> dict[str, Json]:
    return {
        **key_json(one.bucket),
        "v_heads": cell.heads,
        "what": one.what,
        "candidate": one.label,
        "median_us": one.us,
        "spread": one.spread,
        "peak_mib": one.peak_mib,
        "floor_us": one.floor_us,
        "share_of_floor": one.share_of_floor,
        "compile_s": one.compile_s,
        "error": one.error if one.error is None or one.error < float("inf") else None,
        "problem": one.problem,
    }


def _flat(cell: Cell, one: Timed) -> dict[str, object]:
    """A row for the CSV: the fields of the key that have a column of their own, the rest as text."""
    own = {name: key_field(one.bucket, name) for name in ("regime", "launch", "dtype", "streams", "group")}
    sizes = key_field(one.bucket, "head_dim")
    k_dim, v_dim = sizes if isinstance(sizes, tuple) else (None, None)
    rest = [f"{name}={value}" for name, value in one.bucket.when if name not in (*own, "head_dim")]
    return {**own, **{k: v for k, v in _row(cell, one).items() if k != "when"}, "K": k_dim, "V": v_dim, "key": " ".join(rest)}


def _show(out: Console, results: _Results) -> None:
    figures = [Column(title, "right") for title in ("median", "±", "peak", "of floor", "compile", "error")]
    columns = [Column("seq_len", "right"), Column(""), Column("candidate", flexible=True), *figures]
    shown = [one for _, one in results.rows if not one.problem.startswith("refuses: ")]
    groups = [
        Group(key_title(first), [_cells(one, roles) for one, roles in _merged([one for _, one in found])])
        for first, found in by_key((one.bucket, one) for one in shown)
    ]
    table(out, columns, groups)
    refusals = dict.fromkeys((one.label, one.bucket.op, one.problem.removeprefix("refuses: ")) for _, one in results.rows if one not in shown)
    if refusals:
        heading(out, "refused")
        table(out, (Column("backend"), Column("op"), Column("reason", flexible=True)), [Group("", list(refusals))])
    out.print()
    for dtype, top in results.tops.items():
        say(out, f"of floor: the share of what this machine could reach in {dtype}, at {top}", "dim")
    for bucket, reason in results.left:
        say(out, Text(f"not timed: {place(bucket)}: {reason}", "yellow"))
    say(out, f"the figures are in {results.path}.json and .csv")


def _merged(rows: Sequence[Timed]) -> list[tuple[Timed, str]]:
    """The rows of one key, length by length, one candidate's once with everything that it is."""
    roles: dict[tuple[int, str], list[str]] = {}
    first: dict[tuple[int, str], Timed] = {}
    for one in rows:
        roles.setdefault((one.bucket.seq_len, one.label), []).append(one.what)
        first.setdefault((one.bucket.seq_len, one.label), one)
    return [(first[key], ", ".join(name for name in roles[key] if name != "backend")) for key in sorted(first, key=lambda key: key[0])]


def _cells(one: Timed, roles: str) -> list[str | Text]:
    length = str(one.bucket.seq_len)
    if one.us is None:
        return [length, roles, Text(f"{one.label}: {one.problem}", "red" if one.wrong else "dim"), "", "", "", "", "", ""]
    share = numbers.percent(one.share_of_floor) if one.share_of_floor else ""
    compiled = numbers.seconds(one.compile_s) if one.compile_s is not None else ""
    error = f"{one.error:.0e}" if one.error is not None else ""
    spread = numbers.percent(one.spread) if one.spread is not None else ""
    return [length, roles, one.label.replace(" + ", "\n+ ", 1), numbers.time_us(one.us), spread, numbers.mib(one.peak_mib), share, compiled, error]
