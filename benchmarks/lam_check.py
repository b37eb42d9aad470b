"""The LAM layer before and after `accelerate`: values and gradients on every backend, a compiled graph, a device map, times.

    PYTHONPATH=. python benchmarks/lam_check.py [--device cuda] [--parts values,times,graph,map,forced] [--backends eager,triton,cupy] [--seconds 600] [--json FILE]

The layer is tests/lam_layer.py's stand-in for the original, written from its formulas: LamAfter is the current version, LamBefore the earlier one. On
a GPU 12 heads and width 384, float32. Values (three lengths, output and slow state) and gradients are compared with the old layer in float64, within
2e-4 and 2e-3, and the old forward must not have run. Times: stacks of six layers without gradients, before and after take turns; medians of up to 30
pairs. Lines: OK, BAD, TIME, and LEFT for what the time did not reach, or a forced backend says that it cannot. Exit
status 1 where a check is BAD; a time is no failure.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

import titans_backends as tb
from tests.lam_layer import LamAfter, LamBefore, LamLayer, randomized

VALUES, GRADIENTS = 2e-4, 2e-3
PARTS = ("values", "times", "graph", "map", "forced")
PAIRS = 30
Kind = type[LamLayer]


def stack(kind: Kind, width: int, heads: int, layers: int) -> nn.ModuleList:
    """Layers with random weights, on the CPU."""
    torch.manual_seed(0)
    made = randomized(nn.ModuleList(kind(width, heads, layer_idx=i) for i in range(layers)))
    assert isinstance(made, nn.ModuleList)
    return made


def off(got: Tensor, want: Tensor) -> float:
    """Relative L2 distance."""
    return float((got.double() - want.double()).norm() / want.double().norm())


class Residual(nn.Module):
    """Layers on top of one another between two projections, for the device map."""

    def __init__(self, layers: nn.ModuleList, width: int) -> None:
        super().__init__()
        self.layers, self.ends = layers, nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.ends[0](x)
        for layer in self.layers:
            x = x + layer(x)[0]
        return self.ends[1](x)  # type: ignore[no-any-return]


@dataclass(slots=True)
class Check:
    """The checks of one device, and what they found."""

    device: str
    seconds: float
    started: float = field(default_factory=time.monotonic)
    checks: list[dict[str, object]] = field(default_factory=list)
    times: list[dict[str, object]] = field(default_factory=list)

    @property
    def gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def size(self) -> tuple[int, int]:
        """Width and heads."""
        return (384, 12) if self.gpu else (64, 2)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def say(self, name: str, worst: float, limit: float, calls: int) -> None:
        """One check; `calls` counts the old forward, which must not run."""
        right = worst <= limit and calls == 0
        print(f"{'OK ' if right else 'BAD'} {name}: {worst:.1e} (limit {limit:.0e}), the old forward ran {calls} times", flush=True)
        self.checks.append({"name": name, "off": worst, "limit": limit, "old_calls": calls, "ok": right})

    def attempt(self, name: str, check: Callable[[], None]) -> None:
        """What raises is a line, not the end."""
        if self.left < 6:
            print(f"LEFT {name}: no time", flush=True)
            return
        try:
            check()
        except (tb.BackendRefusedError, tb.AccelerateError) as error:
            print(f"LEFT {name}: refused: {str(error).splitlines()[-1][:240]}", flush=True)
        except Exception:
            print(f"BAD {name}: {' | '.join(traceback.format_exc().strip().splitlines()[-4:])[:600]}", flush=True)
            self.checks.append({"name": name, "ok": False})

    def values(self, kind: Kind, backend: str | None) -> None:
        """Outputs and the slow state for three lengths."""
        layer, exact, x = self._pair(kind, backend)
        worst = 0.0
        with torch.no_grad():
            for length in (300, 256, 40):
                got, want = layer(x[:, :length], use_cache=True), exact(x[:, :length].double(), use_cache=True)
                worst = max(worst, off(got[0], want[0]), off(got[2][0]["recurrent_state"][1], want[2][0]["recurrent_state"][1]))
        self.say(f"{kind.__name__} {backend} values", worst, VALUES, layer.calls)

    def gradients(self, backend: str | None) -> None:
        """Of every parameter, the loss included; the current version, which trains on our ops."""
        layer, exact, x = self._pair(LamAfter, backend)
        for one, given in ((exact.train(), x.double()), (layer.train(), x)):
            y, _, _, loss = one(given)
            (y.square().mean() + 0.1 * loss).backward()
        worst, wanted = 0.0, dict(exact.named_parameters())
        for name, parameter in layer.named_parameters():
            want, got = wanted[name].grad, parameter.grad
            if (got is None) != (want is None):
                worst = float("inf")
            elif got is not None and want is not None and want.norm() > 1e-9:
                worst = max(worst, off(got, want))
        self.say(f"LamAfter {backend} gradients", worst, GRADIENTS, layer.calls)

    def _pair(self, kind: Kind, backend: str | None) -> tuple[LamLayer, LamLayer, Tensor]:
        """A swapped layer, the old one in float64, and tokens."""
        layer = stack(kind, *self.size, 1)[0].to(self.device)
        assert isinstance(layer, LamLayer)
        x = torch.randn(2, 300, self.size[0], device=self.device)
        exact = copy.deepcopy(layer).double()
        layer.calls = 0
        tb.accelerate(layer, backend=backend)
        return layer, exact, x

    def graph(self, kind: Kind) -> None:
        """Compiled without a graph break before it is swapped; on a GPU in CUDA graphs."""
        layer = stack(kind, 64, 2, 1)[0].to(self.device)
        assert isinstance(layer, LamLayer)
        x = torch.randn(2, 256, 64, device=self.device)
        with torch.no_grad():
            want = layer(x)[0]
            layer.calls = 0
            compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead" if self.gpu else "default")
            tb.accelerate(compiled)
            for _ in range(4):
                got = compiled(x)[0].clone()
        self.say(f"{kind.__name__} under torch.compile(fullgraph=True)", off(got, want), VALUES, layer.calls)

    def placed(self) -> None:
        """accelerate's device map: the layers on the GPU, the ends on the CPU."""
        import accelerate

        layers = stack(LamAfter, 64, 2, 2)
        whole, x = Residual(layers, 64), torch.randn(2, 100, 64)
        with torch.no_grad():
            want = whole(x)
            for layer in layers:
                layer.calls = 0
            place = 0 if self.gpu else "cpu"
            accelerate.dispatch_model(whole, {"layers": place, "ends": "cpu"}, main_device=place, force_hooks=True)
            tb.accelerate(whole)
            got = whole(x).cpu()
        self.say("device map", off(got, want), VALUES, sum(layer.calls for layer in layers))

    def timed(self, kind: Kind, tokens: int) -> None:
        """A stack before and after."""
        layers = stack(kind, *self.size, 6 if self.gpu else 2).to(self.device)
        with torch.no_grad():
            for parameter in layers.parameters():
                parameter.mul_(0.2)
        ours = copy.deepcopy(layers)
        tb.accelerate(ours)
        x = torch.randn(1, tokens, self.size[0], device=self.device)
        pairs: list[tuple[float, float]] = []
        with torch.no_grad():
            for _ in range(3):
                self._once(layers, x), self._once(ours, x)
            while len(pairs) < PAIRS and self.left > 5:
                pairs.append((self._once(layers, x), self._once(ours, x)))
        if not pairs:
            print(f"LEFT {kind.__name__} {tokens} tokens: no time", flush=True)
            return
        before, after = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"TIME {kind.__name__} {tokens} tokens: {before:.3f} -> {after:.3f} ms, {before / after:.1f} times ({len(pairs)} pairs)", flush=True)
        self.times.append({"version": kind.__name__, "tokens": tokens, "before_ms": before, "after_ms": after, "pairs": len(pairs)})

    def _once(self, layers: nn.ModuleList, x: Tensor) -> float:
        """Milliseconds of one pass, ended by a synchronisation."""
        wait = torch.cuda.synchronize if self.gpu else lambda: None
        wait()
        begin = time.perf_counter()
        for layer in layers:
            x = x + layer(x)[0]
        wait()
        return (time.perf_counter() - begin) * 1e3

    def run(self, parts: list[str], backends: list[str]) -> None:
        """What was asked for, the most wanted first."""
        for part in filter(parts.__contains__, PARTS):
            match part:
                case "values":
                    self.both(None)
                case "times":
                    for kind, tokens in product((LamAfter, LamBefore), (512, 2048, 8192) if self.gpu else (256,)):
                        self.attempt(f"{kind.__name__} {tokens} tokens", partial(self.timed, kind, tokens))
                case "graph":
                    for kind in (LamAfter, LamBefore):
                        self.attempt(f"{kind.__name__} compiled", partial(self.graph, kind))
                case "map":
                    self.attempt("device map", self.placed)
                case "forced":
                    for backend in backends:
                        self.both(backend)

    def both(self, backend: str | None) -> None:
        """Values of both versions, gradients of the current one."""
        for kind in (LamAfter, LamBefore):
            self.attempt(f"{kind.__name__} {backend} values", partial(self.values, kind, backend))
        self.attempt(f"LamAfter {backend} gradients", partial(self.gradients, backend))


