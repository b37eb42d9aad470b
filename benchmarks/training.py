"""Forward and backward of the Triton backend on a GPU, bf16: against the peers, against the floor, and the memory that it takes; checked first.

    python benchmarks/training.py [--parts peers,seeds,memory] [--cells 1x8192,12/12] [--candidates default|best] [--peers fla,flash_qla] [--json FILE]

    peers    gated_delta_rule on the cells of the peers' table beside FLA's Triton path, FlashQLA (head_dim 128) and FLA's delta rule without a gate
    seeds    fast_core, fused_uw, uw_transform, slow_core and dual_core at 1x8192, 16/32 heads of 128 and 12 heads of 32: the share of the floor
    memory   the peak of a training call of gated_delta_rule at 1x32768 16/32, its states computed again and stored, beside the peers'

A step is the op called on inputs that all want a gradient, the final state asked for where the forward's benchmarks ask for it, and
torch.autograd.grad with a gradient of every output but the state: one CUDA graph from a cold cache, or the same called eagerly. Every forward,
every backward and every step is compared with autograd through the float64 chunk form, on the first and the last head of q and k with all their v
heads, before it is timed; what is wrong has no time, and where it is ours the exit status is 1. `best` (the default) checks and races all of the
backend's candidates, each direction alone as the tuner does, and makes a step of the best pair that computes the states again and of the best that
stores them; `default` is what a plain call gets. FLA's gated backward wants TileLang on Hopper with Triton 3.4 to 3.7.0, for one kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import cast

import torch
from against_fla import CELLS, Cell, hurry, problem
from device_timing import Ceilings, Race, ahead, arriving, ceilings, default_pair, eager, forced, module_of, offered_in_training, work
from seeds import LARGE, SMALL, Task, call_of
from training_peers import OTHERS, Function, loaded, release, settle, step_of, subject_of, takes, warmed
from training_report import AGAIN, STORED, Line, memory_table, peers_table, problem_shown
from training_steps import RULE, Found, Problem, Run, Truth, handed, ours, posed

import titans_backends as tb
from titans_backends.backend import Candidate, TrainableOpModule
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.contract import Call, Work
from titans_backends.contracts.tolerance import tolerance
from titans_backends.offers import Pair
from titans_backends.plan import Handed
from titans_backends.tuning.peak import peak_mib

PARTS = ("peers", "seeds", "memory")
NAMES = (
    "1x8192 16/32 D128", "1x8192 16/64 D128", "1x8192 2/8 D128", "1x8192 12/12 D32", "8x1024 16/32 D128", "1x2048 16/64 D128",
    "1x32768 16/32 D128", "1x32768 2/8 D128", "1x32768 16/64 D128",
)  # fmt: skip
"""8192 tokens first: FLA tunes itself at its first call, and keeps the choice for every length."""
TRAINED = tuple(next(cell for cell in CELLS if str(cell) == name) for name in NAMES)
MEMORY = "1x32768 16/32 D128"
LIMIT = tolerance(torch.bfloat16)


def check(line: Line, truth: Truth, found: Found, *, peer: bool = False) -> None:
    """Notes the errors, and what is wrong: over the golden table's limits; a peer is held to the root mean square alone."""
    line.errors, line.largest = truth.errors(found)
    line.checked_tokens = truth.subject.tokens
    for name, rms in line.errors.items():
        limit = LIMIT.gradients if name.removeprefix("d") in CONTRACTS[truth.subject.op].differentiable and name.startswith("d") else LIMIT.outputs
        worst = rms if peer else max(rms, line.largest[name])
        if worst > limit:
            line.failed = f"wrong: {name} is off by {worst:.1e}, where {limit:.0e} is allowed"
            return


def attempted(line: Line, action: Callable[[], None]) -> bool:
    """Does it, or notes why not; a device that has faulted ends everything, and says so at the next synchronisation."""
    try:
        action()
    except Exception as error:
        if isinstance(error, torch.AcceleratorError):  # a capture that failed is one too, and harms nothing
            torch.cuda.synchronize()
        line.failed = f"{type(error).__name__}: {str(error)[:300]}"
    if line.failed:
        torch.cuda.empty_cache()
    return not line.failed


