"""What stands in for FLA where it is not installed: its layers' attributes, its cache and its dispatch, as far as our integration sees them.

The layers' own forwards raise: whoever still runs them is found out. FLA's real ones need a GPU.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable

import torch
from torch import Tensor, nn


class ShortConvolution(nn.Conv1d):
    """A depthwise convolution with an activation that its caller applies."""

    def __init__(self, channels: int, taps: int, bias: bool, activation: str | None) -> None:
        super().__init__(channels, channels, taps, padding=taps - 1, groups=channels, bias=bias)
        self.activation = activation

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        raise AssertionError("the original convolution ran")


class RMSNorm(nn.Module):
    """An RMS norm."""

    def __init__(self, width: int, eps: float, activation: str | None = None) -> None:
        super().__init__()
        self.eps, self.bias = eps, None
        self.weight = nn.Parameter(torch.ones(width))
        if activation is not None:
            self.activation = activation

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        raise AssertionError("the original norm ran")


class FusedRMSNormGated(RMSNorm):
    """The same, gated."""

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        raise AssertionError("the original norm ran")


def _original(self: nn.Module, *args: object, **kwargs: object) -> Tensor:
    raise AssertionError("the original layer ran")


class _Layer(nn.Module):
    def _around(self, hidden: int, keys: int, values: int, taps: int, bias: bool, qk: str | None, gate: str | None) -> None:
        """What both layers have: projections, convolutions, norm."""
        self.q_proj, self.k_proj = nn.Linear(hidden, keys, bias=False), nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, values, bias=False)
        if self.use_short_conv:
            self.q_conv1d, self.k_conv1d = ShortConvolution(keys, taps, bias, qk), ShortConvolution(keys, taps, bias, qk)
            self.v_conv1d = ShortConvolution(values, taps, bias, "silu")
        if self.use_gate:
            self.g_proj = nn.Linear(hidden, values, bias=False)
        self.o_norm = FusedRMSNormGated(self.head_v_dim, 1e-5, gate) if self.use_gate else RMSNorm(self.head_v_dim, 1e-5)
        self.o_proj = nn.Linear(values, hidden, bias=False)


class GatedDeltaNet(_Layer):
    """The gated layer's attributes."""

    forward = _original

    def __init__(
        self,
        hidden_size: int = 64,
        expand_v: float = 1,
        head_dim: int = 16,
        num_heads: int = 2,
        num_v_heads: int | None = None,
        use_gate: bool = True,
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        output_gate_activation: str = "swish",
    ) -> None:
        super().__init__()
        self.use_gate, self.use_short_conv, self.allow_neg_eigval, self.layer_idx = use_gate, use_short_conv, allow_neg_eigval, layer_idx
        self.head_k_dim, self.head_v_dim = head_dim, int(head_dim * expand_v)
        heads = num_v_heads or num_heads
        self._around(hidden_size, num_heads * head_dim, heads * self.head_v_dim, conv_size, conv_bias, "silu", output_gate_activation)
        self.a_proj, self.b_proj = nn.Linear(hidden_size, heads, bias=False), nn.Linear(hidden_size, heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(torch.randn(heads))


class DeltaNet(_Layer):
    """The ungated layer's attributes."""

    forward = _original

    def __init__(
        self,
        hidden_size: int = 64,
        num_heads: int = 4,
        use_beta: bool = True,
        use_gate: bool = False,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        allow_neg_eigval: bool = False,
        layer_idx: int | None = None,
        qk_activation: str = "silu",
        qk_norm: str = "l2",
    ) -> None:
        super().__init__()
        self.use_gate, self.use_short_conv, self.allow_neg_eigval, self.layer_idx = use_gate, use_short_conv, allow_neg_eigval, layer_idx
        self.use_beta, self.qk_activation, self.qk_norm = use_beta, qk_activation, qk_norm
        self.head_k_dim = self.head_v_dim = hidden_size // num_heads
        self._around(hidden_size, hidden_size, hidden_size, conv_size, conv_bias, "silu" if qk_activation == "silu" else None, "swish")
        if use_beta:
            self.b_proj = nn.Linear(hidden_size, num_heads, bias=False)


for forward in (ShortConvolution.forward, RMSNorm.forward, FusedRMSNormGated.forward, _original):
    forward.__module__ = "fla.somewhere"
GatedDeltaNet.__module__ = "fla.layers.gated_deltanet"
DeltaNet.__module__ = "fla.layers.delta_net"


class Cache:
    """A state dictionary for each layer."""

    def __init__(self) -> None:
        self.states: list[dict[str, object]] = []
        self.seen = 0

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: int) -> dict[str, object]:
        return self.states[index]

    def update(self, *, recurrent_state: object, conv_state: object, layer_idx: int, offset: int) -> None:
        while len(self.states) <= layer_idx:
            self.states.append({"recurrent_state": None, "conv_state": None})
        held = self.states[layer_idx]
        held["recurrent_state"] = held["recurrent_state"] if recurrent_state is None else recurrent_state
        held["conv_state"] = held["conv_state"] if conv_state is None else conv_state
        self.seen += offset


