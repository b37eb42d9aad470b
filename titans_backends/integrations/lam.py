"""The original LAM layer, known by its structure: what it becomes, and every reason why another layer that looks like it does not.

Both of its versions have the same parameters, so which one a layer is, is told by what it computes (`lam_probe`), or said with `mode=`.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Literal, cast

from torch import Size, nn

from titans_backends.errors import unknown
from titans_backends.integrations.bypassed import bypassed
from titans_backends.integrations.known import Conversion, KnownLayer, register_layer
from titans_backends.integrations.lam_forward import BYPASSED, OPS, LamForward
from titans_backends.integrations.lam_probe import Sizes, Told, told_by_outputs, unusual
from titans_backends.integrations.origin import forward_owner
from titans_backends.integrations.raw_weights import raw_weights
from titans_backends.nn.dual_core import TitansDualCore
from titans_backends.nn.forced import Forced
from titans_backends.nn.forms import resolve
from titans_backends.nn.joint import Standing
from titans_backends.nn.mixing import Mixing, stand_together
from titans_backends.op import get_op
from titans_backends.verdict import Verdict, refused

__all__ = ["lam_layer"]

_MARKS = (*BYPASSED, "q_proj", "b_proj", "slow_decay_proj", "fast_gate_proj", "o_norm")
_SEEKS = "the original LAM layer (EnhancedHierarchicalDeltaNet), by its parameters: q_conv1d, resonance_flux, slow_decay_proj, fast_gate_proj, ..."
_DROPS_OUT = (
    "in training its own forward runs: its dropout on the states' updates is in no op of ours (lam_layer(train_without_dropout=True) leaves it out)"
)


def lam_layer(*, mode: Literal["flat", "loop"] | None = None, train_without_dropout: bool = False) -> KnownLayer:
    """The LAM layer for `register_layer`, which replaces the built-in one of that name.

    `mode`: which version every such layer is, `"flat"` (the original's current one) or `"loop"` (its earlier one); None: each class is compared with both on
    random input, on the CPU, once. `train_without_dropout`: the loop version trains on our op as well, without the dropout on its states' updates.
    """
    if mode not in (None, "flat", "loop"):
        raise unknown("mode of the LAM layer", mode, ("flat", "loop"))
    return KnownLayer("lam", _SEEKS, _recognise, partial(_convert, mode=mode, train_without_dropout=train_without_dropout))


def _recognise(module: nn.Module) -> bool:
    return all(module._modules.get(name) is not None for name in _MARKS)


def _convert(module: nn.Module, backend: str | None, *, mode: Literal["flat", "loop"] | None, train_without_dropout: bool) -> Conversion | Verdict:
    sizes = _sizes(module)
    if isinstance(sizes, Verdict):
        return sizes
    reasons = (*_differences(module, sizes), *bypassed(module, BYPASSED), *raw_weights(module, (*BYPASSED, "o_norm")))
    if reasons:
        return Verdict(reasons)
    told = told_by_outputs(module, sizes, partial(_conversion, module)) if mode is None else _said(module, mode)
    if isinstance(told, Verdict):
        return told
    forced = Forced.to(backend, OPS[told.mode])
    if OPS[told.mode][0] in forced.lacks:
        return refused(f"backend {backend!r} has no {OPS[told.mode][0]}, which is its memory; {', '.join(get_op(OPS[told.mode][0]).backends)} have")
    before = not told.trains_alike and not (train_without_dropout and told.random_in_training)
    notes = [told.how]
    if before:
        notes.append(
            _DROPS_OUT if told.random_in_training else "in training its own forward runs: it computes something else there than in inference"
        )
    elif not told.trains_alike:
        notes.append("it trains without the original's dropout on the states' updates, as lam_layer(train_without_dropout=True) asked")
    return _conversion(module, told.mode, backend, trains_as_before=before, notes=tuple(notes))


def _conversion(
    module: nn.Module, mode: Literal["flat", "loop"], backend: str | None, *, trains_as_before: bool = False, notes: tuple[str, ...] = ()
) -> Conversion:
    form = resolve(mode, "original", *(None,) * 9)
    attributes: dict[str, object] = {
        "form": form,
        "ops": Forced.to(backend, OPS[mode]),
        "_standing": Standing(),
        "_trains_as_before": trains_as_before,
        "_norm_class": forward_owner(type(module.o_norm)),
    }
    if not hasattr(module, "num_heads"):
        attributes["num_heads"] = cast(nn.Linear, module.b_proj).out_features
    return Conversion(LamForward, attributes, notes, lambda swapped: stand_together(cast(Mixing, swapped)), OPS[mode], BYPASSED)


def _said(module: nn.Module, mode: Literal["flat", "loop"]) -> Told | Verdict:
    """What the caller says it is, unchecked but for the options that are known to change it."""
    odd = [told for told in unusual(module) if mode == "loop" or not told.startswith("use_delta_rule")]
    if odd:
        return refused(f"it is built with {', '.join(odd)}, which mode={mode!r} does not compute")
    return Told(mode, f"mode={mode!r}, as lam_layer(mode=...) says; not compared", mode == "flat", mode == "loop")


# --- structure


def _sizes(module: nn.Module) -> Sizes | Verdict:
    """The sizes that its projections have, or why they are none of a LAM layer."""
    found = {}
    for name, what in (("q_proj", "in_features"), ("q_proj", "out_features"), ("v_proj", "out_features"), ("b_proj", "out_features")):
        size = getattr(module._modules.get(name), what, None)
        if not isinstance(size, int):
            return refused(f"{name} has no {what}, so it is no projection as the original's")
        found[f"{name}.{what}"] = size
    d_model, keys, values, heads = found.values()
    if keys % heads or values % heads:
        return refused(f"its {keys} key and {values} value channels are no multiples of its {heads} heads")
    held = getattr(module, "num_heads", heads)
    eps = getattr(module.o_norm, "eps", None)
    if held != heads or not isinstance(eps, float):
        return refused(
            f"its num_heads is {held!r} beside {heads} rows of b_proj, its o_norm.eps {eps!r}; the original has the same number twice, and a float"
        )
    return Sizes(d_model, heads, keys, values, eps)


def _differences(module: nn.Module, sizes: Sizes) -> tuple[str, ...]:
    """In what its parameters are not the original's; a projection may be of any class that has a Linear's sizes."""
    projections, others = _expected(sizes)
    reasons = []
    for name, (inputs, outputs, bias) in projections.items():
        part = module._modules.get(name)
        got = (getattr(part, "in_features", None), getattr(part, "out_features", None), getattr(part, "bias", None) is not None)
        if got != (inputs, outputs, bias):
            reasons.append(f"{name} has (in_features, out_features, bias) = {got}, the original {(inputs, outputs, bias)}")
    held = {
        name: tensor.shape
        for name, tensor in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]
        if name.split(".")[0] not in projections
    }
    reasons += [f"it has no {name}, which the original has" for name in others if name not in held]
    reasons += [f"it has {name} {list(shape)}, which the original has not" for name, shape in held.items() if name not in others]
    reasons += [
        f"{name} has shape {list(held[name])}, the original {list(shape)}" for name, shape in others.items() if name in held and held[name] != shape
    ]
    return tuple(reasons)


@lru_cache(maxsize=64)
def _expected(sizes: Sizes) -> tuple[dict[str, tuple[int, int, bool]], dict[str, Size]]:
    """Its projections' (inputs, outputs, bias), and its other parameters' shapes."""
    layer = sizes.layer(TitansDualCore, device="meta")
    projections = {name: (p.in_features, p.out_features, p.bias is not None) for name, p in layer.named_children() if isinstance(p, nn.Linear)}
    return projections, {name: p.shape for name, p in layer.named_parameters() if name.split(".")[0] not in projections}


register_layer(lam_layer())
