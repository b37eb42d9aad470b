"""One case of a race: every candidate checked and raced by itself, the tuner's rule applied, and the finalists and the peers' own functions timed as users call them.

What is wrong or raises is a line with its reason and without a time. A device that has faulted ends the process; its parent starts another.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from against_fla import problem
from device_timing import Ceilings, Race, arriving, work
from race_cells import Case, Group
from race_choices import Asked, asked_of, leaves, module_of, running, user_of, who_of
from race_peers import Function, takes
from race_reach import Rows, members, racing
from race_results import Chosen, Entrant, Part, Picked, Way, rule_of
from training_steps import RULE, Found, Problem, Run, Truth, handed, posed, rule, step

import titans_backends as tb
from titans_backends import registry
from titans_backends.backend import Candidate
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.contract import Work
from titans_backends.contracts.tolerance import tolerance
from titans_backends.dispatch import Choice
from titans_backends.offers import Pair, pairs
from titans_backends.plan import Handed
from titans_backends.tuning.select import NOISE, combined
from titans_backends.tuning.timing import timing_of

__all__ = ["Rules", "dispatched", "floor_us", "measured", "settled"]

Within = Callable[[], contextlib.AbstractContextManager[None]]

_MOST_KEPT = 30
LIMIT = tolerance(torch.bfloat16)
CONTRACT = CONTRACTS[RULE]


@dataclass(frozen=True, slots=True)
class Rules:
    """How long is measured: seconds of the candidates' race and of the finalists', of each eager series, and how many series each finalist has."""

    alone_s: float = 0.4
    final_s: float = 0.5
    series_s: float = 0.008
    series: int = 6

    def times(self, factor: float) -> Rules:
        """Shorter or longer."""
        return Rules(self.alone_s * factor, self.final_s * factor, self.series_s * factor, max(2, round(self.series * min(1.0, factor))))


class WallRace:
    """The GPU's `Race` for a device without graphs: a call between two looks at the clock."""

    def __init__(self) -> None:
        self._runners: dict[str, Callable[[], object]] = {}

    def add(self, name: str, run: Callable[[], object]) -> None:
        """Warms a runner up."""
        run()
        self._runners[name] = run

    def samples(self, names: Sequence[str], budget_s: float, least: int = 9, most: int = 60) -> dict[str, list[float]]:
        """Some of the runners' times in microseconds, a round after the other without the first."""
        series: dict[str, list[float]] = {name: [] for name in names}
        begin = time.perf_counter()
        for turn in range(most if names else 0):
            if turn >= least and time.perf_counter() - begin > budget_s:
                break
            for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
                start = time.perf_counter()
                self._runners[name]()
                series[name].append(1e6 * (time.perf_counter() - start))
        return {name: found[1:] for name, found in series.items()}


class ForwardTruth:
    """o and the final state in float64, on the first and the last head of q and k with all their v heads."""

    def __init__(self, subject: Problem) -> None:
        self.subject = subject
        call = subject.call
        heads = call.v.shape[2] // call.q.shape[2]  # type: ignore[attr-defined]
        self._groups = {part: slice(part * heads, (part + 1) * heads) for part in sorted({0, call.q.shape[2] - 1})}  # type: ignore[attr-defined]
        self._wanted: dict[int, Found] = {}
        for part, some in self._groups.items():
            given = CONTRACT.tensors(call)
            cut = {name: (x[:, :, part : part + 1] if name in ("q", "k") else x[:, :, some]).double() for name, x in given.items()}
            with torch.no_grad():
                o, state = rule(CONTRACT.with_tensors(call, cut))  # type: ignore[arg-type]
            assert o is not None
            self._wanted[part] = {"o": o} if state is None else {"o": o, "final_state": state}

    def errors(self, found: Found) -> tuple[dict[str, float], dict[str, float]]:
        """Root mean square and maximum of the errors by name, relative; infinite where something is not finite."""
        rms, largest = dict[str, float](), dict[str, float]()
        for name, got in found.items():
            at = [
                (wanted[name], (got[:, :, some] if name == "o" else got[:, some]).double())
                for part, some in self._groups.items()
                if (wanted := self._wanted[part])
            ]
            if not all(bool(torch.isfinite(b).all()) for _, b in at):
                rms[name] = largest[name] = math.inf
                continue
            rms[name] = math.sqrt(sum(float((b - a).square().sum()) for a, b in at) / (sum(float(a.square().sum()) for a, _ in at) or 1.0))
            largest[name] = max(float((b - a).abs().max()) for a, b in at) / (max(float(a.abs().max()) for a, _ in at) or 1.0)
        return rms, largest


