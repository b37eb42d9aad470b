"""Models before and after they were recorded and tuned: time of a forward pass, of a training step, and how much of our ops' time the tuned rows cover.

    python benchmarks/recorded.py [--device cuda] [--models encoder,transformers] [--budget 120] [--json FILE]

`encoder` is `TitansEncoder`, `transformers` a Qwen3.5-like model from a config (random weights, nothing downloaded) after `titans_backends.accelerate`.
Every model and regime is recorded, then one tune measures all their problems, then each is timed three ways that take turns: untuned (the defaults, no table
is asked), before (this machine's tables: the shipped one, and the user's), after (the rows that the tune wrote, in a file of its own that is gone
afterwards). Outputs are compared first. Figures are medians of wall time, ended by a synchronisation. Exit status 1 where the outputs differ; a time is no
failure, and what `--within` left out is said.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import titans_backends as tb
from titans_backends import recording, tables
from titans_backends.cli.progress import showing
from titans_backends.cli.show import status_console
from titans_backends.machine import Machine
from titans_backends.tuning import ceilings
from titans_backends.tuning.fingerprint import fingerprint
from titans_backends.tuning.recorded import Cost, covered, demands, ordered
from titans_backends.tuning.run import TuneReport, TuneRequest, tune

SWITCH = "TITANS_BACKENDS_CACHE"
CALLS, WARM, TURNS = 6, 2, 3
SIZES = {"cuda": (6, 384, 12, 16384), "cpu": (2, 64, 2, 128)}
"""Layers, width, heads and tokens of the encoder."""
UNTUNED, BEFORE, AFTER = WAYS = ("untuned", "before", "after")


@dataclass(slots=True)
class Line:
    """One model and regime; milliseconds of each way, shares of our ops' recorded time, problems met and rows measured for them."""

    model: str
    regime: str
    tokens: int
    ms: dict[str, float] = field(default_factory=dict)
    covered: float = 0.0
    problems: int = 0
    rows: int = 0
    difference: float = 0.0
    wrong: str = ""
    winners: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Met:
    """A model in one regime with what it met: how to run it, its outputs before anything was tuned, and its problems with their costs."""

    line: Line
    run: Callable[[], Tensor]
    outputs: Tensor
    costs: tuple[Cost, ...]


def encoder(device: str) -> tuple[torch.nn.Module, Callable[[torch.nn.Module], Tensor], int]:
    """The encoder with a recurrent memory, and its call."""
    from titans_backends.nn import TitansEncoder, TitansEncoderConfig

    layers, width, heads, tokens = SIZES[device]
    torch.manual_seed(0)
    model = TitansEncoder(TitansEncoderConfig(1024, width, layers, heads, 4 * width, "recurrent"), dtype=_dtype(device)).to(device)
    ids = torch.randint(0, 1024, (1, tokens)).to(device)
    return model, lambda model: model(ids).tokens, tokens


def transformers(device: str) -> tuple[torch.nn.Module, Callable[[torch.nn.Module], Tensor], int]:
    """A Qwen3.5-like model whose layers are ours, and its call."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    wide = device == "cuda"
    sizes = {"hidden_size": 2048 if wide else 256, "intermediate_size": 6144 if wide else 512, "num_hidden_layers": 8 if wide else 4}
    heads = {"linear_num_key_heads": 16 if wide else 2, "linear_num_value_heads": 32 if wide else 4, "num_attention_heads": 8 if wide else 1}
    config = Qwen3_5TextConfig(vocab_size=4096, num_key_value_heads=2 if wide else 1, max_position_embeddings=1 << 16, **sizes, **heads)
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3_5ForCausalLM(config).to(_dtype(device))
    print(tb.accelerate(model), file=sys.stderr)
    tokens = 8192 if wide else 96
    ids = torch.randint(0, 4096, (1, tokens)).to(device)
    return model, lambda model: model(ids, use_cache=False).logits, tokens


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


MODELS = {"encoder": encoder, "transformers": transformers}


def once(model: torch.nn.Module, call: Callable[[torch.nn.Module], Tensor], training: bool) -> Tensor:
    """A forward pass, or a training step without an optimizer; the outputs."""
    model.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(training):
        found = call(model)
        if training:
            found.float().square().mean().backward()
    return found.detach()


def chosen_by(way: str, table: Path) -> None:
    """Makes every call ask no table, this machine's, or the tuned one before them."""
    os.environ.pop(SWITCH, None)
    if way == AFTER:
        os.environ[SWITCH] = str(table)
    tables._sources = _nothing if way == UNTUNED else _all  # there is no switch for this: nobody wants it but who measures what tables buy
    tb.reset()


_all = tables._sources


def _nothing(machine: Machine) -> Iterator[tables.Source]:
    return iter(())


def timed(run: Callable[[], Tensor], device: str) -> list[float]:
    """Milliseconds of some calls after some others."""

    def finished() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    samples = []
    for number in range(WARM + CALLS):
        start = time.perf_counter()
        finished()
        if number >= WARM:
            samples.append(1e3 * (time.perf_counter() - start))
    return samples