class BaseBackend:
    """A backend of FLA's dispatch: enabled, and asked by the name of a function."""

    priority = 5

    def is_enabled(self) -> bool:
        return True


class BackendRegistry:
    """The backends of an operation, asked in the order of their priority."""

    def __init__(self, name: str) -> None:
        self.operation_name = name
        self.backends: dict[str, BaseBackend] = {}
        self.reasons: list[str] = []

    def dispatch(self, default: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(default)
        def wrapper(*args: object, **kwargs: object) -> object:
            for backend in sorted(self.backends.values(), key=lambda one: one.priority):
                if not backend.is_enabled() or not hasattr(backend, default.__name__):
                    continue
                accepted, reason = getattr(backend, f"{default.__name__}_verifier")(*args, **kwargs)
                if accepted:
                    return getattr(backend, default.__name__)(*args, **kwargs)
                self.reasons.append(reason)
            return default(*args, **kwargs)

        return torch.compiler.disable(wrapper)


def modules(dispatched: bool = True, signature: inspect.Signature | None = None) -> dict[str, types.ModuleType]:
    """FLA's modules by name: one function asks its backends, the others do not; all return their own name. `signature`: what the first says that it takes."""
    gated = BackendRegistry("gated_delta_rule")

    def register(operation: str) -> Callable[[type], type]:
        def decorator(kind: type) -> type:
            made = kind()
            {"gated_delta_rule": gated}[operation].backends[made.backend_type] = made
            return kind

        return decorator

    def function(name: str) -> Callable[..., object]:
        def own(*args: object, **kwargs: object) -> object:
            return name

        own.__name__ = name
        return own

    made = {name: types.ModuleType(name) for name in ("fla", "fla.backends", "fla.ops", "fla.ops.gated_delta_rule", "fla.ops.delta_rule")}
    made["fla"].__version__ = "0.6.0"
    made["fla.backends"].__dict__.update(BaseBackend=BaseBackend, BackendRegistry=BackendRegistry, register=register, gated=gated)
    chunk = function("chunk_gated_delta_rule")
    if signature is not None:
        chunk.__signature__ = signature  # type: ignore[attr-defined]  # what inspect asks for first
    made["fla.ops.gated_delta_rule"].__dict__.update(
        chunk_gated_delta_rule=torch.compiler.disable(gated.dispatch(chunk) if dispatched else chunk),
        fused_recurrent_gated_delta_rule=function("fused_recurrent_gated_delta_rule"),
    )
    made["fla.ops.delta_rule"].__dict__.update(
        chunk_delta_rule=function("chunk_delta_rule"), fused_recurrent_delta_rule=function("fused_recurrent_delta_rule")
    )
    return made
