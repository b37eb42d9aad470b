"""The short convolutions of FLA's layers, by `qkv_prepare` and `short_conv`: four taps along the tokens, states as FLA keeps them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from titans_backends.contracts.short_conv import TAPS
from titans_backends.integrations.origin import strangers
from titans_backends.op import get_op
from titans_backends.verdict import ACCEPTED, Verdict, refused

__all__ = ["Convolution", "activated", "conv_verdict", "convolve", "prepare"]

States = tuple[Tensor, ...]


class Convolution(Protocol):
    """FLA's `ShortConvolution`: `weight` `[D, 1, 4]`, `bias` `[D]` or None, `activation` "silu", "swish" or None."""

    weight: Tensor
    bias: Tensor | None
    activation: str | None


def activated(conv: Convolution) -> bool:
    """Whether SiLU follows."""
    return conv.activation is not None


def conv_verdict(name: str, conv: nn.Module | None) -> Verdict:
    """Whether a layer's convolution is one that our op computes."""
    if not isinstance(conv, nn.Conv1d) or not hasattr(conv, "activation"):
        return refused(f"{name} is a {type(conv).__name__}; it must be FLA's ShortConvolution")
    foreign = strangers(type(conv), "fla")
    verdict = refused(*(f"{name}: {reason}" for reason in foreign)) if foreign else ACCEPTED
    if conv.kernel_size != (TAPS,):
        verdict &= refused(f"{name} has {conv.kernel_size[0]} taps; short_conv has {TAPS}")
    if conv.groups != conv.in_channels or conv.in_channels != conv.out_channels:
        verdict &= refused(f"{name} mixes channels: {conv.in_channels} in, {conv.out_channels} out, {conv.groups} groups")
    if conv.activation not in (None, "silu", "swish"):
        verdict &= refused(f"{name} has activation {conv.activation!r}; short_conv has silu or none")
    return verdict


def prepare(
    inputs: tuple[Tensor, Tensor, Tensor],
    convs: tuple[Convolution, Convolution, Convolution],
    states: States | None,
    cu_seqlens: Tensor | None,
    keep: bool,
    qk_norm: str,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, States | None]:
    """q, k, v `[B, T, heads, D]` after convolution, SiLU and the norm `qk_norm` of q and k, in one op; the states `[N, heads * D, 4]` if kept."""
    weights = [_by_head(conv.weight, x) for conv, x in zip(convs, inputs, strict=True)]
    biases = [None if conv.bias is None else _by_head(conv.bias, x) for conv, x in zip(convs, inputs, strict=True)]
    q_state, k_state, v_state = _by_heads(states, inputs)
    q, k, v, *after = get_op("qkv_prepare")(
        *inputs, *weights, *biases,
        qk_norm=qk_norm, q_state=q_state, k_state=k_state, v_state=v_state, output_final_state=keep, cu_seqlens=cu_seqlens, backend=backend,
    )  # fmt: skip
    assert q is not None
    assert k is not None
    assert v is not None
    return q, k, v, tuple(state.flatten(1, 2) for state in after if state is not None) if keep else None


def convolve(
    inputs: tuple[Tensor, Tensor, Tensor],
    convs: tuple[Convolution, Convolution, Convolution],
    states: States | None,
    cu_seqlens: Tensor | None,
    keep: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, States | None]:
    """The same one by one, each with its own activation and no norm."""
    outputs, after = [], []
    for x, conv, state in zip(inputs, convs, _by_heads(states, inputs), strict=True):
        bias = None if conv.bias is None else _by_head(conv.bias, x)
        y, final = get_op("short_conv")(
            x, _by_head(conv.weight, x), bias,
            activation="silu" if activated(conv) else "none", initial_state=state, output_final_state=keep, cu_seqlens=cu_seqlens, backend=backend,
        )  # fmt: skip
        assert y is not None
        outputs.append(y)
        if final is not None:
            after.append(final.flatten(1, 2))
    q, k, v = outputs
    return q, k, v, tuple(after) if keep else None


def _by_head(parameter: Tensor, x: Tensor) -> Tensor:
    """A convolution's weight `[D, 1, 4]` as `[heads, D, 4]`, its bias `[D]` as `[heads, D]`, in a dtype that the op takes beside x."""
    fitting = parameter if parameter.dtype in (x.dtype, torch.float32) else parameter.to(x.dtype)
    return fitting.view(*x.shape[2:], *fitting.shape[2:])


def _by_heads(states: States | None, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor | None, ...]:
    """The states `[N, D, 4]` as `[N, heads, D, 4]` in float32, float64 with such inputs."""
    if states is None:
        return None, None, None
    wide = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    return tuple(state.to(wide).unflatten(1, x.shape[2:]) for state, x in zip(states, inputs, strict=True))
