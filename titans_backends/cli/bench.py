"""`bench`: what dispatch chooses, the untuned default and the plain reference, side by side; each is checked before it is timed.

Nothing is written: what is measured here changes no choice.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from titans_backends.backend import Candidate
from titans_backends.buckets import Bucket, bucket_of
from titans_backends.cli import exit_codes, units, words
from titans_backends.cli.asked_call import AskedCall, optional_tensors, sized
from titans_backends.cli.failures import MisuseError
from titans_backends.cli.keys import key_json, key_title
from titans_backends.cli.show import Column, Group, Json, console, print_json, say, status_console, table
from titans_backends.contracts import contract
from titans_backends.contracts.contract import Work
from titans_backends.dispatch import choose
from titans_backends.machine import detect
from titans_backends.offers import Pair, first_pair, offers
from titans_backends.plans import request
from titans_backends.tuning.ceilings import Ceilings, measure
from titans_backends.tuning.select import combined
from titans_backends.tuning.session import Session
from titans_backends.tuning.timing import RaceRules, Withdrawn, race

__all__ = ["bench"]

_REFERENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class Timed:
    """One line of the table. `problem`: why it has no time."""

    bucket: Bucket
    what: str
    label: str
    us: float | None
    spread: float | None
    peak_mib: float | None
    floor_us: float | None
    problem: str = ""
    wrong: bool = False


def bench(
    op: Annotated[list[str], typer.Argument(help="Ops; see: titans-backends ops")],
    seq_len: Annotated[list[str] | None, typer.Option(metavar="N", help="Tokens of each sequence: 512,2048.", show_default="512; decode 1")] = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Sequences.")] = 1,
    heads: Annotated[str, typer.Option(metavar="QK/V", help="Heads of q and k / of v: 16/32, or 16.")] = "16",
    head_dim: Annotated[str, typer.Option(metavar="K[xV]", help="128, or 128x64 for K = 128 and V = 64.")] = "128",
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="float32, float64, bfloat16, float16.")] = "float32",
    regime: Annotated[str, typer.Option(metavar="REGIME", help="inference or training.")] = "inference",
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="An option in the op's key: chunk_size=64.", show_default=False)
    ] = None,
    backend: Annotated[str | None, typer.Option(metavar="NAME", help="As if this backend were forced.", show_default=False)] = None,
    budget: Annotated[float, typer.Option(metavar="SECONDS", help="For the rounds of one call.")] = 2.0,
    device: Annotated[str | None, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1.", show_default="the first GPU, else cpu")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The table's rows as JSON on stdout.")] = False,
) -> None:
    """Time what dispatch chooses against the untuned default and the plain reference, in this process, from cold caches.

    Outputs (in training gradients too) are compared with the float64 reference first.
    The floor is the work that the contract counts, at the speed that this machine multiplies and copies; in training it is not known.
    Exit status: 0 when everything was right, 1 when a kernel was wrong or every backend refuses.
    """
    target = words.device_named(device)
    given = words.integers("--seq-len", seq_len)
    lengths: list[int | None] = [None] if given is None else [*given]
    asked = [_asked(name, length, batch, heads, head_dim, dtype, regime, option, target) for name in op for length in lengths]
    ceilings = measure(target, words.dtype_named(dtype))
    err = status_console()
    rows: list[Timed] = []
    for call in asked:
        say(err, f"{call.op.name}  {call.described}", "dim")
        rows += _timed(call, backend, ceilings, budget)
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


def _timed(asked: AskedCall, backend: str | None, ceilings: Ceilings, budget_s: float) -> list[Timed]:
    signature, machine = asked.signature(), detect(asked.device)
    forced = request(backend, training=asked.training).forced
    chosen = choose(signature, machine, forced)
    default = first_pair(offers(signature, machine), signature)
    runners = {chosen.pair: "chosen"}
    if default is not None:
        runners.setdefault(default, "default")
    bucket = bucket_of(signature)
    session = Session(bucket, asked.device, asked.case.H)
    floor_us = None if asked.training else _floor(asked.work(), ceilings)
    checked = {candidate: session.check(candidate, _saver(runners)) for pair in runners for candidate in _members(pair)}
    fine = [candidate for candidate, found in checked.items() if found.result.ok]

    def sample(candidate: Candidate) -> float:
        try:
            return session.sample(candidate, _saver(runners))
        except RuntimeError as error:
            raise Withdrawn(str(error)) from error

    outcome = race(fine, sample, time.monotonic, RaceRules(budget_s=budget_s, drop_factor=float("inf")))
    found = []
    for pair, what in runners.items():
        problems = [f"{c.label}: {checked[c].result.reason or outcome.withdrawn.get(c, '')}" for c in _members(pair) if c not in outcome.timings]
        if problems:
            found.append(Timed(bucket, what, pair.label, None, None, None, floor_us, "; ".join(problems), wrong=True))
            continue
        us, spread = combined([(outcome.timings[c].us, outcome.timings[c].spread) for c in _members(pair)])
        peak = max((checked[c].peak_mib or 0.0 for c in _members(pair)), default=0.0)
        found.append(Timed(bucket, what, pair.label, us, spread, peak, floor_us))
    if default == chosen.pair:
        found.append(Timed(bucket, "default", found[0].label, found[0].us, found[0].spread, found[0].peak_mib, floor_us, found[0].problem))
    reference_us = session.reference(_REFERENCE_S)
    problem = "" if reference_us is not None else f"it would take over {_REFERENCE_S:g} s"
    found.append(Timed(bucket, "reference", "the plain formula", reference_us, None, None, floor_us, problem))
    session.close()
    return found


def _members(pair: Pair) -> tuple[Candidate, ...]:
    return (pair.forward,) if pair.backward is None else (pair.forward, pair.backward)


def _saver(runners: dict[Pair, str]) -> Candidate | None:
    """A forward that saves the states that a backward may want."""
    return next((pair.forward for pair in runners if pair.forward.saves_states), None)


def _floor(work: Work, ceilings: Ceilings) -> float:
    return work.floor_us(ceilings.flop_per_s, ceilings.bytes_per_s)


def _row(row: Timed) -> dict[str, Json]:
    return {
        **key_json(row.bucket),
        "what": row.what,
        "candidate": row.label,
        "median_us": row.us,
        "spread": row.spread,
        "peak_mib": row.peak_mib,
        "floor_us": row.floor_us,
        "share_of_floor": row.floor_us / row.us if row.floor_us and row.us else None,
        "problem": row.problem,
    }


def _show(out: Console, rows: Sequence[Timed], ceilings: Ceilings) -> None:
    numbers = [Column(title, "right") for title in ("median", "±", "peak", "of floor", "gain")]
    groups = []
    for bucket in dict.fromkeys(row.bucket for row in rows):
        mine = [row for row in rows if row.bucket == bucket]
        title = Text.assemble(key_title(bucket), (f" · seq_len {bucket.seq_len}", "dim"))
        groups.append(Group(title, [_cells(row, mine[0].label, mine[-1].us) for row in mine]))
    table(out, [Column(""), Column("candidate", flexible=True), *numbers], groups)
    out.print()
    say(out, Text(f"gain: over the reference; of floor: the share of what this machine could reach, at {ceilings}", "dim"))


def _cells(row: Timed, chosen: str, reference_us: float | None) -> list[str | Text]:
    if row.what == "default" and row.label == chosen:
        return [row.what, Text("the same", "dim"), "", "", "", "", ""]
    if row.us is None:
        return [row.what, Text(f"{row.label}: {row.problem}", "red" if row.wrong else "dim"), "", "", "", "", ""]
    share = units.percent(row.floor_us / row.us) if row.floor_us else ""
    label = row.label.replace(" + ", "\n+ ", 1)
    spread = units.percent(row.spread) if row.spread is not None else ""
    return [row.what, label, units.time_us(row.us), spread, units.mib(row.peak_mib), share, units.gain(reference_us, row.us)]
