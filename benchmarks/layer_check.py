"""Checks TitansDualCore and TitansEncoder on a CUDA device against float64 on the CPU, and what a graph, a cache and an optimizer may not change.

    python benchmarks/layer_check.py [--golden DIR] [--backend NAME] [--parts values,graphs] [--modes flat,loop] [--quick] [--json FILE]

One line a finding; exits 1 if anything is wrong. Times and memory at the end are told, and fail nothing. `--golden`: a folder of the original's layers.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import titans_backends as tb
from titans_backends.nn import TitansDualCore, TitansEncoder, TitansEncoderConfig

MODES = ("flat", "loop", "dual", "recurrent")
LIMITS = {torch.float32: 2e-4, torch.bfloat16: 2e-1}
"""Of the relative root mean square error: the lam transform of flat and loop amplifies rounding some ten times."""
GOLDEN = 5e-5


class Findings:
    """What was checked, and what was wrong."""

    def __init__(self) -> None:
        self.told: dict[str, object] = {}
        self.wrong: list[str] = []

    def tell(self, what: str, value: object, good: bool = True) -> None:
        self.told[what] = value
        print(f"{'' if good else 'WRONG '}{what}: {value}", flush=True)
        if not good:
            self.wrong.append(what)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part that raises is wrong, and the others go on."""
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            self.tell(name, f"{type(error).__name__}: {str(error)[:600]}", good=False)
        print(f"-- {name}: {time.perf_counter() - start:.1f} s", flush=True)


def error_of(found: Tensor, want: Tensor) -> float:
    """Relative root mean square; infinite where a number is none."""
    found = found.detach().double().cpu()
    return float((found - want).norm() / want.norm()) if bool(found.isfinite().all()) else float("inf")


def encoder_of(mode: str, layers: int = 1, **changes: object) -> TitansEncoder:
    """The documents' sizes, in float64, the flux away from one half and the decays from their initial values."""
    torch.manual_seed(0)
    made = TitansEncoder(TitansEncoderConfig(vocab_size=0, num_layers=layers, mode=mode, **changes), dtype=torch.float64)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "flux" in name or "decay" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def x_of(tokens: int) -> Tensor:
    return torch.randn(1, tokens, 384, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))


