"""Which kernel serves a signature, and why: scope, verdicts, tuned tables, their rows of the other launch, defaults, in that order.

Nothing is measured and nothing is run here. A choice carries everything that `explain` prints; a refusal carries every reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from titans_backends import registry
from titans_backends.buckets import bucket_of, defaults_of
from titans_backends.cache.beside import displaces
from titans_backends.cache.lookup import Hit, Miss, lookup
from titans_backends.cache.neighbour import Launch, named, other_launch, silent
from titans_backends.cache.schema import Bucket, Entry, Table
from titans_backends.cache.source_hash import join_hashes, source_hash
from titans_backends.cache.staleness import Staleness, grade
from titans_backends.errors import BackendRefusedError
from titans_backends.machine import Machine
from titans_backends.offers import Offer, Pair, offers, pairs, source_modules
from titans_backends.siblings import sibling
from titans_backends.signature import Signature
from titans_backends.tables import Source, current_environment, sources

__all__ = ["Choice", "Consulted", "Forced", "choose", "consult", "pair_source"]


@dataclass(frozen=True, slots=True)
class Forced:
    """A backend that was asked for by name, and how: `backend=`, `use_backend`, or the switch."""

    backend: str
    by: str


@dataclass(frozen=True, slots=True)
class Consulted:
    """What one table said: the row that answered, or why none did."""

    source: Source
    answer: str
    hit: Hit | None = None
    miss: Miss | None = None
    staleness: Staleness | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs, and why. `answered`: the table that decided.

    `origin`: forced by name, tuned here, borrowed from a relative's table, by a neighbour, which is a row of the other launch, or the untuned default.
    """

    signature: Signature
    machine: Machine
    bucket: Bucket
    pair: Pair
    origin: Literal["forced", "tuned", "borrowed", "neighbour", "default"]
    reason: str
    offers: tuple[Offer, ...]
    consulted: tuple[Consulted, ...]
    answered: Consulted | None = None


def pair_source(pair: Pair, op: str) -> str:
    """The source hash of a pair as a table stores it."""
    forward = source_hash(source_modules(pair.forward, op))
    return forward if pair.backward is None else join_hashes(forward, source_hash(source_modules(pair.backward, op)))


def _matches(pair: Pair, entry: Entry) -> bool:
    if (pair.forward.name, pair.forward.params) != (entry.use, entry.params) or pair.forward.saves_states != entry.saves_states:
        return False
    if pair.backward is None or entry.backward is None:
        return pair.backward is None and entry.backward is None
    return (pair.backward.name, pair.backward.params) == (entry.backward, entry.backward_params)


def _own(entry: Entry, owner: str) -> bool:
    """Whether every candidate that a row names is the owner's."""
    return all(name.partition("/")[0] == owner for name in (entry.use, entry.backward) if name is not None)


def _beside(source: Source, decided: Source) -> bool:
    """Whether a table is still asked after another answered: a backend's own stands beside the shipped one, not below it."""
    return source.kind == "backend" and decided.kind in ("shipped", "backend")


def _displaces(later: Consulted, earlier: Consulted) -> bool:
    return later.hit is not None and earlier.hit is not None and displaces(later.hit, earlier.hit)