def floor_us(subject: Problem, training: bool, top: Ceilings | None) -> float | None:
    """What the call cannot avoid; in training three times the forward's products, and the gradients that arrive and leave beside the tensors."""
    if top is None:
        return None
    least = work(RULE, subject.call)
    if training:
        more = sum(x.nbytes for name, x in CONTRACT.tensors(subject.call).items() if name in CONTRACT.differentiable)
        least = Work(3 * least.flop, least.bytes + more + sum(x.nbytes for x in subject.grads if x is not None))
    return top.floor_us(least, torch.bfloat16)


def wrong(truth: Truth | ForwardTruth, found: Found, *, own: bool = False) -> tuple[dict[str, float], str]:
    """The errors, and what is over the golden table's limits; a peer's own function is held to the root mean square alone."""
    rms, largest = truth.errors(found)
    for name, error in rms.items():
        limit = LIMIT.gradients if name.startswith("d") else LIMIT.outputs
        worst = error if own else max(error, largest[name])
        if not worst <= limit:
            return rms, f"wrong: {name} is off by {worst:.1e}, where {limit:.0e} is allowed"
    return rms, ""


@dataclass(slots=True)
class _Run:
    """One case being measured."""

    case: Case
    group: Group
    anchors: frozenset[str]
    rules: Rules
    device: str
    training: bool
    subject: Problem
    asked: Asked
    truth: Truth | ForwardTruth
    available: Sequence[Pair]
    entrants: dict[str, Entrant] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def race(self) -> Race | WallRace:
        return Race(shared=True) if self.device == "cuda" else WallRace()

    @contextlib.contextmanager
    def spending(self, name: str) -> Iterator[None]:
        """Notes the seconds that a part of the work takes."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - start

    @contextlib.contextmanager
    def kept(self, note: Callable[[str], None]) -> Iterator[None]:
        """What is raised is noted; a device that has faulted says so at the next synchronisation, and ends everything."""
        try:
            yield
        except Exception as error:
            if isinstance(error, torch.AcceleratorError):  # a capture that failed is one too, and harms nothing
                torch.cuda.synchronize()
            note(f"{type(error).__name__}: {str(error).strip()[:200]}")
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def poison(self) -> None:
        """Leaves NaN in the memory that the allocator is likely to hand out next."""
        sizes = [x.numel() for x in CONTRACT.tensors(self.subject.call).values()]
        held = [torch.full((count,), math.nan, device=self.device) for count in sizes]
        del held

    def candidates(self, rows: Rows | None) -> tuple[list[Candidate], list[Candidate]]:
        """Both directions' candidates that race here."""
        named = [pair for pair in self.available if _label(pair) in self.anchors]
        if self.group.whole:
            named += [*(choice.pair for choice in self.asked.choices.values()), self.available[0]]
        always = {candidate for pair in named for candidate in members(pair)}
        return racing(self.asked.offers, self.available, self.group, always, self.asked.buckets[0], rows)

    def alone(self, forward: Sequence[Candidate], backward: Sequence[Candidate]) -> dict[Candidate, tuple[float, float]]:
        """Every candidate by itself, checked and raced as the tuner does: median and spread."""
        states: dict[tuple[bool, str], Handed] = {}
        times: dict[Candidate, tuple[float, float]] = {}
        for some in (forward, backward):
            race, entered = self.race(), dict[str, Candidate]()
            for candidate in some:
                name = str(len(entered))

                def result(of: Problem, candidate: Candidate = candidate) -> Found:
                    return self.found(candidate, of, states)

                with (
                    self.kept(lambda why, candidate=candidate: self.failed.append(f"{candidate.direction} {candidate.label}: {why}")),
                    torch.no_grad(),
                ):  # type: ignore[misc]
                    self.poison()
                    with self.spending(f"first {candidate.backend}"):
                        _, why = wrong(self.truth, result(self.truth.subject))
                    if why:
                        raise ValueError(why)
                    race.add(name, lambda result=result: result(self.subject))  # type: ignore[misc]
                    entered[name] = candidate
                    if candidate.saves_states and candidate.direction == "forward" and (True, candidate.residual) not in states:
                        for of in (self.truth.subject, self.subject):
                            states[of is self.subject, candidate.residual] = handed(module_of(candidate), of, candidate)
            rough = race.samples(list(entered), self.rules.alone_s / 3, least=5, most=9)
            medians = {name: statistics.median(found) for name, found in rough.items()}
            hopeful = [name for name, us in medians.items() if self._hopeful(name, us, medians, entered)]
            fine = race.samples(hopeful, self.rules.alone_s, least=7, most=40)
            for name, candidate in entered.items():
                timing = timing_of(fine.get(name) or rough[name])
                times[candidate] = (timing.us, timing.spread)
        return times

    @staticmethod
    def _hopeful(name: str, us: float, medians: Mapping[str, float], entered: Mapping[str, Candidate]) -> bool:
        """Near the best, or its backend's best, or the default, which is the first."""
        mine = [
            medians[other]
            for other, one in entered.items()
            if one.backend == entered[name].backend and one.saves_states == entered[name].saves_states
        ]
        return us <= 1.15 * min(medians.values()) or us <= 1.03 * min(mine) or name == "0"

    def found(self, candidate: Candidate, of: Problem, states: Mapping[tuple[bool, str], Handed]) -> Found:
        """One run of a candidate, its results by name."""
        module = module_of(candidate)
        if candidate.direction == "forward":
            return {spec.name: o for spec, o in zip(CONTRACT.outputs, module.run(of.call, candidate), strict=False) if o is not None}
        place = (of is self.subject, candidate.residual)
        if candidate.saves_states and place not in states:
            raise ValueError(f"it wants {candidate.residual or 'saved states'}, but no forward that saves them was right")
        given = states[place] if candidate.saves_states else None
        gradients = module.run_backward(of.call, of.grads, given, arriving(RULE, of.call)[2], candidate)  # type: ignore[union-attr]
        return {f"d{name}": x for name, x in zip(CONTRACT.differentiable, gradients, strict=True) if x is not None}

    def contenders(self, times: Mapping[Candidate, tuple[float, float]]) -> dict[Pair, Picked]:
        """Every pair that passed, as the tuner's rule takes it."""
        found = {}
        for order, pair in enumerate(self.available):
            ends = members(pair)
            if all(candidate in times for candidate in ends):
                us, spread = combined([times[candidate] for candidate in ends])
                simplicity = max(registry.get(candidate.backend).simplicity for candidate in ends)
                found[pair] = Picked(_label(pair), who_of(pair), us, spread, simplicity, order)
        return found

    def finalists(self, contenders: Mapping[Pair, Picked]) -> list[Pair]:
        """The default, what dispatch chooses, what the rule chooses, every backend's best and the best of two backends; in later runs what the first had too."""
        by_label = {one.label: pair for pair, one in contenders.items()}
        kept = [pair for pair in contenders if _label(pair) in self.anchors]
        if self.group.whole:
            kept += [self.available[0], *(choice.pair for choice in self.asked.choices.values())]
        best: dict[str, Pair] = {}
        for pair, one in sorted(contenders.items(), key=lambda item: item[1].us):
            who = "two" if "+" in one.who else one.who
            best.setdefault(who, pair)
        kept += [pair for who, pair in best.items() if who in self.group.backends or (who == "two" and self.group.whole)]
        picked = rule_of(list(contenders.values()))
        kept += [by_label[picked]] if self.group.whole and picked in by_label else []
        return [pair for pair in dict.fromkeys(kept) if pair in contenders]

    def timed(self, finalists: Sequence[Pair], functions: Mapping[str, Function]) -> None:
        """Checks the finalists and the peers as users call them, and times them in turns: in graphs, then eagerly."""
        within: dict[str, Within] = {}
        makers: dict[str, Callable[[Problem], Run]] = {}
        for pair in finalists:
            label = _label(pair)
            self.entrants[label] = Entrant(label, who_of(pair))
            within[label] = lambda pair=pair: running(self.asked, pair)  # type: ignore[misc]
            makers[label] = lambda of, pair=pair: user_of(of, pair, self.training)  # type: ignore[misc]
        for name, function in functions.items():
            if takes(name, self.case):
                label = f"{name}, own call"
                self.entrants[label] = Entrant(label, name, "other" if name == "fla_ungated" else "own")
                within[label] = contextlib.nullcontext
                makers[label] = lambda of, function=function: self.own(of, function)  # type: ignore[misc]
        race, ready = self.race(), list[str]()
        for label, make in makers.items():
            with (
                self.spending("first as called"),
                self.kept(lambda why, label=label: self.note(label, failed=why)),
                torch.set_grad_enabled(self.training),
            ):  # type: ignore[misc]
                self.poison()
                with within[label](), tb.policy(launch="graph"):
                    self.check(label, make)
                    if not self.entrants[label].failed:
                        run = make(self.subject)
                        race.add(label, run if self.device == "cuda" else _inside(within[label], run))
                        ready.append(label)
        for label, samples in race.samples(ready, self.rules.final_s, least=9, most=60).items():
            timing = timing_of(samples)
            self.note(label, graph_us=timing.us, graph_spread=timing.spread)
        with self.spending("eager"):
            self.eager({label: (makers[label], within[label]) for label in ready})

    def check(self, label: str, make: Callable[[Problem], Run]) -> None:
        """Notes an entrant's errors. Where the truth knows the first tokens alone, ours were checked on these candidate by candidate."""
        entrant = self.entrants[label]
        if entrant.kind == "other" or (entrant.kind == "backend" and self.truth.subject is not self.subject):
            return
        errors, why = wrong(self.truth, make(self.truth.subject)(), own=entrant.kind == "own")
        self.note(label, errors=errors, failed=why)

    def own(self, of: Problem, function: Function) -> Run:
        """A peer's own function on the case's tensors."""
        given, state = leaves(of, self.training), bool(of.call.output_final_state)  # type: ignore[attr-defined]
        if self.training:
            return step(of, lambda x: function(x, state), given)
        names = [spec.name for spec in CONTRACT.outputs]
        return lambda: {name: x for name, x in zip(names, function(given, state), strict=True) if x is not None}

    def note(self, label: str, **values: object) -> None:
        self.entrants[label] = replace(self.entrants[label], **values)  # type: ignore[arg-type]

    def eager(self, runners: Mapping[str, tuple[Callable[[Problem], Run], Within]]) -> None:
        """Series of calls back to back, in turns; the first half of an entrant's series is for a choice, the second for its figure."""
        walls: dict[str, list[float]] = {label: [] for label in runners}
        hosts: dict[str, list[float]] = {label: [] for label in runners}
        counts: dict[str, int] = {}
        names = list(runners)
        for turn in range(self.rules.series if names else 0):
            for label in (*names[turn % len(names) :], *names[: turn % len(names)]):
                if self.entrants[label].failed:
                    continue
                make, within = runners[label]
                with self.kept(lambda why, label=label: self.note(label, failed=why)), torch.set_grad_enabled(self.training), within():  # type: ignore[misc]
                    run = make(self.subject)
                    run()
                    if label not in counts:
                        counts[label] = max(3, min(40, int(self.rules.series_s / self.series(run, 2)[0])))
                    wall, host = self.series(run, counts[label])
                    walls[label].append(1e6 * wall)
                    hosts[label].append(1e6 * host)
        for label, found in walls.items():
            if not self.entrants[label].failed:
                first, second = timing_of(found[: len(found) // 2]), timing_of(found[len(found) // 2 :])
                host = statistics.median(hosts[label])
                self.note(label, wall_us=second.us, wall_spread=second.spread, pick_us=first.us, pick_spread=first.spread, host_us=host)

    def series(self, run: Run, count: int) -> tuple[float, float]:
        """Seconds of a call among some made back to back: until the device has done them all, and until the host is free."""
        self.wait()
        start = time.perf_counter()
        for _ in range(count):
            run()
        free = time.perf_counter()
        self.wait()
        return (time.perf_counter() - start) / count, (free - start) / count

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def _inside(within: Within, run: Run) -> Run:
    """A call that enters its context each time, for a race without graphs."""

    def entered() -> Found:
        with within():
            return run()

    return entered


def _label(pair: Pair) -> str:
    return pair.label + " (states stored)" * pair.forward.saves_states


def settled(functions: Mapping[str, Function], case: Case, done: set[tuple[object, ...]]) -> None:
    """Lets FLA tune itself on 8192 tokens of a case's heads before it meets another length: it keeps its first choice."""
    kind = (case.cell.G, case.cell.H, case.cell.D, case.mode)
    if kind in done:
        return
    done.add(kind)
    some = Case(replace(case.cell, B=1, T=8192), case.mode)
    for name in ("fla", "fla_ungated"):
        if name in functions and takes(name, some):
            with contextlib.suppress(Exception):  # told where it is measured
                given = leaves(_posed(some, "cuda"), case.mode == "training")
                with torch.set_grad_enabled(case.mode == "training"):
                    o = functions[name](given, case.mode == "forward")[0]  # with the state it is another kernel
                    if case.mode == "training" and o is not None:
                        torch.autograd.grad(o, list(given.values()), torch.randn_like(o), allow_unused=True)
                torch.cuda.synchronize()


def _posed(case: Case, device: str) -> Problem:
    """The case's inputs; in training the gradients that arrive."""
    call, training = problem(case.cell, device=device), case.mode == "training"
    call.output_final_state = not training  # as the tuner times them: a state is what inference goes on with
    return posed(RULE, str(case), call) if training else Problem(RULE, str(case), call, ())


def measured(
    case: Case,
    group: Group,
    functions: Mapping[str, Function],
    first: Part | None,
    rules: Rules,
    device: str,
    top: Ceilings | None,
    rows: Rows | None = None,
) -> Part:
    """A group's part of a case. `first`: the first group's, whose finalists a later group measures again as its yardstick; `rows`: see `race_reach`."""
    begin, training = time.perf_counter(), case.mode == "training"
    subject = _posed(case, device)
    asked = asked_of(subject, training)
    available = pairs(asked.offers, asked.signature)
    refused = {one.backend.name: str(one.verdict) for one in asked.offers if not one.verdict}
    if not group.whole and not any(takes(name, case) for name in functions) and not any(who_of(pair) in group.backends for pair in available):
        return Part(refused=refused, seconds=time.perf_counter() - begin)
    truth: Truth | ForwardTruth = Truth(subject) if training else ForwardTruth(subject)
    solved_s = time.perf_counter() - begin
    anchors = frozenset() if first is None else frozenset(one.label for one in first.entrants if one.kind == "backend" and one.graph_us is not None)
    run = _Run(case, group, anchors, rules, device, training, subject, asked, truth, available)
    run.spent["inputs and float64"] = solved_s
    forward, backward = run.candidates(rows)
    with run.spending("alone"):
        contenders = run.contenders(run.alone(forward, backward))
    with run.spending("finalists"):
        run.timed(run.finalists(contenders), functions)
    return Part(
        tuple(run.entrants.values()),
        tuple(_near(list(contenders.values()))),
        _chosen(asked),
        refused,
        _label(run.available[0]),
        len(forward) + len(backward),
        floor_us(subject, training, top),
        time.perf_counter() - begin,
        "; ".join(run.failed),
        run.spent,
    )


def dispatched(case: Case, device: str) -> dict[Way, Chosen]:
    """What `get_op` runs in a case with what is shipped today; nothing is run."""
    return _chosen(asked_of(_posed(case, device), case.mode == "training"))


def _chosen(asked: Asked) -> dict[Way, Chosen]:
    return {"graph": _told(asked.choices["graph"]), "wall": _told(asked.choices["eager"])}


def _told(choice: Choice) -> Chosen:
    return Chosen(_label(choice.pair), choice.origin, _reason(choice))


def _reason(choice: Choice) -> str:
    """Why dispatch chose it, without the table's place on the machine."""
    return choice.reason if choice.answered is None else f"{choice.answered.source.kind} table: {choice.answered.answer}"


def _near(contenders: Sequence[Picked]) -> list[Picked]:
    """Those that the rule can come to: the default, its choice, each backend's best, and the fastest within the widest tie."""
    ranked = sorted(contenders, key=lambda one: one.us)
    best: dict[str, Picked] = {}
    for one in ranked:
        best.setdefault(one.who, one)
    least, picked = min((one.us for one in contenders), default=0.0), rule_of(contenders)
    near = [one for one in ranked if one.us <= (1 + NOISE) * least][:_MOST_KEPT]
    kept = {one.label: one for one in (*near, *best.values(), *(one for one in contenders if one.order == 0 or one.label == picked))}
    return sorted(kept.values(), key=lambda one: one.order)
