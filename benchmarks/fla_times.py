"""Our functions of FLA's signatures against FLA's in time, for benchmarks/fla_check.py: forward, forward and backward, decode; eager and in a graph."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import fla.ops.delta_rule as ungated
import fla.ops.gated_delta_rule as gated
import torch
from fla_found import Found, error
from torch import Tensor

import titans_backends.integrations.fla as ours

__all__ = ["Cell", "operands", "raw_gates", "times"]

Run = Callable[[], object]
Given = dict[str, Any]
"""Arguments by name: tensors and switches."""


class Cell(NamedTuple):
    """The sizes of a call: q and k have `groups` heads, v has `heads`."""

    batch: int
    tokens: int
    groups: int
    heads: int
    dim: int


class Case(NamedTuple):
    """A function of theirs and of ours, and what both are given."""

    what: str
    theirs: Callable[..., Any]
    mine: Callable[..., Any]
    cell: Cell
    given: Given
    trains: bool


def operands(cell: Cell, device: torch.device, dtype: torch.dtype) -> Given:
    """Unit queries and keys, decays and rates around a half, seeded."""
    batch, tokens, groups, heads, dim = cell
    made = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, device=device, dtype=torch.float32)

    q, k = (torch.nn.functional.normalize(normal(batch, tokens, groups, dim), dim=-1).to(dtype) for _ in range(2))
    v = normal(batch, tokens, heads, dim).to(dtype)
    return {"q": q, "k": k, "v": v, "g": torch.nn.functional.logsigmoid(normal(batch, tokens, heads)), "beta": normal(batch, tokens, heads).sigmoid()}


def all_heads(given: Given) -> Given:
    """Without grouped heads, which FLA's ungated rule has not, and without g."""
    many = given["v"].shape[2] // given["q"].shape[2]
    return {"q": given["q"].repeat_interleave(many, 2), "k": given["k"].repeat_interleave(many, 2), "v": given["v"], "beta": given["beta"]}