def alone(
    subject: Problem, truth: Truth, forward: Sequence[Candidate], backward: Sequence[Candidate], budget_s: float
) -> tuple[dict[Candidate, float], list[Line]]:
    """Every candidate of both directions by itself, checked and then raced in graphs: microseconds, and what failed."""
    module, contract, race = cast(TrainableOpModule, module_of(subject.op)), CONTRACTS[subject.op], Race(shared=True)
    needs = arriving(subject.op, subject.call)[2]
    named = {str(index): candidate for index, candidate in enumerate((*forward, *backward))}
    failed: list[Line] = []
    states: dict[tuple[bool, str], Handed] = {}

    def result(candidate: Candidate, of: Problem) -> Found:
        if candidate.direction == "forward":
            found = module.run(of.call, candidate)
            return {spec.name: o for spec, o in zip(contract.outputs, found, strict=False) if o is not None}
        place = (of is subject, candidate.residual)
        if candidate.saves_states and place not in states:
            raise RuntimeError(f"it wants {candidate.residual or 'saved states'}, but no forward that saves them was right")
        given = states[place] if candidate.saves_states else None
        gradients = module.run_backward(of.call, of.grads, given, needs, candidate)
        return {f"d{name}": x for name, x in zip(contract.differentiable, gradients, strict=True) if x is not None}

    for name, candidate in named.items():
        line = Line("", subject.op, subject.name, f"the {candidate.direction} alone", candidate.label + " saves_states" * candidate.saves_states)

        def admit(line: Line = line, name: str = name, candidate: Candidate = candidate) -> None:
            check(line, truth, result(candidate, truth.subject))
            if not line.failed:
                race.add(name, lambda: result(candidate, subject))
            if not line.failed and candidate.saves_states and candidate.direction == "forward" and (True, candidate.residual) not in states:
                states.update({(of is subject, candidate.residual): handed(module, of, candidate) for of in (truth.subject, subject)})

        if not attempted(line, admit):
            failed.append(line)
    return {named[name]: us for name, us in race.times(budget_s).items()}, failed


def pairs_of(subject: Problem, truth: Truth, asked: str, budget_s: float) -> tuple[dict[Pair, str], dict[Candidate, float], list[Line]]:
    """What is made a step of, with its names; each candidate's time alone; what failed."""
    first = default_pair(subject.op, subject.call)
    assert first.backward is not None
    forward, backward = [first.forward], [first.backward]
    if asked == "best":
        offer = offered_in_training(subject.op, subject.call)
        forward = list(dict.fromkeys((*forward, *offer.forward)))
        backward = list(dict.fromkeys((*backward, *offer.backward)))
    times, failed = alone(subject, truth, forward, backward, budget_s)
    named = {first: "default"}
    stores = any(one.saves_states for one in backward)
    for saves, name in ((False, AGAIN if stores else "best"), (True, STORED)):
        ends = [min((c for c in some if c in times and c.saves_states == saves), key=times.__getitem__, default=None) for some in (forward, backward)]
        if asked == "best" and ends[0] is not None and ends[1] is not None and ends[0].agrees(ends[1]):
            pair = Pair(ends[0], ends[1])
            named[pair] = f"{named[pair]}, {name}" if pair in named else name
    return named, times, failed


@dataclass(frozen=True, slots=True)
class Entrant:
    """One way to do a problem's step. `pair`: ours, forced while it is made; a peer has a problem of its own where its function is another."""

    who: str
    subject: Problem
    truth: Truth
    make: Callable[[Problem], Run]
    pair: Pair | None = None

    def within(self) -> contextlib.AbstractContextManager[None]:
        """Where its steps run."""
        return contextlib.nullcontext() if self.pair is None else forced(self.subject.op, self.pair.forward, self.pair.backward)

    def line(self, part: str, floor: float = math.nan) -> Line:
        """Nothing measured yet."""
        given = sum(x.nbytes for x in CONTRACTS[self.subject.op].tensors(self.subject.call).values())
        pair = "" if self.pair is None else self.pair.label + " (stored)" * self.pair.forward.saves_states
        return Line(part, self.subject.op, self.subject.name, self.who, pair, floor, inputs_mib=given / 2**20)

    def checked(self, line: Line) -> Run | None:
        """Its step, where its results are right on what the truth knows."""
        check(line, self.truth, self.make(self.truth.subject)(), peer=self.pair is None)
        return None if line.failed else self.make(self.subject)


