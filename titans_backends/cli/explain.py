"""`explain`: which kernel a call would run and why, without making the call. What is said is `titans_backends.explain`'s to decide."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, cast

import torch
import typer
from rich.console import Console
from rich.text import Text

from titans_backends import registry
from titans_backends.buckets import defaults_of
from titans_backends.cache.paths import timings_path
from titans_backends.cache.schema import Bucket, full_when
from titans_backends.cache.timings import Measurement
from titans_backends.cli import exit_codes, words
from titans_backends.cli.asked_call import AskedCall, optional_tensors, sized
from titans_backends.cli.failures import MisuseError
from titans_backends.cli.keys import key_text
from titans_backends.cli.show import Column, Group, command, console, facts, heading, print_json, say, table
from titans_backends.contracts import contract
from titans_backends.dispatch import Consulted
from titans_backends.explain import Explanation, explain_signature
from titans_backends.machine import detect
from titans_backends.offers import Offer, pairs
from titans_backends.reporting import numbers
from titans_backends.request import request
from titans_backends.signature import Launch
from titans_backends.tuning.plan import plan

__all__ = ["explain"]


def explain(
    op: Annotated[str, typer.Argument(help="The op; see: titans-backends ops")],
    seq_len: Annotated[int | None, typer.Option(metavar="N", help="Tokens of each sequence.", show_default="512; decode 1")] = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Sequences.")] = 1,
    heads: Annotated[str, typer.Option(metavar="QK/V", help="Heads of q and k / of v: 16/32, or 16.")] = "16",
    head_dim: Annotated[str, typer.Option(metavar="K[xV]", help="128, or 128x64 for K = 128 and V = 64.")] = "128",
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="float32, float64, bfloat16, float16.")] = "float32",
    regime: Annotated[str, typer.Option(metavar="REGIME", help="inference or training.")] = "inference",
    launch: Annotated[str, typer.Option(metavar="LAUNCH", help="eager, or graph: as captured (CUDA only).")] = "eager",
    option: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="An option of the op: chunk_size=64.", show_default=False)] = None,
    with_: Annotated[
        list[str] | None, typer.Option("--with", metavar="TENSOR", help="Optional tensors that are given; none for none.", show_default="as tuned")
    ] = None,
    packed: Annotated[bool, typer.Option("--packed", help="The sequences in one row, with cu_seqlens.")] = False,
    backend: Annotated[str | None, typer.Option(metavar="NAME", help="As if this backend were forced.", show_default=False)] = None,
    device: Annotated[str | None, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1.", show_default="the first GPU, else cpu")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """Say which kernel a call would run, and why: every backend's answer, every table asked, every timing known. Runs nothing.

    Exit status: 0 when something would run, 1 when everything refuses.
    """
    made = contract(op)
    if backend is not None:
        registry.get(backend)
    asked = sized(
        made, seq_len=seq_len, batch=batch, heads=heads, head_dim=head_dim, dtype=dtype, regime=regime, device=words.device_named(device),
        options=words.options_of(made, option), given=optional_tensors(made, with_), packed=packed,
    )  # fmt: skip
    if launch not in ("eager", "graph"):
        raise MisuseError(f"--launch must be eager or graph, got {launch!r}")
    if launch == "graph" and torch.device(asked.device).type != "cuda":
        raise MisuseError(f"--launch graph is for CUDA, and {asked.device} captures nothing; add --device cuda")
    wanted = request(backend, training=asked.training)
    found = explain_signature(replace(asked.signature(), launch=cast(Launch, launch)), detect(asked.device), wanted.forced, asked.work())
    if as_json:
        print_json(found.as_dict())
    else:
        _show(console(), asked, found)
    if found.choice is None:
        raise typer.Exit(exit_codes.FALLS_SHORT)


def _show(out: Console, asked: AskedCall, found: Explanation) -> None:
    say(out, Text.assemble((asked.op.name, "bold"), f"  {asked.described}"))
    runs = Text(found.kernel, "bold green") if found.choice else Text("nothing", "bold red")
    because = found.choice.reason if found.choice else found.refusal
    facts(
        out,
        [
            ("on", f"{found.machine.name} ({found.signature.device})"),
            ("runs", runs),
            ("because", because),
            ("stale", Text(found.stale, "yellow")),
            ("key", f"seq_len {found.bucket.seq_len} · {key_text(found.bucket)}"),
            ("work", f"{found.work.flop:.3g} FLOP, {found.work.bytes:.3g} bytes at least"),
        ],
    )
    heading(out, "backends")
    facts(out, [(offer.backend.name, _answer(offer, found)) for offer in found.offers])
    heading(out, "tables asked")
    if not found.consulted:
        say(out, "  none: the choice needed none")
    for consulted in found.consulted:
        _show_table(out, consulted)
    for source, measurements in found.timings:
        heading(out, f"timings in {timings_path(source.path)}")
        columns = (
            Column("candidate", flexible=True),
            Column("direction"),
            Column("median", "right"),
            Column("±", "right"),
            Column("note", flexible=True),
        )
        table(out, columns, [Group("", [_timing(one) for one in sorted(measurements, key=_by_time)])])
    if found.choice is not None and found.choice.origin in ("default", "neighbour"):
        out.print()
        _show_how_to_measure(out, asked, found)


def _show_how_to_measure(out: Console, asked: AskedCall, found: Explanation) -> None:
    """The command that measures this call's bucket; where `tune` has no words for it, how the call itself does."""
    planned = _planned(asked, found)
    if any(bucket.when == found.bucket.when for bucket in planned):
        say(out, "not tuned yet; measure it:")
        command(out, f"titans-backends tune {_tune_words(asked, found)}")
        return
    here = dict(full_when(found.bucket.when, defaults_of(asked.op.name)))
    told = []
    for bucket in planned:
        there = dict(full_when(bucket.when, defaults_of(asked.op.name)))
        told.append(", ".join(f"{name} {there[name]}, not {value}" for name, value in here.items() if there[name] != value))
    say(out, "not tuned yet, and `titans-backends tune` has no words for it" + (f" (it would measure {'; or '.join(told)})" if told else "") + ".")
    say(out, "Measure it where it is called:")
    command(out, f'with tb.autotune(): tb.get_op("{asked.op.name}")(...)')


