"""`tune --assess`: how good the tuner is on this machine, as a table, as JSON on stdout, and as a file with the machine's fingerprint, which grows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from titans_backends import registry
from titans_backends.cache.writing import real_path, replace_text, try_writing
from titans_backends.cli import exit_codes
from titans_backends.cli.failures import MisuseError
from titans_backends.cli.keys import by_key, key_json, key_title
from titans_backends.cli.show import Column, Group, Json, console, facts, heading, print_json, say, status_console, table
from titans_backends.machine import Machine
from titans_backends.reporting import numbers
from titans_backends.tuning.assess import Assessment, assess
from titans_backends.tuning.assess_order import spread_out
from titans_backends.tuning.fingerprint import fingerprint
from titans_backends.tuning.regret import Assessed
from titans_backends.tuning.request import TuneRequest

__all__ = ["run_assessment"]

_RESULTS = Path("benchmarks") / "results"
_ELSEWHERE = "titans-backends tune --assess --output OTHER.json"
_FLIPS = {"same": "", "tie": "tie", "margin": "default's margin", "outside": "outside"}


def run_assessment(request: TuneRequest, machine: Machine, budget_s: float | None, limit: int | None, as_json: bool, command: str) -> None:
    """Assesses, prints and writes, with the command that was typed; raises typer.Exit where something was left out."""
    path = request.output or (_RESULTS if _RESULTS.is_dir() else Path()) / f"assess_{machine.slug}.json"
    if path.suffix != ".json":
        raise MisuseError(f"--assess writes JSON: --output must end in .json, got {path}")
    allowed = try_writing(path)
    if not allowed:
        raise MisuseError(f"--assess: the result could not be written: {allowed}; name another file: --output OTHER.json")
    chosen = replace(request, buckets=spread_out(request.buckets, limit), output=None)
    err = status_console()
    say(err, f"{machine.name}: {numbers.amount(len(chosen.buckets), 'bucket')} of {len(request.buckets)} to assess, into {path}", "dim")

    def keep(now: Assessment) -> None:
        """What there is after each bucket, so that a command that is killed leaves it."""
        replace_text(real_path(path), json.dumps(_json(now, request, command), indent=1, allow_nan=False) + "\n", _ELSEWHERE)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MisuseError(f"{path} cannot be written: {error.strerror or error}") from error
    found = assess(chosen, budget_s, lambda said: say(err, said, "dim"), keep)
    if as_json:
        print_json(_json(found, request, command))
    else:
        _show(console(), found, path)
    keep(found)
    if found.interrupted:
        raise typer.Exit(exit_codes.INTERRUPTED)
    if found.left or not found.tuned:
        raise typer.Exit(exit_codes.FALLS_SHORT)


def _json(found: Assessment, request: TuneRequest, command: str) -> dict[str, Json]:
    racing = [backend.name for backend in registry.known().values() if request.asks(backend.name)]
    return {
        **fingerprint(request.device),
        "command": command,
        "racing": [*racing],
        "summary": asdict(found.summary),
        "compiled_ahead": None if found.compiled is None else asdict(found.compiled),
        "tune_s": list(found.tune_s),
        "tuned_buckets": list(found.tuned_buckets),
        "batches": found.batches,
        "planned": {"buckets": found.planned[0], "midpoints": found.planned[1], "refined": found.planned_refined},
        "seconds": found.seconds,
        "first_uses": [
            {**key_json(one.bucket), "first_s": one.first_s, "second_s": one.second_s, "origin": one.origin, "shipped": one.shipped}
            for one in found.first_uses
        ],
        "tuned": [_row(one) for one in found.tuned],
        "midpoints": [_row(one) for one in found.midpoints],
        "refined": [_row(one) for one in found.refined],
        "left": [{**key_json(bucket), "reason": reason} for bucket, reason in found.left],
    }


def _row(one: Assessed) -> dict[str, Json]:
    return {
        **key_json(one.bucket),
        "candidates": one.candidates,
        "best": one.best,
        "best_us": one.best_us,
        "best_spread": one.best_spread,
        "choices": [asdict(choice) for choice in one.choices],
        "flip": None if one.flip is None else asdict(one.flip),
        "between": None if one.between is None else list(one.between),
    }


def _show(out: Console, found: Assessment, path: Path) -> None:
    parts = [("tuned buckets, first tune | second", found.tuned), ("midpoints between the first tune's rows, chosen by lookup", found.midpoints)]
    for title, rows in (*parts, ("the first tune's rows where two neighbours' choices met", found.refined)):
        if rows:
            heading(out, title)
            _table(out, rows)
    figures = found.summary
    out.print()
    worst = f"worst {_percent(figures.worst_regret)} ({_percent(figures.worst_beyond_noise)} beyond noise)"
    pairs = [("regret", f"mean {_percent(figures.mean_regret)}, {worst}, over {numbers.amount(figures.buckets, 'bucket')}, two tunes")]
    cost = f"; worst cost {_percent(figures.worst_flip_cost)}" if figures.flips else ""
    pairs.append(("flips", f"{figures.flips}, {figures.flips_outside} outside ties and the default's margin{cost}"))
    if figures.midpoints:
        within = f"{_percent(figures.midpoints_within)} of {figures.midpoints} within 5 %, worst {_percent(figures.worst_midpoint_regret)}"
        pairs.append(("midpoints", within))
    if figures.refined:
        pairs.append(("rows between", f"{figures.refined}, where two neighbours' choices met; worst regret {_percent(figures.worst_refined_regret)}"))
    if found.compiled is not None:
        pairs.append(("compiled ahead", f"{numbers.amount(found.compiled.candidates, 'candidate')}, {numbers.seconds(found.compiled.seconds)}"))
    batches = f", in {numbers.amount(found.batches, 'batch', 'batches')}"
    pairs.append(("time to tune", " | ".join(_tuned(s, n) for s, n in zip(found.tune_s, found.tuned_buckets, strict=True)) + batches))
    for use in found.first_uses:
        there = f"with {'the shipped table' if use.shipped else 'a table there'}, in a fresh process (choice: {use.origin})"
        said = f"{numbers.seconds(use.first_s)} {there}; the second call {numbers.time_us(1e6 * use.second_s)}"
        pairs.append((f"first {use.bucket.op}", said))
    facts(out, pairs)
    if found.left:
        missing = f"{found.planned[0] - len(found.tuned)} of {numbers.amount(found.planned[0], 'bucket')}"
        between = f"{found.planned[1] - len(found.midpoints)} of {numbers.amount(found.planned[1], 'midpoint')}"
        if found.planned_refined:
            between += f", {found.planned_refined - len(found.refined)} of {numbers.amount(found.planned_refined, 'row')} between"
        said = "; ".join(f"{count} because {reason}" for reason, count in Counter(reason for _, reason in found.left).most_common(3))
        say(out, Text(f"not assessed: {missing}, {between} ({said})", "yellow"))
    say(out, f"measured in {numbers.seconds(found.seconds)}; the figures are in {path}")


def _table(out: Console, rows: Sequence[Assessed]) -> None:
    columns = [Column("seq_len", "right"), Column("chosen", flexible=True), Column("regret", "right"), Column("flip"), Column("best", flexible=True)]
    columns += [Column("median", "right"), Column("±", "right"), Column("of", "right")]
    groups = [Group(key_title(first), [_cells(row) for _, row in group]) for first, group in by_key((row.bucket, row) for row in rows)]
    table(out, columns, groups)


def _cells(one: Assessed) -> list[str | Text]:
    labels = list(dict.fromkeys(choice.label for choice in one.choices))
    worst = max(choice.regret for choice in one.choices)
    loud = "red" if any(choice.beyond_noise and choice.regret > 0.05 for choice in one.choices) else ""
    flip = "" if one.flip is None else _FLIPS[one.flip.within]
    return [
        str(one.bucket.seq_len), " | ".join(labels), Text(_percent(worst), loud), flip, one.best if one.best not in labels else "the same",
        numbers.time_us(one.best_us), numbers.percent(one.best_spread), str(one.candidates),
    ]  # fmt: skip


def _tuned(seconds: float, buckets: int) -> str:
    return f"{numbers.seconds(seconds)} for {numbers.amount(buckets, 'bucket')}"


def _percent(share: float | None) -> str:
    return "unknown" if share is None else numbers.percent(share)
