"""FLA's layers, as benchmarks/fla_check.py compares them: values and gradients, and decoding through FLA's cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from fla.layers import DeltaNet, GatedDeltaNet
from fla.models.cache_utils import Cache
from fla_found import Found, error
from torch import Tensor, nn

import titans_backends as tb
from titans_backends.integrations.fla import register_with_fla

__all__ = ["decode", "layers", "layers_of"]

LIMITS = {torch.float32: 2e-3, torch.bfloat16: 2e-2}


def layers_of(found: Found) -> Iterator[tuple[str, nn.Module]]:
    """A name and a layer with random weights, on the CPU."""
    torch.manual_seed(1)
    hidden, dim = (1024, 128) if found.gpu else (64, 16)
    heads = hidden // dim
    yield "GatedDeltaNet", GatedDeltaNet(hidden_size=hidden, head_dim=dim, num_heads=heads // 2, num_v_heads=heads, expand_v=1, layer_idx=0)
    wide = {"head_dim": dim // 2, "expand_v": 2, "allow_neg_eigval": True, "conv_bias": True}
    yield "GatedDeltaNet neg D64", GatedDeltaNet(hidden_size=hidden, num_heads=heads, layer_idx=0, **wide)
    yield "DeltaNet", DeltaNet(hidden_size=hidden, num_heads=heads, layer_idx=0)
    gated = {"use_gate": True, "qk_activation": "elu", "qk_norm": "sum"}
    yield "DeltaNet gate elu sum", DeltaNet(hidden_size=hidden, num_heads=heads * 2, layer_idx=0, **gated)


@dataclass(frozen=True, slots=True)
class Step:
    """A training step: output, gradient of the input, gradients of the parameters in one vector."""

    y: Tensor
    dx: Tensor
    dw: Tensor

    def errors(self, truth: Step) -> dict[str, float]:
        """How far each is off."""
        return {name: error(getattr(self, name), getattr(truth, name)) for name in ("y", "dx", "dw")}


def step(layer: nn.Module, x: Tensor, weight: Tensor) -> Step:
    """Forward, and backward of the weighted sum."""
    x = x.clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    y = layer(x)[0]
    (y * weight).sum().backward()
    assert x.grad is not None
    return Step(y.detach(), x.grad, torch.cat([p.grad.flatten().double() for p in layer.parameters() if p.grad is not None]))


@dataclass(frozen=True, slots=True)
class Problem:
    """One layer in one dtype, with its float64 step."""

    name: str
    dtype: torch.dtype
    layer: nn.Module
    x: Tensor
    weight: Tensor
    truth: Step

    @property
    def label(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}"

    def registered(self, found: Found) -> None:
        """FLA's gated layer with its call on our ops; for the ungated rule FLA asks nobody."""
        with register_with_fla() as registration:
            errors = step(self.layer, self.x, self.weight).errors(self.truth)
        calls = sum(registration.calls.values())
        right = all(e < LIMITS[self.dtype] for e in errors.values()) and calls == 1
        found.say(right, f"{self.label} registered", **errors, calls=calls, refusals=len(registration.refusals))

    def swapped(self, found: Found, backend: str | None, own: Tensor | None) -> None:
        """The layer on our ops; `own` is FLA's forward."""
        with tb.accelerate(self.layer, backend=backend):
            ours = step(self.layer, self.x, self.weight)
        errors = ours.errors(self.truth) | ({} if own is None else {"y_vs_fla": error(ours.y, own)})
        found.say(all(e < LIMITS[self.dtype] for e in errors.values()), f"{self.label} accelerated backend={backend}", **errors)

    def forward(self) -> Tensor:
        """FLA's own, in inference."""
        with torch.no_grad():
            return self.layer.eval()(self.x)[0]  # type: ignore[no-any-return]

    def _theirs(self, found: Found, what: str, function: Callable[[], object]) -> Any:
        """FLA's own. Where FLA refuses (float32 without a decay, its gated backward on Hopper with some versions of Triton, a CPU) that is no fault of ours."""
        try:
            return function()
        except Exception as failed:
            return found.say(None, f"{self.label}: FLA's own {what} raises", error=f"{type(failed).__name__}: {str(failed)[:160]}")

    def examine(self, found: Found) -> None:
        """Both ways, on each backend."""
        own = self._theirs(found, "forward", self.forward) if found.gpu else None
        self.layer.train()
        theirs = self._theirs(found, "training step", lambda: step(self.layer, self.x, self.weight))
        if isinstance(theirs, Step):
            found.say(None, f"{self.label}: FLA's own training step", **theirs.errors(self.truth))
        if found.gpu and self.name.startswith("Gated"):
            found.attempt(f"{self.label} registered", self.registered, found)
        for backend in (None, "triton", "cupy", "eager") if found.gpu else (None, "eager"):
            found.attempt(f"{self.label} accelerated backend={backend}", self.swapped, found, backend, own)


