"""gated_delta_rule against transformers' torch_chunk_gated_delta_rule, float32 on a CPU: the same inputs, interleaved samples, one process.

Both get g, beta and no normalisation, and return the final state. Outputs and states are compared with each other and with the float64
token recurrence in the same run; exit status 1 where they disagree. Transformers' function is its plain torch one: from 5.23 a
decorator hands the name to FLA where that is installed.

    python benchmarks/against_transformers.py [--shape 1x512x16x128]... [--rounds 30] [--threads N] [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import titans_backends as tb
from titans_backends.cli.show import Column, Group, console, facts, table
from titans_backends.contracts import contract
from titans_backends.contracts.case import Case, build
from titans_backends.contracts.tolerance import compare, tolerance

AIM = 1.5
DEFAULT_SHAPES = ("1x512x16x128", "1x2048x16x128", "1x2048x12x32")
MISSING = "transformers is not installed. Type: pip install -c constraints.txt transformers"
Function = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Row:
    """One shape. Times are medians in milliseconds, spreads the half-width of the middle half over the median; errors are relative."""

    shape: str
    kernel: str
    chosen_by: str
    ours_ms: float
    ours_spread: float
    theirs_ms: float
    theirs_spread: float
    ratio: float
    rounds: int
    difference: float
    our_error: float
    their_error: float
    agree: bool


def theirs_function() -> Callable[..., tuple[Tensor, Tensor]]:
    """The plain torch function, from under its decorators."""
    try:
        from transformers.models.qwen3_next import modeling_qwen3_next
    except ImportError as error:
        raise SystemExit(f"{MISSING}\n({error})") from error
    plain: Callable[..., tuple[Tensor, Tensor]] = inspect.unwrap(modeling_qwen3_next.torch_chunk_gated_delta_rule)
    return plain


def problem(shape: str) -> dict[str, Tensor]:
    """Unit keys, beta in (0, 1), g in (-0.1, 0): float32, the same for both."""
    try:
        batch, seq_len, heads, head_dim = map(int, shape.split("x"))
    except ValueError:
        raise SystemExit(f"--shape {shape}: it must be batch x seq_len x heads x head_dim, as in 1x512x16x128") from None
    op = contract("gated_delta_rule")
    return op.tensors(build(op, Case("against", batch, seq_len, heads, heads, head_dim, head_dim, given=("g",))))


def interleaved(functions: tuple[Function, Function], rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each, in turns; who goes first alternates."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds):
        for index in (0, 1) if turn % 2 == 0 else (1, 0):
            start = time.perf_counter()
            functions[index]()
            times[index].append(1e3 * (time.perf_counter() - start))
    return times


def spread(times: list[float]) -> float:
    """Half of the interquartile range over the median."""
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / middle


def worst(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> float:
    """The larger of max|a-b| / max|b| over output and state; infinite where something is not finite."""
    found = [compare(name, a, b) for name, a, b in zip(("o", "final_state"), got, want, strict=True)]
    return max(max(d.maximum, d.rms) for d in found)


def measure(shape: str, rounds: int) -> Row:
    """One shape: checked, then timed."""
    x = problem(shape)
    rule = tb.get_op("gated_delta_rule")
    arguments = (x["q"], x["k"], x["v"], x["beta"], x["g"])
    plan = rule.explain(*arguments, output_final_state=True)
    if plan.choice is None:
        raise SystemExit(plan.refusal)

    def ours() -> tuple[Tensor, Tensor]:
        return rule(*arguments, output_final_state=True)  # type: ignore[return-value]  # both were asked for

    original = theirs_function()

    def theirs() -> tuple[Tensor, Tensor]:
        return original(x["q"], x["k"], x["v"], x["g"], x["beta"], output_final_state=True, use_qk_l2norm_in_kernel=False)

    got, other = ours(), theirs()
    op = contract("gated_delta_rule")
    exact = op.reference(op.make_call(*(t.double() for t in arguments), output_final_state=True))
    assert exact[0] is not None
    assert exact[1] is not None
    truth = (exact[0], exact[1])
    difference, our_error, their_error = worst(got, other), worst(got, truth), worst(other, truth)
    limit = tolerance(torch.float32).outputs
    interleaved((ours, theirs), 3)
    mine, yours = interleaved((ours, theirs), rounds)
    ours_ms, theirs_ms = statistics.median(mine), statistics.median(yours)
    return Row(
        shape, plan.kernel, plan.choice.origin, ours_ms, spread(mine), theirs_ms, spread(yours), theirs_ms / ours_ms, rounds,
        difference, our_error, their_error, agree=max(difference, our_error) <= limit,
    )  # fmt: skip


def cells(row: Row) -> list[str]:
    """A row for people."""
    times = [f"{row.ours_ms:.2f}", f"{row.ours_spread:.0%}", f"{row.theirs_ms:.2f}", f"{row.theirs_spread:.0%}", f"{row.ratio:.2f}"]
    return [*times, f"{row.difference:.1e}", f"{row.our_error:.1e}", f"{row.their_error:.1e}"]


def main() -> int:
    """Prints the table; 1 where outputs or states disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", metavar="BxTxHxD", help=f"may be repeated (default {', '.join(DEFAULT_SHAPES)})")
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="samples of each per shape, at least 4 (default 30)")
    parser.add_argument("--threads", type=int, metavar="N", help="torch's threads (default: torch's own)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    asked = parser.parse_args()
    if asked.rounds < 4:
        parser.error(f"--rounds {asked.rounds}: quartiles need at least 4")
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    theirs_function()
    with torch.no_grad():
        rows = [measure(shape, asked.rounds) for shape in asked.shape or DEFAULT_SHAPES]
    mean = statistics.geometric_mean(row.ratio for row in rows)
    machine = tb.detect("cpu")
    told = {
        "machine": machine.name,
        "isa": machine.isa or "",
        "threads": torch.get_num_threads(),
        "titans_backends": tb.__version__,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }
    out = console()
    titles = ("ours ms", "±", "theirs ms", "±", "ratio", "ours - theirs", "our error", "their error")
    groups = [Group(f"{row.shape}  {row.kernel} ({row.chosen_by})", [cells(row)]) for row in rows]
    table(out, [Column(title, "right") for title in titles], groups)
    out.print(f"\ngeometric mean of the ratios: {mean:.2f} (the aim is at least {AIM})\n")
    facts(out, [(name, str(value)) for name, value in told.items()])
    if asked.json is not None:
        asked.json.write_text(json.dumps({**told, "geometric_mean": mean, "rows": [asdict(row) for row in rows]}, indent=1) + "\n", encoding="utf-8")
    wrong = [row.shape for row in rows if not row.agree]
    if wrong:
        print(f"outputs or states disagree at {', '.join(wrong)}: over {tolerance(torch.float32).outputs:.0e}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