def _planned(asked: AskedCall, found: Explanation) -> tuple[Bucket, ...]:
    """What that command would measure."""
    case = asked.case
    return plan(
        found.machine.kind, ops=[asked.op.name], seq_lens=[max(case.T, 1)], heads=[(case.G, case.H)], head_dims=[(case.K, case.V)],
        dtypes=[str(case.dtype).removeprefix("torch.")], regimes=[found.signature.regime], launches=[found.signature.launch], batch=max(case.B, 1),
    )  # fmt: skip


def _tune_words(asked: AskedCall, found: Explanation) -> str:
    """The command that measures this call's bucket, where `tune` has words for it."""
    case = asked.case
    heads = f"{case.G}/{case.H}" if case.G != case.H else str(case.H)
    head_dim = f"{case.K}x{case.V}" if case.K != case.V else str(case.K)
    told = f"--op {asked.op.name} --seq-lens {max(case.T, 1)} --heads {heads} --head-dim {head_dim} --dtype {str(case.dtype).removeprefix('torch.')}"
    launch = " --launch graph" if found.signature.launch == "graph" else ""
    return told + f" --regime {found.signature.regime}{launch}" + (f" --batch {case.B}" if case.B > 1 else "")


def _answer(offer: Offer, found: Explanation) -> Text:
    """One candidate a line, with its directions in training."""
    if not offer.verdict:
        return Text(f"refuses: {offer.verdict}", "dim")
    directions = {"forward": [c.label for c in offer.forward], "backward": [c.label for c in offer.backward]}
    told = []
    for label in dict.fromkeys([*directions["forward"], *directions["backward"]]):
        has = [name for name, labels in directions.items() if label in labels]
        told.append(label + (f" ({' and '.join(has)})" if found.signature.regime == "training" else ""))
    if not pairs([offer], found.signature, mixed=False):
        told.append("no forward and backward of its own fit together")
    return Text("\n".join(told))


def _show_table(out: Console, asked: Consulted) -> None:
    facts(out, [(asked.source.kind, Text.assemble((str(asked.source.path), "dim"), "\n", asked.answer))])
    if asked.miss is not None:
        for near in asked.miss.closest:
            differs = ", ".join(f"{d.field} is {d.tuned} there, {d.asked} here" for d in near.differences) or "the same key"
            facts(out, [("", f"closest: seq_len {', '.join(map(str, near.seq_lens))}; {differs}")], indent=4)


def _by_time(one: Measurement) -> tuple[str, float]:
    return one.direction, one.us if one.us is not None else float("inf")


def _timing(one: Measurement) -> list[str | Text]:
    label = f"{one.label} saving {one.residual or 'states'}" if one.saves_states else one.label
    if one.status != "ok":
        return [label, one.direction, "", "", Text(f"{one.status}: {one.reason}", "red" if one.status == "failed" else "dim")]
    return [label, one.direction, numbers.time_us(one.us), numbers.percent(one.spread or 0), ""]