def meet(name: str, regimes: Sequence[str], device: str, folder: Path) -> Iterator[Met]:
    """A model in each regime, recorded."""
    model, call, tokens = MODELS[name](device)
    machine = tb.detect(device)
    for regime in regimes:

        def run(training: bool = regime == "training") -> Tensor:
            return once(model.train(training), call, training)

        outputs = run()
        with tb.record(folder / f"{name}_{regime}.shapes.yaml") as met:
            run()
        wanted = demands(recording.read(folder / f"{name}_{regime}.shapes.yaml"), machine.kind)
        costs = ordered(wanted, machine, functools.cache(lambda dtype: ceilings.measure(device, dtype)))
        yield Met(Line(name, regime, tokens, problems=len(met.problems)), run, outputs, costs)


def tuned(found: Sequence[Met], device: str, budget_s: float, table: Path) -> TuneReport:
    """One tune of all that was met, of every model and regime the most expensive first."""
    turns = [cost for rank in itertools.zip_longest(*(one.costs for one in found)) for cost in rank if cost is not None]
    buckets = tuple(dict.fromkeys(cost.demand.bucket for cost in turns))
    heads = {cost.demand.bucket: cost.demand.heads for cost in turns if cost.demand.heads is not None}
    with showing(status_console()) as on_event:
        return tune(TuneRequest(buckets, device=device, budget_s=budget_s, output=table, heads_by_bucket=heads, midpoints=False), on_event)


def compare(met: Met, report: TuneReport, device: str, table: Path) -> Line:
    """The line of a model and regime: outputs compared, then the three ways in turns."""
    line, rows = met.line, {row.bucket: row for row in report.rows}
    found = covered(met.costs, rows)
    whole = sum(one.total_us for one in found)
    line.covered = sum(one.covered * one.total_us for one in found) / whole if whole else 0.0
    own = [row for cost in met.costs if (row := rows.get(cost.demand.bucket)) is not None and row.entry is not None]
    line.rows, line.winners = len(own), {f"{row.bucket.op} {row.bucket.seq_len}": row.entry.label for row in own if row.entry is not None}
    chosen_by(AFTER, table)
    after = met.run()
    line.difference = float((after.float() - met.outputs.float()).norm() / met.outputs.float().norm())
    if not line.difference <= (1e-4 if after.dtype == torch.float32 else 5e-2):
        line.wrong = f"the outputs differ by {line.difference:.1e}"
    samples: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(TURNS):
        for way in (*WAYS[turn:], *WAYS[:turn]):
            chosen_by(way, table)
            samples[way] += timed(met.run, device)
    chosen_by(BEFORE, table)
    line.ms = {way: statistics.median(found) for way, found in samples.items()}
    return line


def said(line: Line) -> str:
    """A line for people."""
    untuned, before, after = (line.ms[way] for way in WAYS)
    return (
        f"{line.model} {line.regime}, {line.tokens} tokens: {untuned:.2f} ms untuned, {before:.2f} ms before, {after:.2f} ms after "
        f"({untuned / after:.2f} and {before / after:.2f} times as fast); {line.rows} rows for {line.problems} problems cover "
        f"{100 * line.covered:.0f} % of our ops' time; outputs differ by {line.difference:.0e} {line.wrong}"
    )


def main() -> int:
    """Prints a line per model and regime."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--models", default="encoder,transformers", help="of encoder, transformers")
    parser.add_argument("--regimes", default="inference,training", help="of inference, training")
    parser.add_argument("--budget", type=float, default=120.0, metavar="SECONDS", help="for the tune (default 120)")
    parser.add_argument("--within", type=float, default=math.inf, metavar="SECONDS", help="no model is begun after this (default: all are)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    asked = parser.parse_args()
    if SWITCH in os.environ:
        parser.error(f"{SWITCH} is set; unset it, since this sets it in turns")
    begun, found, left, lines = time.monotonic(), list[Met](), list[str](), list[Line]()
    with tempfile.TemporaryDirectory() as name:
        folder, table = Path(name), Path(name) / "tuned.yaml"
        for model in asked.models.split(","):
            try:
                found += meet(model, asked.regimes.split(","), asked.device, folder)
            except ImportError as error:
                left.append(f"{model}: not measured: {error}")
        if not found:
            print(*left, sep="\n", file=sys.stderr)
            return 1
        print(f"recorded after {time.monotonic() - begun:.0f} s", file=sys.stderr)
        report = tuned(found, asked.device, asked.budget, table)
        print(
            f"tuned {sum(row.entry is not None for row in report.rows)} rows in {report.seconds:.0f} s, {len(report.remaining)} left", file=sys.stderr
        )
        for met in found:
            if time.monotonic() - begun > asked.within:
                left.append(f"{met.line.model} {met.line.regime}: not timed: the time was up")
            else:
                lines.append(compare(met, report, asked.device, table))
                print(said(lines[-1]), flush=True)
            if asked.json is not None:
                told = {"lines": [asdict(one) for one in lines], "tune_s": report.seconds, "buckets_left": len(report.remaining), "left": left}
                asked.json.write_text(json.dumps({**fingerprint(asked.device), **told}, indent=1) + "\n", encoding="utf-8")
    print(*left, sep="\n", end="\n" if left else "", file=sys.stderr)
    return 1 if any(line.wrong for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