def names(text: str) -> list[str]:
    """Parts, as they were typed."""
    given = [name for name in text.split(",") if name]
    if strange := [name for name in given if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"{', '.join(strange)} is not among {', '.join(PARTS)}")
    return given


def main() -> int:
    """Checks, tells, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", type=names, default=list(PARTS), help="what to do (default: everything)")
    parser.add_argument("--backends", type=lambda text: [name for name in text.split(",") if name])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    check = Check(asked.device, asked.seconds)
    place = torch.cuda.get_device_name() if check.gpu else platform.machine()
    told = {"device": place, "torch": torch.__version__, "titans_backends": tb.__version__}
    try:
        check.run(asked.parts, asked.backends if asked.backends is not None else ["eager", "triton", "cupy"] if check.gpu else ["eager"])
    finally:  # of an interrupted run what there is
        if asked.json is not None:
            asked.json.write_text(json.dumps({**told, "checks": check.checks, "times": check.times}, indent=1) + "\n", encoding="utf-8")
    right = sum(bool(found["ok"]) for found in check.checks)
    print(f"{', '.join(f'{key} {value}' for key, value in told.items())}: {right} OK of {len(check.checks)}")
    return 0 if right == len(check.checks) else 1


if __name__ == "__main__":
    raise SystemExit(main())
