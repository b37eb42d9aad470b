"""What the backends say to a bucket on any machine: the untuned default, whether a row's source is today's, and who refuses why.

On this machine they are asked as dispatch asks them. For another one, the packages installed here do not count: their modules are asked with
that machine's facts. What cannot be asked here is said, never guessed. Runs no kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass, replace

from titans_backends import registry
from titans_backends.buckets import Bucket
from titans_backends.cache.schema import Device, Entry, Environment
from titans_backends.cache.staleness import grade
from titans_backends.cache.timings import Measurement
from titans_backends.machine import Machine
from titans_backends.offers import Offer, first_pair, offer
from titans_backends.reporting.facts import Identity, Refusal, State
from titans_backends.tuning.problem import signature_of_bucket
from titans_backends.tuning.standing import REFERENCE, Standing, measurement_of, members
from titans_backends.verdict import refused

__all__ = ["Answers", "answers", "machine_of"]

_SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
"""Shared memory that one block may ask for, by compute capability, as NVIDIA's programming guide lists it."""


def machine_of(device: Device) -> Machine:
    """The machine that a file was measured on, as far as the file and its architecture tell."""
    shared = None if device.sm is None or device.sm not in _SHARED_KIB else 1024 * _SHARED_KIB[device.sm]
    return Machine(device.kind, device.name, device.slug, device.sm, device.sms, shared, device.threads, device.isa)


@dataclass(frozen=True, slots=True)
class Answers:
    """Every backend's answer to one bucket. `problem`: why none could be asked. `unasked`: backends that cannot be asked here, with the reason."""

    bucket: Bucket
    machine: Machine
    here: bool
    offers: tuple[Offer, ...] = ()
    unasked: tuple[Refusal, ...] = ()
    problem: str = ""

    def default(self, measurements: Collection[Measurement]) -> tuple[tuple[Identity, ...] | None, str]:
        """The members of the untuned default among what raced; None with the reason where that is not known."""
        if self.problem:
            return None, self.problem
        raced = _backends(measurements)
        signature = signature_of_bucket(self.bucket, self.machine.kind)
        silent = self._silent(raced)
        if silent is not None:
            return None, f"{silent.backend} was in the race and cannot be asked for its default here: {silent.reason}"
        pair = first_pair([one for one in self.offers if self.here or one.backend.name in raced], signature)
        if pair is None:
            return None, "no backend of the race offers anything for it today"
        identities = tuple(measurement_of(candidate).identity for candidate in members(pair))
        known = {one.identity for one in measurements if one.status == "ok"}
        if not known.issuperset(identities):
            return None, f"today's default, {pair.label}, has no time in this race"
        return identities, ""

    def state(self, entry: Entry, environment: Environment) -> State:
        """Whether the row's winner is still there with the source that was measured. Versions do not count: this is another machine."""
        if self.problem:
            return State("ignored", self.problem)
        silent = self._silent({name.partition("/")[0] for name in (entry.use, entry.backward or entry.use)})
        if silent is not None:
            return State("unchecked", f"{silent.backend} cannot be asked here: {silent.reason}")
        standing = Standing.of(self.bucket, signature_of_bucket(self.bucket, self.machine.kind), self.offers, ())
        found = grade(self.bucket, entry, environment, environment, standing.source(standing.named_by(entry)))
        return State(found.kind, found.reason, found.command)

    def refusals(self, measurements: Collection[Measurement]) -> tuple[Refusal, ...]:
        """Who serves such a device, was not in the race, and why."""
        raced = _backends(measurements)
        found = [
            Refusal(one.backend.name, str(one.verdict) if not one.verdict else "accepts the call; it was not in this race")
            for one in self.offers
            if one.backend.name not in raced
        ]
        return (*found, *(one for one in self.unasked if one.backend not in raced))

    def _silent(self, raced: Collection[str]) -> Refusal | None:
        """A backend of another machine's race that this installation keeps from answering; on this machine a refusal is an answer."""
        if self.here:
            return None
        refusing = (Refusal(one.backend.name, str(one.verdict)) for one in self.offers if not one.verdict)
        return next((one for one in (*self.unasked, *refusing) if one.backend in raced), None)


def _backends(measurements: Collection[Measurement]) -> set[str]:
    return {one.candidate.partition("/")[0] for one in measurements if one.candidate != REFERENCE}


@functools.lru_cache(maxsize=2048)
def answers(bucket: Bucket, machine: Machine, here: bool) -> Answers:
    """What the backends that serve the machine's kind of device say to a bucket."""
    try:
        signature = signature_of_bucket(bucket, machine.kind)
    except (KeyError, ValueError) as error:
        return Answers(bucket, machine, here, problem=f"this version has no such bucket: {error}")
    found: list[Offer] = []
    unasked: list[Refusal] = []
    for backend in registry.order(machine.kind):
        if bucket.op not in backend.ops:
            found.append(Offer(backend, refused("it does not implement this op")))
            continue
        if here:
            found.append(offer(backend, signature, machine))
            continue
        module, verdict = registry.module(backend, bucket.op)
        if module is None:
            unasked.append(Refusal(backend.name, str(verdict)))
        else:
            found.append(offer(replace(backend, requires=()), signature, machine))
    return Answers(bucket, machine, here, tuple(found), tuple(unasked))