def measure(part: str, subject: Problem, truth: Truth, others: Sequence[Entrant], asked: argparse.Namespace, top: Ceilings) -> list[Line]:
    """One problem: ours and the peers' steps are checked, their peaks and eager times taken, and they are raced in graphs."""
    floor, device = floor_us(subject, top), subject.device
    lines: list[Line] = []
    entrants = list(others)
    times: dict[Candidate, float] = {}

    def choose() -> None:
        named, found, failed = pairs_of(subject, truth, asked.candidates, asked.budget)
        times.update(found)
        lines.extend(replace(line, part=part) for line in failed)
        entrants[:0] = [Entrant(who, subject, truth, ours, pair) for pair, who in named.items()]

    refused = Line(part, subject.op, subject.name, "default", floor_us=floor)
    if not attempted(refused, choose):
        lines.append(refused)
    torch.cuda.empty_cache()
    race = Race(shared=True)
    for entrant in entrants:
        line = entrant.line(part, floor)
        lines.append(line)

        def enter(entrant: Entrant = entrant, line: Line = line) -> None:
            with entrant.within():
                run = entrant.checked(line)
                if run is not None:
                    run()  # a first call may take other memory
                    line.peak_mib = peak_mib(run, device)
                    race.add(entrant.who, run)
            if run is not None:  # a plain call's own choice for the default
                with contextlib.nullcontext() if entrant.who.startswith("default") else entrant.within():
                    found = eager(run)
                    line.wall_us, line.host_us = found.wall_us, found.host_us

        attempted(line, enter)
        if entrant.pair is not None:
            line.forward_us, line.backward_us = (times.get(c, math.nan) if c else math.nan for c in (entrant.pair.forward, entrant.pair.backward))
    graphs = race.times(asked.budget)
    for line in lines:
        line.graph_us = graphs.get(line.who, math.nan)
    return lines


def floor_us(subject: Problem, top: Ceilings) -> float:
    """What training cannot avoid: inputs, outputs, the gradients that arrive and those that leave, each once; three times the forward's products."""
    forward, contract = work(subject.op, subject.call), CONTRACTS[subject.op]
    leaving = sum(x.nbytes for name, x in contract.tensors(subject.call).items() if name in contract.differentiable)
    there = sum(x.nbytes for x in subject.grads if x is not None)
    return top.floor_us(Work(3 * forward.flop, forward.bytes + leaving + there), torch.bfloat16)


def memories(subject: Problem, truth: Truth, others: Sequence[Entrant]) -> list[Line]:
    """The peak of every pair whose forward is its class's first, and the peers'."""
    offer = offered_in_training(subject.op, subject.call)
    entrants = list(others)
    for saves, name in ((False, AGAIN), (True, STORED)):
        first = next((one for one in offer.forward if one.saves_states == saves), None)
        found = [one for one in offer.backward if first is not None and one.agrees(first)]
        entrants += [Entrant(f"{name} {index}", subject, truth, ours, Pair(first, one)) for index, one in enumerate(found) if first is not None]
    lines = []
    for entrant in entrants:
        line = entrant.line("memory")
        lines.append(line)

        def enter(entrant: Entrant = entrant, line: Line = line) -> None:
            with entrant.within():
                run = entrant.checked(line)
                if run is not None:
                    run()
                    line.peak_mib = peak_mib(run, subject.device)

        attempted(line, enter)
    return lines