def consult(source: Source, bucket: Bucket, available: Sequence[Pair], kind: str) -> tuple[Consulted, Pair | None]:
    """One table's answer, and the pair that it names if that may be used."""
    if source.table is None:
        return Consulted(source, source.problem), None
    found = lookup(source.table, bucket.op, bucket.when, bucket.seq_len, defaults_of(bucket.op))
    if isinstance(found, Miss):
        return Consulted(source, found.reason, miss=found), None
    found, pair = _offered(source.table, found, available)
    if source.owner and not _own(found.entry, source.owner):
        told = f"its row names {found.entry.label}; a backend's table speaks for its own candidates alone"
        return Consulted(source, told, hit=found), None
    if pair is None:
        return Consulted(source, f"its row names {found.entry.label}, which is not among the candidates for this call", hit=found), None
    environment = source.table.environment(found.entry)
    staleness = grade(found.bucket, found.entry, environment, current_environment(kind), pair_source(pair, bucket.op))
    where = f"{found.kind} row, seq_len {found.seq_len}, streams {found.streams}: {found.entry.label}, {found.entry.us:.4g} us"
    if found.by_sibling:
        where += f" (not among the candidates for this call, for which its backend offers the same variant as {pair.label})"
    if found.why:
        where += f" ({found.why})"
    if found.entry.tuned_with:
        where += f", tuned with {found.entry.tuned_with}"
    if not staleness.usable:
        return Consulted(source, f"{where}; ignored: {staleness.reason}", hit=found, staleness=staleness), None
    return Consulted(source, where, hit=found, staleness=staleness), pair


def _offered(table: Table, found: Hit, available: Sequence[Pair]) -> tuple[Hit, Pair | None]:
    """What a row names, else its variants with the numbers that the call is offered, else what the row on the other side of the length names."""
    pair = next((p for p in available if _matches(p, found.entry)), None)
    if pair is not None:
        return found, pair
    pair = sibling(found.entry, available)
    if pair is not None or found.other is None:
        return replace(found, by_sibling=pair is not None), pair
    entry = table.rows[found.other]
    pair = next((p for p in available if _matches(p, entry)), None)
    why = f"the row of seq_len {found.seq_len} names {found.entry.label}, which is not among the candidates for this call"
    return (found, None) if pair is None else (replace(found, bucket=found.other, entry=entry, why=why, other=None), pair)


def _decided(
    tables: Sequence[Source], bucket: Bucket, available: Sequence[Pair], kind: str, consulted: list[Consulted], *, other: Launch | None = None
) -> tuple[Consulted, Pair] | None:
    """The answer that decides, with its pair; every table that was asked is written down. `other`: the bucket's launch where the call's is not that."""
    decided: tuple[Consulted, Pair] | None = None
    for source in tables:
        if decided is not None and not _beside(source, decided[0].source):
            break
        answer, pair = consult(source, bucket, available, kind)
        if other is not None:
            answer, pair = _as_neighbour(answer, pair, other)
        consulted.append(answer)
        if pair is not None and (decided is None or _displaces(answer, decided[0])):
            decided = answer, pair
    return decided


def _as_neighbour(answer: Consulted, pair: Pair | None, launch: Launch) -> tuple[Consulted, Pair | None]:
    """The answer of a row of that launch to a call of the other."""
    why = silent(answer.hit, launch) if answer.hit is not None and pair is not None else ""
    return replace(answer, answer=f"{named(launch)}: {answer.answer}" + (f"; passed over: {why}" if why else "")), None if why else pair


def _reasons(given: Sequence[Offer], signature: Signature) -> str:
    lines = []
    for entry in given:
        why = str(entry.verdict)
        if entry.verdict:
            have = [name for name, found in (("forward", entry.forward), ("backward", entry.backward)) if found]
            why = f"in training it must have both directions, but it has only {have[0]}" if signature.regime == "training" else "it has no candidate"
        lines.append(f"{entry.backend.name}: {why}")
    return "; ".join(lines)


def _refuse(signature: Signature, machine: Machine, forced: Forced | None, given: Sequence[Offer]) -> BackendRefusedError:
    see = f"See: titans-backends explain {signature.op}"
    if forced is None:
        return BackendRefusedError(f"{signature.op}: no backend serves this call. {_reasons(given, signature)}. {see}")
    everyone = offers(signature, machine)
    usable = [o.backend.name for o in everyone if o.verdict and pairs([o], signature, mixed=False)]
    return BackendRefusedError(
        f"{signature.op}: backend {forced.backend!r} was forced ({forced.by}) but refuses this call: {_reasons(given, signature)}. "
        f"{_cure(signature, forced, given)}Usable here: {', '.join(usable) or 'none'}. {see}"
    )