def layers(found: Found) -> None:
    """Every layer in float32 and bfloat16 against its float64 self."""
    for name, made in layers_of(found):
        dtypes = [dtype for dtype in LIMITS if found.wants(f"{name} {str(dtype).removeprefix('torch.')}")]
        if not dtypes:
            continue
        layer = made.to(found.device)
        x = torch.randn(2, 1024 if found.gpu else 96, layer.hidden_size, device=found.device) * 0.5
        weight = torch.randn_like(x)
        exact = copy.deepcopy(layer).double()
        with tb.accelerate(exact, backend="eager"):  # float64, which the tests compare with the written formula
            truth = step(exact, x.double(), weight.double())
        for dtype in dtypes:
            if found.left < 30:
                return found.say(None, f"{name}: no time")
            Problem(name, dtype, copy.deepcopy(layer).to(dtype), x.to(dtype), weight.to(dtype), truth).examine(found)
    return None


def continued(first: nn.Module, second: nn.Module, x: Tensor, prompt: int, mask: Tensor | None) -> Tensor:
    """A prompt by one layer and single tokens by another, through one cache of FLA's."""
    cache, outputs = Cache(), []
    with torch.no_grad():
        for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, x.shape[1]))]:
            layer = second if start else first
            given = None if mask is None else mask[:, :stop]
            outputs.append(layer(x[:, start:stop], attention_mask=given, past_key_values=cache, use_cache=True)[0])
    return torch.cat(outputs, 1)


def decode(found: Found) -> None:
    """On us against one call; on a GPU also against FLA's layer, and the cache from one to the other."""
    prompt, steps = (300, 24) if found.gpu else (30, 6)
    dtype, limit = (torch.bfloat16, 2e-2) if found.gpu else (torch.float32, 1e-4)
    for name, made in layers_of(found):
        if not found.wants(name):
            continue
        theirs = made.to(found.device, dtype).eval()
        ours = copy.deepcopy(theirs)
        tb.accelerate(ours)
        x = torch.randn(3, prompt + steps, theirs.hidden_size, device=found.device, dtype=dtype)
        padded = torch.ones(3, prompt + steps, dtype=torch.long, device=found.device)
        padded[1, :17] = 0
        padded[2, :5] = 0
        for where, mask in (("dense", None), ("left-padded", padded)):
            with torch.no_grad():
                whole = ours(x, attention_mask=mask)[0]
            stepped = continued(ours, ours, x, prompt, mask)
            e = error(stepped, whole)
            found.say(e < limit, f"{name} decode on us, {where}, against one call", o=e)
            own = found.attempt(f"{name} decode by FLA, {where}", continued, theirs, theirs, x, prompt, mask) if found.gpu else None
            if isinstance(own, Tensor):
                ways = (
                    ("decode on us against FLA's", ours, ours),
                    ("FLA's prompt, our tokens", theirs, ours),
                    ("our prompt, FLA's tokens", ours, theirs),
                )
                for what, first, second in ways:
                    e = error(stepped if first is second else continued(first, second, x, prompt, mask), own)
                    found.say(e < limit, f"{name} {what}, {where}", o=e)
        if found.left < 20:
            return found.say(None, f"decode: no time after {name}")
    return None
