"""A whole transformers model before and after `titans_backends.accelerate`: time to first token, time of a token, a training step, peak memory.

    python benchmarks/drop_in.py [--device cuda] [--fla FOLDER] [--json FILE]

A model from a Qwen3.5-like config (three gated-delta layers to one of attention, random weights, nothing downloaded). Before and after take turns
in one process on one model: `accelerate(model)`, `report.undo()`. `before` is transformers as it stands: plain torch where FLA is not importable,
FLA where it is; each has a process of its own, and FLA's runs only where it is importable, or a folder that holds it is named with --fla. Before
anything is timed, the logits of both are compared with the same model in float32, and the swap must have run: a counter of the ops' calls says so.
Exit status 1 where ours is wrong; a time is no failure.

Figures are medians of wall time, ended by a synchronisation. The first token: a forward pass of the prompt with a new cache, logits of the last
position. A token: one more forward pass on that cache. A training step: forward, cross entropy of all positions, backward, no optimizer.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIZES = {
    "cuda": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "linear_num_key_heads": 16, "linear_num_value_heads": 32},
    "cpu": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 4, "linear_num_key_heads": 8, "linear_num_value_heads": 16},
}
"""Of the model; heads of 128 for the gated delta rule, of 256 for attention, a vocabulary of 32,768."""
SLOWER = 1.1
"""How much larger our error against float32 may be than theirs."""
ROUNDS, LEAST = 7, 3
Way = str


@dataclass(slots=True)
class Line:
    """One figure of both ways; milliseconds, and MiB above the model's own."""

    what: str
    tokens: int
    before_ms: float = math.nan
    after_ms: float = math.nan
    before_mib: float = math.nan
    after_mib: float = math.nan
    note: str = ""

    @property
    def gain(self) -> float:
        """How many times as fast the model is afterwards."""
        return self.before_ms / self.after_ms