class Peers:
    """The peers' functions, and which heads FLA has tuned itself for."""

    def __init__(self, functions: Mapping[str, Function]) -> None:
        self.functions = functions
        self._settled: set[tuple[str, int, int, int]] = set()

    def entrants(self, part: str, cell: Cell, subject: Problem, truth: Truth) -> tuple[list[Entrant], list[Line]]:
        """Those that take a cell, and those that failed before they could begin."""
        found, failed = list[Entrant](), list[Line]()
        for name in (name for name in self.functions if takes(name, cell, self.functions)):
            line = Line(part, subject.op, subject.name, name)
            if not attempted(line, lambda name=name: found.append(self._entrant(name, cell, subject, truth))):  # type: ignore[misc]
                failed.append(line)
        return found, failed

    def _entrant(self, name: str, cell: Cell, subject: Problem, truth: Truth) -> Entrant:
        function, kind = self.functions[name], (name, cell.G, cell.H, cell.D)
        if kind not in self._settled:
            settle(name, function, cell)
            self._settled.add(kind)
        own = subject_of(name, subject)
        known = truth if own is subject else Truth(own, None if truth.subject is subject else truth.subject.tokens)
        return Entrant(name, own, known, lambda of: step_of(name, function, of))


def main() -> int:
    """Measures the parts; 1 where one of ours fails or is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"comma-separated, of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--cells", default="", help="comma-separated parts of `op case`, as 1x8192,slow_core (default: all); `--list` prints them")
    parser.add_argument("--list", action="store_true", help="print the problems and stop")
    parser.add_argument("--candidates", choices=("default", "best"), default="best")
    parser.add_argument("--peers", default=",".join(OTHERS), help=f"comma-separated, of {', '.join(OTHERS)} (default: all)")
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    parser.add_argument(
        "--budget", type=float, default=2.0, metavar="S", help="seconds of graph replays a race, of which a problem has two (default 2)"
    )
    parser.add_argument("--check-tokens", type=int, metavar="T", help="check the first tokens of a problem only (default: all that fit the memory)")
    parser.add_argument("--ahead-limit", type=float, default=360.0, metavar="S", help="the longest that the peers may compile ahead (default 360)")
    parser.add_argument("--limit", type=float, default=math.inf, metavar="S", help="begin no problem after so many seconds")
    parser.add_argument("--json", type=Path, metavar="FILE")
    asked = parser.parse_args()
    parts, names = asked.parts.split(","), [] if asked.no_peers else [name for name in asked.peers.split(",") if name]
    for option, given, known in (("--parts", parts, PARTS), ("--peers", names, tuple(OTHERS))):
        if set(given) - set(known):
            parser.error(f"{option} {','.join(given)}: known are {', '.join(known)}")
    todo = [one for one in tasks(parts) if any(text in one.title for text in asked.cells.split(","))]
    if asked.list or not todo:
        print("\n".join(f"{one.part:7s} {one.title}" for one in tasks(PARTS)))
        return 0 if asked.list else 2
    if not torch.cuda.is_available():
        print("error: no CUDA device; this benchmark is for one", file=sys.stderr)
        return 2
    with torch.no_grad():
        return run(asked, todo, names)


@dataclass(frozen=True, slots=True)
class Todo:
    """One problem to be measured: a peers' cell, or an op's task."""

    part: str
    op: str
    name: str
    cell: Cell | None = None
    task: Task | None = None

    @property
    def title(self) -> str:
        """For people, and for `--cells`."""
        return f"{self.op} {self.name}"

    def call(self) -> Call:
        """The inputs, on the device."""
        if self.cell is not None:
            return cast(Call, problem(self.cell))
        assert self.task is not None
        return call_of(self.task)


def tasks(parts: Iterable[str]) -> Iterator[Todo]:
    """What is asked for, in order."""
    if "peers" in parts:
        yield from (Todo("peers", RULE, str(cell), cell=cell) for cell in TRAINED)
    if "seeds" in parts:
        gates = ("fast_gate", "slow_gate")
        for case in (LARGE, SMALL):
            made = (
                ("fast_core", replace(case, given=("gate",))),
                ("fused_uw", case),
                ("uw_transform", replace(case, name=f"{case.name} exact", given=("g",))),
                ("uw_transform", replace(case, name=f"{case.name} lam", given=("g",), options={"transform": "lam"})),
                ("slow_core", replace(case, given=("g",))),
                ("dual_core", replace(case, name=f"{case.name} recurrent exact", given=(*gates, "g"))),
                ("dual_core", replace(case, name=f"{case.name} flat lam", given=gates, options={"memory": "flat", "transform": "lam"})),
            )
            yield from (Todo("seeds", op, one.name, task=Task("training", op, one)) for op, one in made)
    if "memory" in parts:
        yield from (Todo("memory", RULE, str(cell), cell=cell) for cell in TRAINED if str(cell) == MEMORY)


def run(asked: argparse.Namespace, todo: list[Todo], names: list[str]) -> int:
    """Compiles ahead, then one problem after the other; the figures are written as they come."""
    begin, lines = time.perf_counter(), list[Line]()
    cells = [one.cell for one in todo if one.cell is not None]
    functions = loaded(names) if cells else {}
    if functions:
        hurry()

    def wanted() -> Iterator[tuple[str, Call, list[Candidate]]]:
        for one in todo:
            call = one.call()
            try:
                pair, offer = default_pair(one.op, call), offered_in_training(one.op, call)
            except Exception as error:  # told again when it is measured
                print(f"{one.title}: not compiled ahead: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr, flush=True)
                continue
            more = (*offer.forward, *offer.backward) if asked.candidates == "best" or one.part == "memory" else ()
            yield one.op, call, [candidate for candidate in (pair.forward, pair.backward, *more) if candidate is not None]

    cores = os.cpu_count() or 2
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(warmed, list(functions), cells, max(1, cores * 5 // 8), asked.ahead_limit)
        compiled_s = {"ours": ahead(wanted(), max(1, cores * 3 // 8 - 1) if functions else None), "peers": theirs.result()}
    top = ceilings()
    told = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": version("triton"), "titans_backends": tb.__version__,
        "peers": {name: release(name) for name in functions}, "ceilings": asdict(top), "compiled_s": compiled_s,
    }  # fmt: skip
    print(json.dumps(told), flush=True)
    peers = Peers(functions)
    for one in todo:
        if time.perf_counter() - begin > asked.limit:
            print(f"[{time.perf_counter() - begin:5.0f} s] {one.part} {one.title}: not begun, over the limit", flush=True)
            continue
        start, more = time.perf_counter(), list[Line]()

        def one_problem(one: Todo = one, more: list[Line] = more) -> None:
            subject = posed(one.op, one.name, one.call())
            truth = Truth(subject, asked.check_tokens)
            beside, failed = ([], []) if one.cell is None else peers.entrants(one.part, one.cell, subject, truth)
            more.extend(failed)
            more.extend(memories(subject, truth, beside) if one.part == "memory" else measure(one.part, subject, truth, beside, asked, top))

        whole = Line(one.part, one.op, one.name, "the problem")
        if not attempted(whole, one_problem):
            more.append(whole)
        lines.extend(more)
        torch.cuda.empty_cache()
        said = memory_table(more) if one.part == "memory" and len(more) > 1 else problem_shown(more)
        print(f"[{time.perf_counter() - begin:5.0f} s, took {time.perf_counter() - start:.1f} s] {one.part}", *said, sep="\n", flush=True)
        if asked.json is not None:
            asked.json.write_text(json.dumps({**told, "lines": [asdict(line) for line in lines]}, indent=1) + "\n", encoding="utf-8")
    beside = [line for line in lines if line.part == "peers"]
    print(*(peers_table(beside) if beside else ()), sep="\n")
    for line in lines:
        if line.failed:
            print(f"FAILED {line.part} {line.op} {line.what}: {line.who} {line.pair}: {line.failed}")
    return 1 if any(line.failed for line in lines if line.ours) else 0


if __name__ == "__main__":
    sys.exit(main())
