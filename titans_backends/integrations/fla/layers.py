"""FLA's DeltaNet and GatedDeltaNet, known to `accelerate`: recognised by the path of their class, with no import of fla, and converted or refused.

What is taken of FLA are its attributes' names and its cache; both are those of 0.6, so an older release is refused.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping

from torch import nn

from titans_backends.integrations.bypassed import bypassed
from titans_backends.integrations.fla.convolutions import activated, conv_verdict
from titans_backends.integrations.fla.delta_net import QK_ACTIVATIONS, QK_NORMS, DeltaNetForward
from titans_backends.integrations.fla.gated_delta_net import GatedDeltaNetForward
from titans_backends.integrations.fla.output_norm import norm_verdict
from titans_backends.integrations.known import Conversion, KnownLayer, register_layer
from titans_backends.integrations.origin import forward_owner, strangers
from titans_backends.integrations.raw_weights import raw_weights
from titans_backends.op import get_op
from titans_backends.verdict import ACCEPTED, Verdict, refused

__all__ = ["DELTA_NET", "GATED_DELTA_NET"]

_OLDEST = (0, 6)
_PATHS: Mapping[str, tuple[str, type]] = {
    "DeltaNet": ("fla.layers.delta_net.DeltaNet", DeltaNetForward),
    "GatedDeltaNet": ("fla.layers.gated_deltanet.GatedDeltaNet", GatedDeltaNetForward),
}
_CONVS = ("q_conv1d", "k_conv1d", "v_conv1d")
_NOTE = "the cache holds the convolutions' states in float32, where FLA has the activations' dtype"
_MEMORY_OPS = ("gated_delta_rule", "gated_delta_step")


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _recognises(name: str) -> Callable[[nn.Module], bool]:
    path, _ = _PATHS[name]
    return lambda module: any(_path(kind) == path for kind in type(module).__mro__)


def _converts(name: str) -> Callable[[nn.Module, str | None], Conversion | Verdict]:
    path, forward = _PATHS[name]

    def convert(module: nn.Module, backend: str | None) -> Conversion | Verdict:
        verdict = _class_verdict(module, path) & _backend_verdict(backend)
        if not verdict:  # what is below reads the attributes of that class
            return verdict
        verdict = _parts_verdict(module)
        if name == "DeltaNet":
            verdict &= _among("qk_activation", module, QK_ACTIVATIONS) & _among("qk_norm", module, QK_NORMS)
        if not verdict:
            return verdict
        convs = _CONVS if module.use_short_conv else ()
        attributes = {
            "titans_memory_backend": backend,
            "titans_prepare_backend": _where_declared(backend, "qkv_prepare"),
            "titans_conv_backend": _where_declared(backend, "short_conv"),
            "titans_norm_backend": _where_declared(backend, "gated_rms_norm"),
            "titans_norm_class": forward_owner(type(module.o_norm)),
        }
        return Conversion(forward, attributes, (_NOTE,) if convs else (), ops=_ops(module), bypasses=convs)

    return convert


def _ops(module: nn.Module) -> tuple[str, ...]:
    """The ops that its forward calls."""
    prepared = module.use_short_conv and all(activated(getattr(module, name)) for name in _CONVS)
    around = [("qkv_prepare" if prepared else "short_conv", module.use_short_conv), ("gated_rms_norm", module.use_gate)]
    return (*_MEMORY_OPS, *(op for op, called in around if called))


def _class_verdict(module: nn.Module, path: str) -> Verdict:
    """Whether the layer computes what FLA's class computes, of a release whose cache is known."""
    verdict = ACCEPTED
    owner = forward_owner(type(module))
    if _path(owner) != path:
        verdict &= refused(f"{_path(owner)} has a forward of its own, which a swap would pass by; register_layer describes such a layer")
    elif foreign := strangers(module, "fla"):
        verdict &= refused(*foreign)
    version = str(getattr(sys.modules.get("fla"), "__version__", "of an unknown version"))
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or tuple(map(int, found.groups())) < _OLDEST:
        verdict &= refused(f"FLA is {version}; its states are laid out as here from 0.6 on: pip install 'flash-linear-attention>=0.6'")
    return verdict


def _backend_verdict(backend: str | None) -> Verdict:
    """A forced backend must have the memory's ops; what lies around them takes it where it has the op."""
    lacking = [] if backend is None else [op for op in _MEMORY_OPS if backend not in get_op(op).backends]
    return refused(*(f"backend {backend!r} has no {op}; these have it: {', '.join(get_op(op).backends)}" for op in lacking)) if lacking else ACCEPTED


def _where_declared(backend: str | None, op: str) -> str | None:
    return backend if backend in get_op(op).backends else None


def _parts_verdict(module: nn.Module) -> Verdict:
    """The convolutions and the norm, whose forwards are passed by."""
    verdict = norm_verdict(getattr(module, "o_norm", None), bool(module.use_gate))
    passed_by = ["o_norm"]
    if module.use_short_conv:
        passed_by += _CONVS
        for name in _CONVS:
            verdict &= conv_verdict(name, getattr(module, name, None))
    present = [name for name in passed_by if isinstance(getattr(module, name, None), nn.Module)]
    lost = bypassed(module, present)
    reasons = (*lost, *raw_weights(module, present))
    return verdict & refused(*reasons) if reasons else verdict


def _among(name: str, module: nn.Module, known: tuple[str, ...]) -> Verdict:
    value = getattr(module, name, None)
    return ACCEPTED if value in known else refused(f"{name} is {value!r}; computed are {', '.join(map(repr, known))}")


def _register(name: str) -> KnownLayer:
    return register_layer(KnownLayer(f"fla {name}", f"FLA's {name} ({_PATHS[name][0]})", _recognises(name), _converts(name)))


DELTA_NET = _register("DeltaNet")
GATED_DELTA_NET = _register("GatedDeltaNet")