def _cure(signature: Signature, forced: Forced, given: Sequence[Offer]) -> str:
    """What to type where the call, or the reach of what forced it, is more than was meant; empty otherwise."""
    if any(offer.forward and not offer.backward for offer in given) and signature.regime == "training":
        return "Without gradients it runs: with torch.no_grad(): ... (or torch.inference_mode()); to train, force another backend, or none. "
    if forced.by != "backend=" and signature.op not in registry.get(forced.backend).ops:
        to = f"backend={forced.backend!r}"
        return f"{forced.by} forces every op; accelerate(model, {to}) and get_op(name, {to}) force those that it has. "
    return ""


def choose(
    signature: Signature,
    machine: Machine,
    forced: Forced | None = None,
    warmed: Sequence[Pair] | None = None,
    *,
    must_save: str | None = None,
) -> Choice:
    """The choice for a signature; BackendRefusedError where nothing is left.

    `warmed`, under graph capture, limits it to pairs that have run; `must_save`, in a backward that was handed something, to pairs that save that:
    "" are chunk-start states, any other a residual's name.
    """
    if forced is not None:
        registry.get(forced.backend)
    given = tuple(offers(signature, machine, None if forced is None else [forced.backend]))
    available = pairs(given, signature, mixed=forced is None)
    if must_save is not None:
        available = [pair for pair in available if pair.forward.saves_states and pair.forward.residual == must_save]
    if not available and must_save:
        raise BackendRefusedError(
            f"{signature.op}: the forward kept {must_save!r} for its backward, but no backward that reads it is offered to the call as it is now; "
            "deterministic algorithms, disabled backends and what saved-tensor hooks give back must be in the backward as they were in the forward. "
            f"{_reasons(given, signature)}. See: titans-backends explain {signature.op}"
        )
    if not available:
        raise _refuse(signature, machine, forced, given)
    if warmed is not None:
        # under batch invariance the one candidate must have run itself: nothing else has its bits
        available = [pair for pair in (available[:1] if signature.batch_invariant else available) if pair in warmed]
        if not available:
            raise BackendRefusedError(
                f"{signature.op}: a graph is being captured, and no kernel for this signature has run on {signature.device} yet; "
                "call the op once with these shapes, dtypes and options before the capture, under the same policy"
            )
    bucket = bucket_of(signature)
    consulted: list[Consulted] = []
    decided: tuple[Consulted, Pair] | None = None
    origin: Literal["tuned", "borrowed", "neighbour"] = "tuned"
    if not signature.batch_invariant:  # one candidate whatever the batch and length: no row by streams or length can say which
        decided = _decided(sources(machine), bucket, available, machine.kind, consulted)
        origin = "borrowed" if decided is not None and decided[0].source.kind == "borrowed" else "tuned"
        if decided is None:
            there, launch = other_launch(bucket, defaults_of(bucket.op))
            asked: list[Consulted] = []
            decided = _decided([s for s in sources(machine) if s.kind != "borrowed"], there, available, machine.kind, asked, other=launch)
            consulted += [one for one in asked if one.hit is not None]
            origin = "neighbour"
    if decided is not None:
        answer, pair = decided
        return Choice(signature, machine, bucket, pair, origin, f"{answer.source.described}: {answer.answer}", given, tuple(consulted), answer)
    pair = available[0]
    if forced is not None:
        return Choice(signature, machine, bucket, pair, "forced", f"forced ({forced.by}); its first candidate", given, tuple(consulted))
    why = (
        "the batch-invariant policy: one candidate for every batch and length"
        if signature.batch_invariant
        else f"no tuned row; first by rank on {machine.kind}"
    )
    return Choice(signature, machine, bucket, pair, "default", why, given, tuple(consulted))
