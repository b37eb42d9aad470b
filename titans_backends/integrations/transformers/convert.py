"""Whether a gated delta layer of transformers can be swapped, with every reason against it, and what it becomes. Runs nothing of the layer."""

from __future__ import annotations

import torch
from torch import nn

from titans_backends.contracts.short_conv import TAPS
from titans_backends.integrations.known import Conversion, KnownLayer, register_layer
from titans_backends.integrations.origin import forward_owner
from titans_backends.integrations.raw_weights import raw_weights
from titans_backends.integrations.transformers.versions import Family, family_of, unfamiliar
from titans_backends.op import get_op
from titans_backends.verdict import Verdict, refused

__all__ = ["LAYER", "convert", "recognise"]

_SIZES = ("layer_idx", "num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim", "key_dim", "value_dim", "conv_kernel_size")
_MEMORY = ("gated_delta_rule", "gated_delta_step")
_GATES = {"silu": "silu", "swish": "silu", "sigmoid": "sigmoid"}
"""transformers' names of the activations that `gated_rms_norm` has."""


def recognise(module: nn.Module) -> bool:
    """By the name of its class, or of one that it derives from."""
    return family_of(type(module)) is not None


def convert(module: nn.Module, backend: str | None) -> Conversion | Verdict:
    """The forward of the layer's form. `backend` is forced on the memory, and on what lies around it where that backend has the op."""
    family = family_of(type(module))
    if family is None:
        return refused(f"{type(module).__name__} is no gated delta layer of transformers")
    reasons = (*family.differences(module), *_missing(module, family), *_without_op(backend))
    if reasons:
        return refused(*reasons)
    reasons = (*_wrong_sizes(module), *_wrong_activation(module))
    if reasons:
        return refused(*reasons)
    gate, why = _norm_gate(module, family)
    reasons = raw_weights(module, ("conv1d",) if gate is None else ("conv1d", family.modules[-2]))
    if reasons:
        return refused(*reasons)
    notes = [] if why is None else [why]
    if module.conv_kernel_size != TAPS:
        notes.append(f"its convolution has {module.conv_kernel_size} taps and the op {TAPS}, so torch's conv1d runs it")
    if not isinstance(module.conv1d, nn.Conv1d):
        kind = type(module.conv1d)
        told = (
            f"conv1d is a {kind.__module__}.{kind.__qualname__}: its weight and bias are read at each call, and it is not called, as in transformers"
        )
        notes.append(told)
    ops = [*_MEMORY, *(["qkv_prepare"] if module.conv_kernel_size == TAPS else []), *(["gated_rms_norm"] if gate is not None else [])]
    attributes = {
        "titans_rule": get_op("gated_delta_rule", backend=backend),
        "titans_step": get_op("gated_delta_step", backend=backend),
        "titans_prepare": get_op("qkv_prepare", backend=_where_declared(backend, "qkv_prepare")),
        "titans_norm": None if gate is None else get_op("gated_rms_norm", backend=_where_declared(backend, "gated_rms_norm")),
        "titans_gate": gate,
        "titans_norm_class": forward_owner(type(getattr(module, family.modules[-2]))),
    }
    return Conversion(family.form, attributes, tuple(notes), ops=tuple(ops))


def _where_declared(backend: str | None, op: str) -> str | None:
    return backend if backend in get_op(op).backends else None


def _without_op(backend: str | None) -> list[str]:
    """The memory's ops that a forced backend lacks."""
    if backend is None:
        return []
    lacking = {op: get_op(op).backends for op in _MEMORY if backend not in get_op(op).backends}
    return [f"backend {backend!r} has no {op}; these have it: {', '.join(having)}" for op, having in lacking.items()]


def _missing(module: nn.Module, family: Family) -> list[str]:
    """Attributes that the forward reads and the module lacks."""
    told = [f"it has no whole number {name}" for name in _SIZES if not isinstance(getattr(module, name, None), int)]
    told += [f"it has no submodule {name}" for name in (*family.modules, "conv1d") if not isinstance(getattr(module, name, None), nn.Module)]
    told += [f"it has no tensor {name}" for name in ("A_log", "dt_bias") if not isinstance(getattr(module, name, None), torch.Tensor)]
    return told


def _wrong_sizes(module: nn.Module) -> list[str]:
    """Sizes that do not belong together."""
    size = {name: int(getattr(module, name)) for name in _SIZES}
    told = []
    for dim, heads, width in (("key_dim", "num_k_heads", "head_k_dim"), ("value_dim", "num_v_heads", "head_v_dim")):
        if size[dim] != size[heads] * size[width]:
            told.append(f"{dim} is {size[dim]}, not {heads} * {width} = {size[heads] * size[width]}")
    if size["num_k_heads"] < 1 or size["num_v_heads"] % size["num_k_heads"]:
        told.append(f"num_v_heads is {size['num_v_heads']}, no multiple of num_k_heads = {size['num_k_heads']}")
    conv, channels = module.conv1d, 2 * size["key_dim"] + size["value_dim"]
    expected = (channels, 1, size["conv_kernel_size"])
    weight = getattr(conv, "weight", None)  # of an adapter's wrapper too: nothing but weight and bias is read, by transformers' own forward as well
    shape = tuple(weight.shape) if isinstance(weight, torch.Tensor) else None
    if shape is None or not hasattr(conv, "bias") or (shape != expected and 0 not in shape):  # empty: another process or the disk holds it for now
        told.append(f"conv1d is a {type(conv).__name__} with a weight of {shape}; expected is a depthwise Conv1d with {expected}")
    return told


def _wrong_activation(module: nn.Module) -> list[str]:
    activation = getattr(module, "activation", None)
    return [] if activation in ("silu", "swish") else [f"its convolution's activation is {activation!r}; the op has silu"]


def _norm_gate(module: nn.Module, family: Family) -> tuple[str | None, str | None]:
    """The activation of the gate for our op, or None and why the module's own norm stays."""
    norm = getattr(module, family.modules[-2])
    if unfamiliar(type(norm)):
        return None, f"its gated norm, {type(norm).__name__}, is none that this integration knows, and stays as it is"
    gate = _GATES.get(str(getattr(norm, "activation", None)))
    if gate is None:
        return None, f"its gated norm's activation is {getattr(norm, 'activation', None)!r}; the op has silu and sigmoid, so the norm stays as it is"
    return gate, None


LAYER = register_layer(
    KnownLayer(
        "transformers gated delta net",
        "the gated delta layers of transformers' qwen3_next, qwen3_5, qwen3_5_moe, qwen4_exp and olmo_hybrid",
        recognise,
        convert,
    )
)