@dataclass(slots=True)
class Report:
    """What one process measured."""

    before: str
    facts: dict[str, object] = field(default_factory=dict)
    swapped: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Bench:
    """One model, measured before and after by turns."""

    def __init__(self, asked: argparse.Namespace) -> None:
        from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

        self.device, self.end = asked.device, time.perf_counter() + asked.seconds
        sizes = {**SIZES[asked.device], **({"num_hidden_layers": asked.layers} if asked.layers else {})}
        heads = max(1, sizes["hidden_size"] // 256)
        config = Qwen3_5TextConfig(
            vocab_size=32768, num_attention_heads=heads, num_key_value_heads=max(1, heads // 4), max_position_embeddings=1 << 17, **sizes
        )
        self.dtype = torch.bfloat16 if asked.device == "cuda" else torch.float32
        torch.manual_seed(0)
        with torch.device(asked.device):
            self.model = Qwen3_5ForCausalLM(config).to(self.dtype).eval()
        self.fla = _fla()
        self.report = Report(before="FLA" if self.fla else "transformers, plain torch")
        self.report.facts = {
            "device": torch.cuda.get_device_name() if asked.device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "transformers": __import__("transformers").__version__,
            "dtype": str(self.dtype).removeprefix("torch."),
            "sizes": sizes,
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }
        self.backend = asked.backend

    def ids(self, tokens: int) -> Tensor:
        """Random tokens, the same at every call."""
        return torch.randint(0, 32768, (1, tokens), generator=torch.Generator().manual_seed(tokens)).to(self.device)

    def way(self, way: Way) -> Callable[[], None]:
        """Makes the model what `way` names; returns what undoes it."""
        import titans_backends as tb

        if way == "before":
            return lambda: None
        report = tb.accelerate(self.model, backend=self.backend)
        self.report.swapped = [f"{entry.path}: {entry.new}" for entry in report.swapped]
        return report.undo

    def exact(self) -> Callable[[], None]:
        """Plain torch: transformers' own where FLA is not installed; with FLA its kernels would compile anew for float32, for minutes, so ours on eager."""
        import titans_backends as tb

        return tb.accelerate(self.model, backend="eager").undo if self.fla else lambda: None

    def check(self, tokens: int = 192) -> None:
        """The last logits of both ways against the model in float32, and that ours ran at all."""
        ids, found = self.ids(tokens), {}
        for way in ("before", "after"):
            undo = self.way(way)
            calls = _Calls()
            with torch.no_grad(), calls:
                found[way] = self.model(ids).logits.float()
            undo()
            if (calls.count > 0) != (way == "after"):
                self.report.wrong.append(f"{way}: the ops were called {calls.count} times")
        with torch.no_grad():
            self.model.float()
            undo = self.exact()
            truth = self.model(ids).logits
            undo()
            self.model.to(self.dtype)
        self.report.errors = {way: float((x - truth).norm() / truth.norm()) for way, x in found.items()}
        between = float((found["after"] - found["before"]).norm() / truth.norm())
        self.report.errors["between"] = between
        limit = 1e-4 if self.dtype == torch.float32 else max(SLOWER * self.report.errors["before"], 1e-3)
        got = between if self.dtype == torch.float32 else self.report.errors["after"]
        if not got <= limit:
            self.report.wrong.append(f"the logits are {got:.2e} off; {limit:.2e} is allowed")

    def race(self, what: str, tokens: int, prepare: Callable[[], Callable[[], Any]]) -> None:
        """Both ways by turns: `prepare` makes what a sample calls, untimed."""
        line, left = Line(what, tokens), ["before", "after"]
        samples: dict[Way, list[float]] = {"before": [], "after": []}
        peaks: dict[Way, float] = {}
        for turn in range(ROUNDS + 1):
            if turn > LEAST and time.perf_counter() > self.end:
                line.note += f"{turn - 1} samples: the time was spent"
                break
            for way in left[:: 1 if turn % 2 else -1]:
                undo = self.way(way)
                try:
                    call = prepare()
                    self.start()
                    seconds = self.timed(call)
                    peaks[way] = self.peak()
                    del call
                    if turn:
                        samples[way].append(seconds)
                except RuntimeError as error:  # no memory; or FLA's backward, which refuses a card that it gets wrong: the other way is measured
                    left.remove(way)
                    samples[way].clear()
                    line.note += f"{way} raises {type(error).__name__}: {' '.join(str(error).split())[:160]}; "
                    if way == "after" and not isinstance(error, torch.OutOfMemoryError):
                        self.report.wrong.append(f"{what} {tokens}: {line.note}")
                finally:
                    undo()
        line.before_ms, line.after_ms = (1e3 * statistics.median(samples[way]) if samples[way] else math.nan for way in ("before", "after"))
        line.before_mib, line.after_mib = peaks.get("before", math.nan), peaks.get("after", math.nan)
        self.report.lines.append(line)
        print(
            f"  {what:14s} {tokens:6d}  {line.before_ms:9.2f} {line.after_ms:9.2f} ms  {line.gain:5.2f}x  {line.before_mib:7.0f} {line.after_mib:7.0f} MiB  {line.note}",
            flush=True,
        )

    def timed(self, call: Callable[[], Any]) -> float:
        """Seconds of one call, device included."""
        self.wait()
        begin = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - begin

    def wait(self) -> None:
        """Until the device is idle."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def start(self) -> None:
        """Begins to watch the peak."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()

    def peak(self) -> float:
        """MiB above what there was at the start; not measured on a CPU."""
        return (torch.cuda.max_memory_allocated() - self.base) / 2**20 if self.device == "cuda" else math.nan

    def prompt(self, tokens: int) -> None:
        """Time to first token."""
        ids = self.ids(tokens)

        def prepare() -> Callable[[], Any]:
            return lambda: self.model(ids, use_cache=True, logits_to_keep=1)

        with torch.no_grad():
            self.race("first token", tokens, prepare)

    def token(self, tokens: int, steps: int = 16) -> None:
        """Time of one more token, as the mean of sixteen."""
        ids = self.ids(tokens)

        def prepare() -> Callable[[], Any]:
            cache = self.model(ids, use_cache=True, logits_to_keep=1).past_key_values
            self.model(ids[:, :1], past_key_values=cache, use_cache=True)

            def run() -> None:
                for step in range(steps):
                    self.model(ids[:, step : step + 1], past_key_values=cache, use_cache=True)

            return run

        with torch.no_grad():
            self.race("16 tokens", tokens, prepare)
        line = self.report.lines[-1]
        line.what, line.before_ms, line.after_ms = "a token", line.before_ms / steps, line.after_ms / steps

    def step(self, tokens: int) -> None:
        """A training step without an optimizer."""
        ids = self.ids(tokens)

        def prepare() -> Callable[[], Any]:
            self.model.zero_grad(set_to_none=True)

            def run() -> None:
                self.model(ids, labels=ids, use_cache=False).loss.backward()

            return run

        self.model.train()
        self.race("training step", tokens, prepare)
        self.model.zero_grad(set_to_none=True)
        self.model.eval()


class _Calls:
    """Counts the calls of the ops while it is entered."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> _Calls:
        from titans_backends.op import Op

        self.original = Op.__call__
        counter = self

        def counted(op: Op, *args: object, **kwargs: object) -> object:
            counter.count += 1
            return counter.original(op, *args, **kwargs)

        Op.__call__ = counted  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *_: object) -> None:
        from titans_backends.op import Op

        Op.__call__ = self.original  # type: ignore[method-assign]


def _fla() -> bool:
    """Whether transformers will find FLA."""
    try:
        from transformers.utils.import_utils import is_flash_linear_attention_available
    except ImportError:
        import importlib.util

        return importlib.util.find_spec("fla") is not None
    return bool(is_flash_linear_attention_available())


def measure(asked: argparse.Namespace) -> Report:
    """Everything that was asked for, in this process."""
    bench = Bench(asked)
    print(f"before: {bench.report.before}; {bench.report.facts}", flush=True)
    bench.check()
    print(f"  logits against float32: {bench.report.errors}; swapped: {len(bench.report.swapped)}", flush=True)
    for tokens in asked.prompts:
        bench.prompt(tokens)
    for tokens in asked.prompts:
        if tokens <= asked.longest_decode:
            bench.token(tokens)
    for tokens in asked.train:
        bench.step(tokens)
    return bench.report


def lengths(text: str) -> list[int]:
    """`4096,32768`."""
    return [int(part) for part in text.split(",") if part]


def main() -> int:
    """Runs the ways that there are, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=0, help="layers (default 24 on a GPU, 4 on a CPU)")
    parser.add_argument("--prompts", type=lengths, metavar="N,N", help="tokens (default 4096,32768; on a CPU 1024; '' for none)")
    parser.add_argument("--train", type=lengths, metavar="N,N", help="tokens of a training step (default 4096; on a CPU 512; '' for none)")
    parser.add_argument("--longest-decode", type=int, default=1 << 16, metavar="N", help="no token is timed behind a longer prompt")
    parser.add_argument("--backend", help="force the ops to this backend (default: what dispatch chooses)")
    parser.add_argument("--fla", type=Path, metavar="FOLDER", help="a folder with FLA for the second process")
    parser.add_argument("--seconds", type=float, default=240.0, help="for each process; later figures take fewer samples (default 240)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    gpu = asked.device == "cuda"
    asked.prompts = asked.prompts if asked.prompts is not None else ([4096, 32768] if gpu else [1024])
    asked.train = asked.train if asked.train is not None else ([4096] if gpu else [512])
    if asked.one:
        report = measure(asked)
        if asked.json:
            asked.json.write_text(json.dumps(asdict(report)))
        for wrong in report.wrong:
            print(f"  WRONG: {wrong}", file=sys.stderr)
        return 1 if report.wrong else 0
    status, reports = 0, []
    for folder in (None, asked.fla) if asked.fla else (None,):
        part = Path(f"{asked.json or '/tmp/drop_in.json'}.part")
        part.unlink(missing_ok=True)
        paths = [*([str(folder.resolve())] if folder else []), *filter(None, [os.environ.get("PYTHONPATH")])]
        command = [sys.executable, __file__, "--one", *[one for one in sys.argv[1:] if one not in ("--one",)], "--json", str(part)]
        status |= subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, check=False).returncode
        if part.exists():
            reports.append(json.loads(part.read_text()))
            part.unlink()
            if asked.json:
                asked.json.write_text(json.dumps(reports, indent=1) + "\n")
    return int(bool(status))


if __name__ == "__main__":
    raise SystemExit(main())