def raw_gates(given: Given) -> Given:
    """As FLA's layer calls it: gates and norms in the kernel, V-first states."""
    heads, device = given["v"].shape[2], given["v"].device
    zeros = {"A_log": torch.zeros(heads, device=device), "dt_bias": torch.zeros(heads, device=device)}
    on = ("use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "use_qk_l2norm_in_kernel", "state_v_first")
    return {**given, **zeros, **dict.fromkeys(on, True)}


def race(device: torch.device, calls: Mapping[str, Run], rounds: int) -> dict[str, tuple[float, float]]:
    """Medians of interleaved calls in microseconds: by events on the stream (on a CPU by the clock), and by the host's clock until all is done."""
    got: dict[str, list[float]] = {name: [] for name in calls}
    wall: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if device.type != "cuda":
                begin = time.perf_counter()
                call()
                wall[name].append((time.perf_counter() - begin) * 1e6)
                got[name].append(wall[name][-1])
                continue
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            first.record()
            call()
            last.record()
            torch.cuda.synchronize()
            wall[name].append((time.perf_counter() - begin) * 1e6)
            got[name].append(first.elapsed_time(last) * 1e3)
    return {name: (statistics.median(got[name]), statistics.median(wall[name])) for name in calls}


def graphed(call: Run) -> tuple[Run, object]:
    """A replay of the call from a CUDA graph, and what it returns, which must be kept."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    return graph.replay, kept


def cases(found: Found) -> list[Callable[[], Case]]:
    """Each makes its operands when its turn comes."""
    dtype = torch.bfloat16 if found.gpu else torch.float32
    cells = [Cell(1, 4096, 16, 32, 128), Cell(1, 32768, 16, 32, 128)] if found.gpu else [Cell(1, 128, 2, 4, 32)]
    decodes = [Cell(rows, 1, 16, 32, 128) for rows in (1, 8, 64)] if found.gpu else [Cell(2, 1, 2, 4, 32)]

    def case(name: str, theirs: Any, shape: Callable[[Given], Given], cell: Cell, note: str, trains: bool = True) -> Callable[[], Case]:
        what = f"{name}{note} {cell.batch}x{cell.tokens}"
        return lambda: Case(what, getattr(theirs, name), getattr(ours, name), cell, shape(operands(cell, found.device, dtype)), trains)

    return [
        *(case("chunk_gated_delta_rule", gated, dict, cell, "") for cell in cells),
        *(case("chunk_gated_delta_rule", gated, raw_gates, cell, " in-kernel gates") for cell in cells),
        *(case("chunk_delta_rule", ungated, all_heads, cell, " all heads") for cell in cells),
        *(case("fused_recurrent_gated_delta_rule", gated, raw_gates, cell, " in-kernel gates", False) for cell in decodes),
    ]


def times(found: Found) -> None:
    """Every case that the time reaches: outputs and gradients alike, then both timed."""
    made = cases(found)
    for index, make in enumerate(made):
        if found.left < 12:
            return found.say(None, f"times: no time for the last {len(made) - index} cases of {len(made)}")
        case = make()
        if not found.wants(case.what):
            continue
        found.attempt(case.what, timed, found, case)
    return None


def answers(found: Found, what: str, calls: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """What each side returns; one that raises is said and taken out of `calls`."""
    outputs = {}
    for name, call in list(calls.items()):
        try:
            outputs[name] = call()
        except Exception as failed:
            found.say(None, f"{what}: {name} raises", error=str(failed)[:160])
            del calls[name]
    return outputs


def timed(found: Found, case: Case) -> None:
    """One case in both directions."""
    functions, rounds = {"fla": case.theirs, "ours": case.mine}, 20 if found.gpu else 3
    options: dict[str, Given] = {name: {} for name in functions}
    if not case.trains:
        state = torch.randn(case.cell.batch, case.cell.heads, case.cell.dim, case.cell.dim, device=found.device)
        options = {name: {"initial_state": state, "output_final_state": True} for name in functions}

    def forward(name: str) -> Callable[[], Any]:
        def call() -> Any:
            with torch.no_grad():
                return functions[name](**case.given, **options[name])[0]

        return call

    calls = {name: forward(name) for name in functions}
    outputs = answers(found, case.what, calls)
    if len(outputs) == 2:
        e = error(outputs["ours"], outputs["fla"])
        found.say(e < 2e-2, f"{case.what}: outputs alike", o=e)
    report(found, case.what, "forward", calls, rounds)
    if not case.trains:  # a loop gives each the state that it returned: ours is a V-first view of a memory that is not
        for name, function in functions.items():
            if name in calls:
                options[name]["initial_state"] = function(**case.given, **options[name])[1]
        report(found, f"{case.what}, its own state", "forward", calls, rounds)
        return
    leaves = {key: x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in case.given.items()}
    inputs, weight = [x for x in leaves.values() if isinstance(x, Tensor)], torch.randn_like(case.given["v"])

    def train(function: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(**leaves)[0], inputs, weight)

    calls = {name: train(functions[name]) for name in calls}
    grads = answers(found, f"{case.what} backward", calls)
    if len(grads) == 2:
        worst = max(error(a, b) for a, b in zip(grads["ours"], grads["fla"], strict=True))
        found.say(worst < 3e-2, f"{case.what}: gradients alike", worst=worst)
    report(found, case.what, "forward+backward", calls, rounds)


def report(found: Found, what: str, mode: str, calls: Mapping[str, Run], rounds: int) -> None:
    """Times both sides, eager and in a graph, and keeps the figures."""
    if not calls:
        return
    for call in calls.values():
        for _ in range(3):
            call()
    figures = {name: {"eager_us": us, "wall_us": wall} for name, (us, wall) in race(found.device, calls, rounds).items()}
    if found.gpu:
        replays: dict[str, Run] = {}
        kept = []  # what a graph writes to
        for name, call in calls.items():
            try:
                replays[name], held = graphed(call)
                kept.append(held)
            except Exception as failed:
                found.say(None, f"{what} {mode}: {name} cannot be captured", error=str(failed)[:160])
                torch.cuda.synchronize()
        for name, (us, _) in race(found.device, replays, rounds).items():
            figures[name]["graph_us"] = us
    found.times.append({"what": what, "mode": mode, **figures})
    told = (f"{name} " + " ".join(f"{key.removesuffix('_us')} {us:.0f}" for key, us in each.items()) for name, each in figures.items())
    print("TIME", what, mode, "us:", "; ".join(told), flush=True)
