"""How each backend stands on this machine, found out by trying: the smallest case of each of its ops, in a child process.

usable: it compiled, ran and was right; importable: nothing was run; refused: it says why not; broken: it should work and does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from titans_backends import registry
from titans_backends.backend import Backend
from titans_backends.buckets import Bucket
from titans_backends.contracts import CONTRACTS
from titans_backends.machine import Machine, detect
from titans_backends.offers import Offer, offer
from titans_backends.tuning import wire
from titans_backends.tuning.host import ChildAnswerError, ChildDied, Host, OpenFailed
from titans_backends.tuning.plan import plan
from titans_backends.tuning.problem import signature_of_bucket

__all__ = ["BackendReport", "check_backends", "traceback_of"]

State = Literal["usable", "importable", "refused", "broken"]

_SIZES = (("float32", 16), ("float32", 64), ("bfloat16", 64), ("bfloat16", 128))
"""What is tried in turn, until a backend accepts it."""


@dataclass(frozen=True, slots=True)
class BackendReport:
    """One backend: its state with the reason, the ops that it declares and those that were right when tried, what to install."""

    name: str
    origin: str
    summary: str
    state: State
    reason: str
    ops: tuple[str, ...] = ()
    right: tuple[str, ...] = ()
    install: str = ""


def check_backends(device: str, *, run: bool, timeout_s: float = 60.0) -> Iterator[BackendReport]:
    """Every backend in the order of its untuned rank, then those that cannot even be read. `run` False: nothing is run."""
    machine = detect(device)
    ranked = registry.order(machine.kind)
    with Host(device) as host:
        for backend in (*ranked, *(b for b in registry.known().values() if b not in ranked)):
            found = _report(backend, *_state(backend, machine, host, device, timeout_s) if run else _unrun(backend, machine))
            yield found if backend in ranked else replace(found, install="")  # a package would not make it run on this device
    for broken in registry.broken().values():
        yield BackendReport(broken.name, broken.origin, "", "broken", broken.reason)


def traceback_of(name: str, machine: Machine) -> str:
    """The traceback of a broken backend, its probe run in this process; empty where there is none. UnknownNameError for an unknown name."""
    if name in registry.broken():
        return registry.broken()[name].trace
    return registry.probe(registry.get(name), machine).trace


def _report(backend: Backend, state: State, reason: str, right: tuple[str, ...]) -> BackendReport:
    missing = state == "refused" and "not installed" in reason
    return BackendReport(backend.name, backend.origin, backend.summary, state, reason, _ops(backend), right, backend.install if missing else "")


def _ops(backend: Backend) -> tuple[str, ...]:
    return tuple(op for op in CONTRACTS if op in backend.ops)


def _unrun(backend: Backend, machine: Machine) -> tuple[State, str, tuple[str, ...]]:
    verdict = registry.availability(backend, machine)
    return ("importable", "", ()) if verdict else ("refused", str(verdict), ())


def _state(backend: Backend, machine: Machine, host: Host, device: str, timeout_s: float) -> tuple[State, str, tuple[str, ...]]:
    verdict = registry.availability(backend, machine)
    if not verdict:
        return "refused", str(verdict), ()
    host.open(None)
    try:
        answer = host.ask({"do": "probe", "backend": backend.name}, timeout_s)
    except (ChildDied, ChildAnswerError, OpenFailed) as error:
        return "broken", f"its probe: {error}", ()
    if answer["state"] in ("refused", "broken"):
        return ("refused" if answer["state"] == "refused" else "broken"), str(answer["reason"]), ()
    right: list[str] = []
    wrong: list[str] = []
    refusals: list[str] = []
    for op in _ops(backend):
        bucket, given = _accepted(backend, op, machine, device)
        if not given.forward:
            refusals.append(f"{op}: {given.verdict}")
            continue
        reason = _check(host, bucket, given, timeout_s)
        if reason:
            wrong.append(f"{op}: {given.forward[0].label}: {reason}")
        else:
            right.append(op)
    if wrong:
        return "broken", "; ".join(wrong), tuple(right)
    return ("usable" if right else "importable"), "; ".join(refusals), tuple(right)


def _accepted(backend: Backend, op: str, machine: Machine, device: str) -> tuple[Bucket, Offer]:
    """The first of the small sizes that it accepts, or the last with its refusal."""
    for dtype, head_dim in _SIZES:
        heads, head_dims = [(2, 2)], [(head_dim, head_dim)]
        found = plan(
            machine.kind, ops=[op], seq_lens=[64], heads=heads, head_dims=head_dims, dtypes=[dtype], regimes=["inference"], launches=["eager"]
        )
        bucket = found[0]
        given = offer(backend, signature_of_bucket(bucket, device), machine)
        if given.forward:
            break
    return bucket, given


def _check(host: Host, bucket: Bucket, given: Offer, timeout_s: float) -> str:
    """Why its default fails there; empty where it is right."""
    try:
        host.open({"do": "open", "bucket": wire.bucket_to(bucket), "heads": None})
        answer = host.ask({"do": "check", "candidate": wire.candidate_to(given.forward[0]), "states_from": None}, timeout_s)
    except (ChildDied, ChildAnswerError, OpenFailed) as error:
        return str(error)
    return str(answer["reason"])
