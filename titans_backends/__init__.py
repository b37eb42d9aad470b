"""Kernels for memory layers of the Titans and DeltaNet family, chosen per machine by measurement.

    import titans_backends as tb
    rule = tb.get_op("gated_delta_rule")
    o, state = rule(q, k, v, beta, g, output_final_state=True)
    print(rule.explain(q, k, v, beta, g))

Importing this imports torch and no kernel package; a backend is imported when a call is about to use it, `titans_backends.nn` and what `accelerate` needs when
they are named.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from titans_backends import _bridge
from titans_backends._version import __version__

_bridge.install()

from titans_backends.backend import CONTRACT_VERSION, Backend, Candidate  # noqa: E402  (the bridge comes first)
from titans_backends.contracts import CONTRACTS  # noqa: E402
from titans_backends.errors import (  # noqa: E402
    AccelerateError,
    BackendError,
    BackendRefusedError,
    BoundCallMismatchError,
    SwitchError,
    UnknownNameError,
)
from titans_backends.machine import Machine, detect  # noqa: E402
from titans_backends.op import BoundOp, Op, get_op  # noqa: E402
from titans_backends.recording import record  # noqa: E402
from titans_backends.scope import autotune, policy, use_backend  # noqa: E402
from titans_backends.signature import Signature  # noqa: E402
from titans_backends.verdict import ACCEPTED, Verdict, refused  # noqa: E402

if TYPE_CHECKING:
    from titans_backends import nn as nn
    from titans_backends.integrations.known import Conversion, KnownLayer, register_layer
    from titans_backends.integrations.report import Report
    from titans_backends.integrations.swap import accelerate
else:
    _LATER = {
        "accelerate": "swap",
        "Report": "report",
        "register_layer": "known",
        "KnownLayer": "known",
        "Conversion": "known",
    }

    def __getattr__(name):
        """`titans_backends.nn`, and what swaps layers of other models, imported when they are first named."""
        if name == "nn":
            return import_module("titans_backends.nn")
        if name in _LATER:
            found = globals()[name] = getattr(import_module(f"titans_backends.integrations.{_LATER[name]}"), name)
            return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ACCEPTED",
    "CONTRACT_VERSION",
    "AccelerateError",
    "Backend",
    "BackendError",
    "BackendRefusedError",
    "BoundCallMismatchError",
    "BoundOp",
    "Candidate",
    "Conversion",
    "KnownLayer",
    "Machine",
    "Op",
    "Report",
    "Signature",
    "SwitchError",
    "UnknownNameError",
    "Verdict",
    "__version__",
    "accelerate",
    "autotune",
    "detect",
    "get_op",
    "ops",
    "policy",
    "record",
    "refused",
    "register_layer",
    "reset",
    "use_backend",
]


def ops() -> tuple[str, ...]:
    """The names that `get_op` knows."""
    return tuple(CONTRACTS)


def reset() -> None:
    """Reads the environment switches, the backends and the tuned tables again at the next call, and drops every memo."""
    from titans_backends import plans, registry, switches, tables

    switches.reload()
    tables.forget_received()
    registry.reset()
    plans.invalidate()
