"""What every backend says to one signature: accepted with its candidates, or refused with all its reasons.

Dispatch chooses among offers, the tuner races them, `explain` prints them. Nothing is run here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from titans_backends import registry
from titans_backends.backend import Backend, Candidate, OpModule, TrainableOpModule
from titans_backends.cache.source_imports import with_imports
from titans_backends.errors import BackendError
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import ACCEPTED, Verdict, refused

__all__ = ["Offer", "Pair", "first_pair", "offer", "offers", "pairs", "run_modules", "source_modules", "unpaired", "unshared"]


@dataclass(frozen=True, slots=True)
class Offer:
    """One backend's answer. Where it refuses there are no candidates; in inference there are no backward ones."""

    backend: Backend
    verdict: Verdict
    module: OpModule | None = None
    forward: tuple[Candidate, ...] = ()
    backward: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class Pair:
    """What a choice picks: a forward candidate and, in training, the backward that reads what it saves."""

    forward: Candidate
    backward: Candidate | None = None

    @property
    def label(self) -> str:
        """For people: `eager/chunked chunk_size=32`, with the backward behind a `+`."""
        return self.forward.label if self.backward is None else f"{self.forward.label} + {self.backward.label}"


def source_modules(candidate: Candidate, op: str) -> tuple[str, ...]:
    """The modules whose code a candidate runs: its op's own, those that it names, and what these import from backends, but for a forward the backward's."""
    backend = registry.get(candidate.backend)
    try:
        return with_imports((backend.ops[op], *candidate.sources), without=backend.backward if candidate.direction == "forward" else ())
    except ValueError as wrong:
        raise BackendError(f"backend {backend.name!r}: its manifest's backward names a module that is not there: {wrong}; correct the name") from None


def _allowed(candidates: Iterable[Candidate], signature: Signature) -> tuple[Candidate, ...]:
    return tuple(
        candidate
        for candidate in candidates
        if (candidate.deterministic or not signature.deterministic)
        and (candidate.batch_invariant or not signature.batch_invariant)
        and not (candidate.saves_states and (signature.regime == "inference" or not signature.may_save))
    )


def offer(backend: Backend, signature: Signature, machine: Machine) -> Offer:
    """One backend's answer to a signature. What its functions raise is a reason, not our failure."""
    verdict = registry.availability(backend, machine)
    if not verdict:
        return Offer(backend, verdict)
    module, verdict = registry.module(backend, signature.op)
    if module is None:
        return Offer(backend, verdict)
    try:
        verdict = module.supports(signature, machine)
        if not verdict:
            return Offer(backend, verdict)
        forward = _allowed(module.candidates(signature, machine), signature)
        backward: tuple[Candidate, ...] = ()
        if signature.regime == "training":
            training = registry.trainable(module)
            backward = _allowed(training.backward_candidates(signature, machine), signature) if training is not None else ()
    except Exception as error:
        return Offer(backend, refused(f"asking it raised {type(error).__name__}: {error}"))
    wanted = "deterministic " * signature.deterministic + "batch-invariant " * signature.batch_invariant
    if not forward and not backward:
        return Offer(backend, refused(f"it has no {wanted}candidate for this call"))
    return Offer(backend, ACCEPTED, module, forward, backward)


def offers(signature: Signature, machine: Machine, names: Sequence[str] | None = None) -> list[Offer]:
    """Every backend's answer, by untuned rank; `names` limits it. A backend that does not serve this kind of device comes last."""
    ranked = registry.order(machine.kind)
    rest = [b for b in registry.known().values() if b not in ranked]
    return [offer(backend, signature, machine) for backend in (*ranked, *rest) if names is None or backend.name in names]


def pairs(given: Sequence[Offer], signature: Signature, *, mixed: bool = True) -> list[Pair]:
    """Every admissible choice, the default first. In training a pair agrees on what is saved; `mixed` allows two backends."""
    forward = [candidate for entry in given for candidate in entry.forward]
    if signature.regime == "inference":
        return [Pair(candidate) for candidate in forward]
    backward = [candidate for entry in given for candidate in entry.backward]
    found = [Pair(f, b) for f in forward for b in backward if f.agrees(b) and (mixed or f.backend == b.backend)]
    return sorted(found, key=lambda pair: pair.forward.backend != (pair.backward or pair.forward).backend)  # unmixed first; the sort is stable


def first_pair(given: Sequence[Offer], signature: Signature, *, mixed: bool = True) -> Pair | None:
    """The untuned default: the first of `pairs`."""
    return next(iter(pairs(given, signature, mixed=mixed)), None)


def unpaired(given: Sequence[Offer]) -> list[tuple[Candidate, str]]:
    """Candidates of a residual that no candidate of the other direction shares, each with the reason: no pair has them, so they neither race nor run.

    A forward only where its backend has a backward for this call: where it has none, nothing is named otherwise.
    """
    forward = [candidate for entry in given for candidate in entry.forward]
    backward = [candidate for entry in given for candidate in entry.backward]
    found = [c for entry in given if entry.backward for c in entry.forward if c.residual and not any(c.agrees(b) for b in backward)]
    found += [c for c in backward if c.residual and not any(c.agrees(f) for f in forward)]
    return [(candidate, unshared(candidate)) for candidate in found]


def unshared(candidate: Candidate) -> str:
    """What is told of a candidate whose residual the other direction does not have, wherever it is told."""
    if candidate.direction == "forward":
        return f"it makes {candidate.residual}, but no backward of its backend wants that"
    return f"it wants {candidate.residual}, but no forward of its backend makes that"


def run_modules(pair: Pair, op: str) -> tuple[OpModule, TrainableOpModule | None]:
    """The modules that run a pair's two directions."""
    forward, _ = registry.module(registry.get(pair.forward.backend), op)
    if forward is None:
        raise RuntimeError(f"{pair.forward.label} was chosen for {op}, but its module is gone")
    if pair.backward is None:
        return forward, None
    backward, _ = registry.module(registry.get(pair.backward.backend), op)
    return forward, None if backward is None else registry.trainable(backward)