def golden(findings: Findings, folder: Path, device: str) -> None:
    """The original's layers, loaded strictly."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    for path in sorted(folder.glob("lam_*_layer_*.safetensors")):
        with safe_open(path, "pt") as opened:
            sizes = {name: int(opened.metadata()[name]) for name in ("d_model", "num_heads")}
        stored = load_file(path)
        layer = TitansDualCore(**sizes, mode="flat" if "after" in path.name else "loop", chunking="original", device=device)  # type: ignore[arg-type]
        layer.load_state_dict({name.removeprefix("sd."): t for name, t in stored.items() if name.startswith("sd.")}, strict=True)
        with torch.no_grad():
            y, (fast, slow), loss = layer(stored["x"].to(device, torch.float32), return_states=True)
        pairs = {"y": y, "S_slow": slow, "ortho_loss": loss.reshape(1), **({"S_fast": fast} if stored["S_fast"].any() else {})}
        worst = max(float((t.cpu() - stored[name]).abs().max() / stored[name].abs().max()) for name, t in pairs.items())
        findings.tell(f"golden {path.stem}", f"{worst:.1e}", worst <= GOLDEN)


def values(findings: Findings, mode: str, device: str, lengths: tuple[int, ...]) -> None:
    """Outputs of ragged lengths, packed and masked ones, and gradients."""
    exact = encoder_of(mode, **({} if mode == "loop" else {"merge": "flux"}))
    for dtype, limit in LIMITS.items():
        ours = copy.deepcopy(exact).to(device, dtype)
        for tokens in lengths:
            x = x_of(tokens)
            with torch.no_grad():
                found = error_of(ours(inputs_embeds=x.to(device, dtype), pool=False).tokens, exact(inputs_embeds=x, pool=False).tokens)
            findings.tell(f"{mode} {str(dtype)[6:]} {tokens} tokens", f"{found:.1e}", found <= limit)
        x, ends = x_of(300), torch.tensor([0, 100, 100, 229, 300], dtype=torch.int32)
        with torch.no_grad():
            packed = ours(inputs_embeds=x.to(device, dtype), cu_seqlens=ends.to(device))
            want = exact(inputs_embeds=x, cu_seqlens=ends)
        found = max(error_of(a, b) for a, b in zip(packed, want, strict=True) if a is not None and b is not None)
        findings.tell(f"{mode} {str(dtype)[6:]} packed", f"{found:.1e}", found <= limit)
    ours, x, weight = copy.deepcopy(exact).to(device, torch.float32), x_of(200), x_of(201)[:, :200]
    grads = []
    for model, part, weights in ((exact, x, weight), (ours, x.to(device, torch.float32), weight.to(device, torch.float32))):
        (model(inputs_embeds=part, pool=False).tokens * weights).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    worst = max((error_of(grad, grads[0][name]), name) for name, grad in grads[1].items() if grads[0][name].norm() > 1e-9)
    findings.tell(f"{mode} gradients, worst {worst[1]}", f"{worst[0]:.1e}", grads[0].keys() == grads[1].keys() and worst[0] <= 1e-2)


def captured(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of run, warmed up, and where its output lies."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), tb.policy(launch="graph"):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return graph, output


def graphs(findings: Findings, mode: str, device: str) -> None:
    """A replay has the bits of a call, on new inputs, after an optimizer has moved the parameters too."""
    model = encoder_of(mode, 2).to(device, torch.float32).requires_grad_(False)
    x = x_of(512).to(device, torch.float32)

    def run() -> Tensor:
        tokens: Tensor = model(inputs_embeds=x, pool=False).tokens
        return tokens

    with torch.no_grad():
        graph, output = captured(run)
        for change in ("the same", "new inputs", "new parameters"):
            if change == "new inputs":
                x.copy_(x.flip(1))
            if change == "new parameters":
                for parameter in model.parameters():
                    parameter.mul_(1.01)
            output.fill_(float("nan"))
            graph.replay()
            with tb.policy(launch="graph"):
                same = torch.equal(output, run())
            findings.tell(f"{mode} graph, {change}", same, same)


def stepping(findings: Findings, device: str) -> None:
    """Pieces, then single tokens from a captured step, are the whole sequence."""
    model = encoder_of("recurrent", 2).to(device, torch.float32).requires_grad_(False)
    x = x_of(180).to(device, torch.float32)
    with torch.no_grad():
        whole = model(inputs_embeds=x, pool=False).tokens.double().cpu()
        cache = model.new_cache(1)
        parts = [model(inputs_embeds=part, cache=cache, pool=False).tokens for part in x[:, :120].split([70, 1, 4, 45], 1)]
        token = x[:, :1].clone()
        kept = copy.deepcopy(cache)
        graph, output = captured(lambda: model(inputs_embeds=token, cache=cache, pool=False).tokens)
        for mine, before in zip(cache, kept, strict=True):  # the warm-up fed tokens
            mine.position = before.position
            for tensor, held in zip(mine.tensors(), before.tensors(), strict=True):
                tensor.copy_(held)
        for t in range(120, 180):
            token.copy_(x[:, t : t + 1])
            graph.replay()
            parts.append(output.clone())
    found = error_of(torch.cat(parts, 1), whole)
    findings.tell("recurrent in pieces and captured steps", f"{found:.1e}", found <= LIMITS[torch.float32])


def compiled(findings: Findings, mode: str, device: str) -> None:
    """One graph under torch.compile with CUDA graphs."""
    torch.compiler.reset()
    model = encoder_of(mode).to(device, torch.float32).requires_grad_(False)
    x = x_of(128).to(device, torch.float32)
    fast = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(3):
            y = fast(inputs_embeds=x, pool=False).tokens.clone()
        found = error_of(y, model(inputs_embeds=x, pool=False).tokens.double().cpu())
    findings.tell(f"{mode} compiled", f"{found:.1e}", found <= LIMITS[torch.float32])


def figures(findings: Findings, mode: str, device: str) -> None:
    """Six layers: kernels a layer, eager and graph time at 512 tokens, peak memory at 65536."""
    model = encoder_of(mode, 6).to(device, torch.float32).requires_grad_(False)
    with torch.no_grad():
        x = x_of(512).to(device, torch.float32)

        def run() -> Tensor:
            tokens: Tensor = model(inputs_embeds=x, pool=False).tokens
            return tokens

        for _ in range(5):
            run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        kernels = sorted(((e.device_time_total, e.count, e.key) for e in profile.key_averages() if e.device_time_total), reverse=True)
        findings.tell(f"{mode} kernels a layer", sum(count for _, count, _ in kernels) / 6)
        for us, count, name in kernels:
            findings.tell(f"{mode} kernel {name[:90]}", f"{count} in {us:.0f} us")

        def wall(call: Callable[[], object]) -> float:
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(20):
                call()
            torch.cuda.synchronize()
            return (time.perf_counter() - start) / 20 * 1e3

        graph, _ = captured(run)
        findings.tell(f"{mode} 512 tokens, eager, ms", round(min(wall(run) for _ in range(3)), 3))
        findings.tell(f"{mode} 512 tokens, graph, ms", round(min(wall(graph.replay) for _ in range(3)), 3))
        del graph
        if mode == "loop":
            return
        long = torch.randn(1, 65536, 384, device=device)
        model(inputs_embeds=long, pool=False)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(inputs_embeds=long, pool=False)
        findings.tell(f"{mode} 65536 tokens, MiB above what was held", round((torch.cuda.max_memory_allocated() - held) / 2**20))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", type=Path)
    parser.add_argument("--backend")
    parser.add_argument("--parts", default="values,graphs,figures,stepping", help="of values, graphs, figures, stepping, compiled")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--quick", action="store_true", help="fewer lengths")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    findings, device = Findings(), given.device
    lengths = (1, 40, 257) if given.quick else (1, 40, 128, 257, 1000)
    with tb.use_backend(given.backend) if given.backend else contextlib.nullcontext():
        if given.golden is not None:
            with findings.part("golden"):
                golden(findings, given.golden, device)
        parts, card = given.parts.split(","), device == "cuda"
        for mode in given.modes.split(","):
            if "values" in parts:
                with findings.part(f"{mode} values"):
                    values(findings, mode, device, lengths)
            for name, part in (("graphs", graphs), ("figures", figures), ("compiled", compiled)):
                if card and name in parts:
                    with findings.part(f"{mode} {name}"):
                        part(findings, mode, device)
        if card and "stepping" in parts:
            with findings.part("stepping"):
                stepping(findings, device)
    if given.json is not None:
        given.json.write_text(json.dumps({"told": findings.told, "wrong": findings.wrong}, indent=1))
    print(f"{len(findings.told)} findings, {len(findings.wrong)} wrong", *findings.wrong, sep="\n")
    return 1 if findings.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
