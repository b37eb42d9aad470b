"""A model before and after it was recorded and tuned: time of a forward pass, of a training step, and how much of our ops' time the tuned rows cover.

    python benchmarks/recorded.py [--device cuda] [--models encoder,transformers] [--budget 60] [--json FILE]

`encoder` is `TitansEncoder`, `transformers` a Qwen3.5-like model from a config (random weights, nothing downloaded) after `titans_backends.accelerate`.
Before: what this machine's tables and defaults choose. After: the rows that `tune` measured for the recorded problems, in a file of its own that is gone
afterwards. The two take turns; outputs are compared first. Figures are medians of wall time, ended by a synchronisation. Exit status 1 where the outputs
differ; a time is no failure.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import titans_backends as tb
from titans_backends import recording
from titans_backends.tuning import ceilings
from titans_backends.tuning.fingerprint import fingerprint
from titans_backends.tuning.recorded import covered, demands, ordered
from titans_backends.tuning.run import TuneRequest, tune

SWITCH = "TITANS_BACKENDS_CACHE"
CALLS, WARM = 8, 3
SIZES = {"cuda": (6, 384, 12, 4096), "cpu": (2, 64, 2, 128)}
"""Layers, width, heads and tokens of the encoder."""


@dataclass(slots=True)
class Line:
    """One model and regime; milliseconds, shares of our ops' recorded time, problems met and rows measured for them."""

    model: str
    regime: str
    tokens: int
    before_ms: float = 0.0
    after_ms: float = 0.0
    covered: float = 0.0
    problems: int = 0
    rows: int = 0
    tune_s: float = 0.0
    difference: float = 0.0
    wrong: str = ""
    winners: dict[str, str] = field(default_factory=dict)


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
    tokens = 4096 if wide else 96
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


def by_table(path: Path | None) -> None:
    """Makes every call ask this file first, or none of ours."""
    os.environ.pop(SWITCH, None)
    if path is not None:
        os.environ[SWITCH] = str(path)
    tb.reset()


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


def measure(name: str, regime: str, device: str, budget_s: float, folder: Path) -> Line:
    """One model in one regime: recorded, tuned, and timed with and without."""
    model, call, tokens = MODELS[name](device)
    training = regime == "training"
    run = functools.partial(once, model.train(training), call, training)
    line, shapes, table = Line(name, regime, tokens), folder / f"{name}_{regime}.shapes.yaml", folder / f"{name}_{regime}.yaml"
    before = run()
    with tb.record(shapes) as met:
        run()
    machine, lines = tb.detect(device), recording.read(shapes)
    costs = ordered(demands(lines, machine.kind), machine, functools.cache(lambda dtype: ceilings.measure(device, dtype)))
    heads = {cost.demand.bucket: cost.demand.heads for cost in costs if cost.demand.heads is not None}
    buckets = tuple(cost.demand.bucket for cost in costs)
    report = tune(TuneRequest(buckets, device=device, budget_s=budget_s, output=table, heads_by_bucket=heads))
    found = covered(costs, {row.bucket: row for row in report.rows})
    whole = sum(one.total_us for one in found)
    line.covered = sum(one.covered * one.total_us for one in found) / whole if whole else 0.0
    line.problems, line.rows, line.tune_s = len(met.problems), sum(row.entry is not None for row in report.rows), report.seconds
    line.winners = {f"{row.bucket.op} {row.bucket.seq_len}": row.entry.label for row in report.rows if row.entry is not None}
    by_table(table)
    after = run()
    line.difference = float((after.float() - before.float()).norm() / before.float().norm())
    if not line.difference <= (1e-4 if before.dtype == torch.float32 else 5e-2):
        line.wrong = f"the outputs differ by {line.difference:.1e}"
    samples: dict[Path | None, list[float]] = {None: [], table: []}
    for way in (None, table, table, None, None, table):
        by_table(way)
        samples[way] += timed(run, device)
    by_table(None)
    line.before_ms, line.after_ms = (statistics.median(samples[way]) for way in (None, table))
    return line


def main() -> int:
    """Prints a line per model and regime."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--models", default="encoder,transformers", help="of encoder, transformers")
    parser.add_argument("--regimes", default="inference,training", help="of inference, training")
    parser.add_argument("--budget", type=float, default=60.0, metavar="SECONDS", help="for each tune (default 60)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    asked = parser.parse_args()
    if SWITCH in os.environ:
        parser.error(f"{SWITCH} is set; unset it, since this sets it in turns")
    lines: list[Line] = []
    for name in asked.models.split(","):
        for regime in asked.regimes.split(","):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    line = measure(name, regime, asked.device, asked.budget, Path(folder))
                except ImportError as error:
                    print(f"{name}: not measured: {error}", file=sys.stderr)
                    continue
            lines.append(line)
            print(
                f"{line.model} {line.regime}, {line.tokens} tokens: {line.before_ms:.2f} ms before, {line.after_ms:.2f} ms after "
                f"({line.before_ms / line.after_ms:.2f} times as fast); {line.rows} rows for {line.problems} problems cover {100 * line.covered:.0f} % of our "
                f"ops' time, tuned in {line.tune_s:.0f} s; outputs differ by {line.difference:.0e} {line.wrong}",
                flush=True,
            )
            if asked.json is not None:
                figures = {**fingerprint(asked.device), "lines": [asdict(one) for one in lines]}
                asked.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 1 if any(line.wrong for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
