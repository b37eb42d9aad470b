"""Peak resident memory of gated_delta_rule's inference in a fresh process, over what was resident before the inputs existed.

Compared with inputs plus outputs, which nobody can avoid. Each sample is a process of its own, without a warm-up, so that whatever a
first call brings along counts. The mark is the kernel's (VmHWM, reset through clear_refs); Linux only.

    python benchmarks/memory.py [--seq-len 65536] [--heads 12] [--head-dim 32] [--threads N] [--repeats 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

AIM = 3.0
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Sample:
    """One process. Everything in MiB; the error is that of the first tokens against the float64 recurrence, relative."""

    kernel: str
    inputs_mib: float
    outputs_mib: float
    peak_mib: float
    error: float
    threads: int
    machine: str
    torch: str

    @property
    def factor(self) -> float:
        """The peak over inputs plus outputs."""
        return self.peak_mib / (self.inputs_mib + self.outputs_mib)


def resident(field: str) -> int:
    """Bytes of VmRSS or VmHWM."""
    if not CLEAR.exists():
        raise SystemExit(f"there is no {CLEAR}; this benchmark needs Linux with /proc")
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise SystemExit(f"{STATUS} has no {field}")


def sample(seq_len: int, heads: int, head_dim: int, threads: int | None) -> Sample:
    """Runs in the child: imports, notes what is resident, makes the inputs in place, calls, reads the mark, and then checks the numbers."""
    import torch

    import titans_backends as tb
    from titans_backends.contracts import contract
    from titans_backends.contracts.tolerance import compare

    if threads is not None:
        torch.set_num_threads(threads)
    rule = tb.get_op("gated_delta_rule")
    source = torch.Generator().manual_seed(0)
    before = resident("VmRSS")

    q, k, v = (torch.empty(1, seq_len, heads, head_dim).normal_(generator=source) for _ in range(3))
    for x in (q, k):
        x.div_(torch.linalg.vector_norm(x, dim=-1, keepdim=True))
    beta, g = (torch.empty(1, seq_len, heads).uniform_(generator=source) for _ in range(2))
    g.mul_(-0.1)
    CLEAR.write_text("5", encoding="ascii")
    with torch.no_grad():
        o, state = rule(q, k, v, beta, g, output_final_state=True)
    peak = resident("VmHWM") - before

    assert o is not None
    assert state is not None
    few = min(256, seq_len)
    op = contract("gated_delta_rule")
    exact = op.reference(op.make_call(*(x[:, :few].double() for x in (q, k, v, beta, g))))[0]
    assert exact is not None
    return Sample(
        kernel=rule.explain(q, k, v, beta, g, output_final_state=True).kernel,
        inputs_mib=sum(x.nbytes for x in (q, k, v, beta, g)) / MIB,
        outputs_mib=(o.nbytes + state.nbytes) / MIB,
        peak_mib=peak / MIB,
        error=compare("o", o[:, :few], exact).maximum if bool(torch.isfinite(state).all()) else float("inf"),
        threads=torch.get_num_threads(),
        machine=tb.detect("cpu").name,
        torch=torch.__version__,
    )


def child(arguments: list[str]) -> Sample:
    """One sample from a fresh process, which finds the library where this one does."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path[1:]))}
    done = subprocess.run([sys.executable, __file__, "--once", *arguments], capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise SystemExit(f"the measured process failed ({done.returncode}):\n{done.stderr}")
    return Sample(**json.loads(done.stdout))


def main() -> int:
    """Prints the factor; 1 where the output is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=65536, metavar="T")
    parser.add_argument("--heads", type=int, default=12, metavar="H")
    parser.add_argument("--head-dim", type=int, default=32, metavar="D")
    parser.add_argument("--threads", type=int, metavar="N", help="torch's threads (default: torch's own)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="processes (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the samples there")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.once:
        print(json.dumps(asdict(sample(asked.seq_len, asked.heads, asked.head_dim, asked.threads))))
        return 0
    sizes = ["--seq-len", str(asked.seq_len), "--heads", str(asked.heads), "--head-dim", str(asked.head_dim)]
    samples = [child([*sizes, *(["--threads", str(asked.threads)] if asked.threads else [])]) for _ in range(asked.repeats)]

    from titans_backends.cli.show import Column, Group, console, facts, table

    out = console()
    rows = [
        [one.kernel, *(f"{mib:.1f}" for mib in (one.inputs_mib, one.outputs_mib, one.peak_mib)), f"{one.factor:.2f}", f"{one.error:.1e}"]
        for one in samples
    ]
    titles = ("inputs MiB", "outputs MiB", "peak MiB", "factor", "error")
    title = f"gated_delta_rule, 1x{asked.seq_len}, {asked.heads} heads, head_dim {asked.head_dim}, float32, inference"
    table(out, [Column("kernel", flexible=True), *(Column(t, "right") for t in titles)], [Group(title, rows)])
    median = statistics.median(one.factor for one in samples)
    out.print(f"\nmedian factor over inputs plus outputs: {median:.2f} (the aim is at most {AIM:g})\n")
    facts(out, [("machine", samples[0].machine), ("threads", str(samples[0].threads)), ("torch", samples[0].torch)])
    if asked.json is not None:
        told = {"seq_len": asked.seq_len, "heads": asked.heads, "head_dim": asked.head_dim, "median_factor": median}
        measured = [{**asdict(one), "factor": one.factor} for one in samples]
        asked.json.write_text(json.dumps({**told, "samples": measured}, indent=1) + "\n", encoding="utf-8")
    if max(one.error for one in samples) > 5e-6:
        print("the output is wrong: over 5e-06", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
