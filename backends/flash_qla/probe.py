"""The probe: whether the smallest gated_delta_rule runs here and is right. A call of an op never comes here."""

from __future__ import annotations

from titans_backends.machine import Machine
from titans_backends.verdict import Verdict

from .. import peer_probe
from . import gated_delta_rule

__all__ = ["probe"]


def probe(machine: Machine) -> Verdict:
    """The verdict of the smallest case."""
    return peer_probe.tried(gated_delta_rule, machine)
