"""What dispatch would run for a call, and how a call is made to run another pair: by a table in memory that names it, so that everything else is as users have it.

The tables of whoever runs the benchmark are left out: what is shipped decides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from device_timing import leaves_of
from torch import Tensor
from training_steps import RULE, Problem, Run, step

import titans_backends as tb
from titans_backends import dispatch, library, registry, tables
from titans_backends.backend import Candidate, OpModule, TrainableOpModule
from titans_backends.buckets import bucket_of
from titans_backends.cache.schema import Bucket, Entry, Table, device_of
from titans_backends.contracts import CONTRACTS
from titans_backends.dispatch import Choice, pair_source
from titans_backends.machine import Machine, detect
from titans_backends.offers import Offer, Pair
from titans_backends.signature import Launch, Signature
from titans_backends.tables import Source

__all__ = ["Asked", "asked_of", "leaves", "module_of", "running", "shipped", "user_of", "who_of"]


@dataclass(frozen=True, slots=True)
class Asked:
    """A call's facts under both launches, what dispatch would run for each, and what every backend offers for a graph."""

    machine: Machine
    choices: Mapping[Launch, Choice]

    @property
    def signature(self) -> Signature:
        """The signature of a captured call."""
        return self.choices["graph"].signature

    @property
    def offers(self) -> tuple[Offer, ...]:
        """Every backend's answer."""
        return self.choices["graph"].offers

    @property
    def buckets(self) -> list[Bucket]:
        """The keys of both launches, in training also those of a backward that was handed no states."""
        saves = (True, False) if self.signature.regime == "training" else (self.signature.may_save,)
        return [bucket_of(replace(self.signature, launch=launch, may_save=save)) for launch in ("graph", "eager") for save in saves]  # type: ignore[arg-type]


def asked_of(subject: Problem, training: bool) -> Asked:
    """Asks dispatch, with what is shipped; BackendRefusedError where no backend takes the call."""
    machine = detect(subject.device)
    choices: dict[Launch, Choice] = {}
    with _deciding(shipped(machine)):
        for launch in ("graph", "eager"):
            with tb.policy(launch=launch), torch.set_grad_enabled(training):  # type: ignore[arg-type]
                choices[launch] = tb.get_op(RULE).bind(**_arguments(subject, leaves(subject, training))).choice  # type: ignore[index]
    return Asked(machine, choices)


def shipped(machine: Machine) -> tuple[Source, ...]:
    """The tables that come with the library and with backends, without the user's."""
    return tuple(source for source in tables.sources(machine) if source.kind in ("shipped", "backend", "borrowed"))


@contextlib.contextmanager
def running(asked: Asked, pair: Pair) -> Iterator[None]:
    """Every call of the asked facts runs this pair, for a while."""
    entry = Entry(
        use=pair.forward.name,
        us=1.0,
        spread=0.0,
        peak_mib=0.0,
        params=pair.forward.params,
        backward=None if pair.backward is None else pair.backward.name,
        backward_params=() if pair.backward is None else pair.backward.params,
        saves_states=pair.forward.saves_states,
        env="a",
        source=pair_source(pair, RULE),
    )
    environment = tables.current_environment(asked.machine.kind)
    table = Table(device_of(asked.machine), {"a": environment}, dict.fromkeys(asked.buckets, entry))
    with _deciding((Source("named", Path("race"), table),)):
        yield


@contextlib.contextmanager
def _deciding(found: tuple[Source, ...]) -> Iterator[None]:
    """These tables decide and no others; nothing is remembered from before or afterwards."""
    before = dispatch.sources
    dispatch.sources = lambda machine: found  # type: ignore[assignment]
    library.planner(RULE).clear()
    try:
        yield
    finally:
        dispatch.sources = before
        library.planner(RULE).clear()


def _arguments(subject: Problem, given: Mapping[str, Tensor]) -> dict[str, object]:
    return {**{name: getattr(subject.call, name) for name in CONTRACTS[RULE].parameters}, **given}


def leaves(subject: Problem, training: bool) -> dict[str, Tensor]:
    """The call's tensors; in training those that want a gradient."""
    return leaves_of(RULE, subject.call) if training else dict(CONTRACTS[RULE].tensors(subject.call))


def user_of(subject: Problem, pair: Pair, training: bool) -> Run:
    """A call as its user makes it, run by a pair: the bound op, in training the op and its gradients. What is made must run within `running`."""
    op, given = tb.get_op(RULE), leaves(subject, training)
    arguments = _arguments(subject, given)
    if training:
        choice = op.bind(**arguments).choice
        _expect(choice, pair)
        if not pair.forward.saves_states:  # its backward is chosen again, for a call that saved nothing
            _expect(dispatch.choose(replace(choice.signature, may_save=False), choice.machine), pair)
        return step(subject, lambda x: op(**{**arguments, **x}), given)
    bound = op.bind(**arguments)
    _expect(bound.choice, pair)
    names = [spec.name for spec in CONTRACTS[RULE].outputs]
    return lambda: {name: x for name, x in zip(names, bound(**arguments), strict=True) if x is not None}


def _expect(choice: Choice, pair: Pair) -> None:
    if choice.pair != pair:
        raise RuntimeError(f"{choice.pair.label} would run although {pair.label} was named: {choice.reason}")


def who_of(pair: Pair) -> str:
    """Whose it is: a backend's name, or two of them."""
    names = [pair.forward.backend] if pair.backward is None else [pair.forward.backend, pair.backward.backend]
    return "+".join(dict.fromkeys(names))


def module_of(candidate: Candidate) -> OpModule | TrainableOpModule:
    """The module that runs a candidate of the rule."""
    module, reason = registry.module(registry.get(candidate.backend), RULE)
    if module is None:
        raise RuntimeError(f"{candidate.label}: {reason}")
    return cast("OpModule | TrainableOpModule", module)
