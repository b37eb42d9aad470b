"""How a dual-core layer computes, from parameters that whoever inherits it holds: projections, memory, merge, norm and output.

Reads its parts by name at every call, so that one that was replaced, wrapped or sharded meanwhile is seen. Has no parameters of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from titans_backends.nn import memory
from titans_backends.nn.flux import token_flux
from titans_backends.nn.forced import Forced
from titans_backends.nn.forms import Form
from titans_backends.nn.joint import Standing, joint_projection
from titans_backends.nn.levels import with_levels
from titans_backends.nn.memory import Memory, States
from titans_backends.nn.merge import flux_merge
from titans_backends.nn.sequences import original_chunk_size, original_groups, original_length, pad_tokens
from titans_backends.nn.short_conv import by_head
from titans_backends.nn.streaming import DualCoreCache

__all__ = ["LEVELS", "Mixing", "stand_together"]

_GATE = ("g_proj",)
_QKV = ("q_proj", "k_proj", "v_proj")
_BY_HEAD = _GATE + _QKV
_PER_HEAD = ("b_proj", "fast_gate_proj", "slow_gate_proj")
_DECAYS = ("slow_decay_proj", "fast_decay_proj")
LEVELS = ("level_eta_proj", "level_gate_proj")
_RUNS = {"flat": memory.flat, "dual": memory.dual, "loop": memory.loop, "recurrent": memory.recurrent}
_GATE_LATER = 16384
"""Tokens from which on the output gate's product waits for the memory, in inference: it would hold a third of the layer's memory meanwhile."""


class Mixing(nn.Module):
    """What `TitansDualCore` and a swapped original layer have in common. `ops`: where they come from."""

    form: Form
    num_heads: int
    ops: Forced = Forced()
    resonance_flux: nn.Module
    o_norm: nn.Module
    o_proj: nn.Module
    merge: nn.Module | None
    _standing: Standing

    def _in_chunks(self, x: Tensor, cu_seqlens: Tensor | None, return_states: bool, cache: DualCoreCache | None) -> tuple[Tensor, States | None]:
        """By the form's chunk rule."""
        size = self.form.chunk_size
        if self.form.chunking == "regular" or (cu_seqlens is not None and len(cu_seqlens) < 2):
            return self._mix(x, size, cu_seqlens, return_states, cache)
        if cu_seqlens is None:
            length = original_length(x.shape[1])
            y, states = self._mix(pad_tokens(x, length), original_chunk_size(length, size), None, return_states)
            return y if length == x.shape[1] else y[:, : x.shape[1]], states
        y, order, found = torch.zeros_like(x), [], []
        for group in original_groups(cu_seqlens, size, x.shape[1], x.device):
            part, states = self._mix(group.gather(x), group.chunk_size, group.cu_seqlens, return_states)
            y = y.to(part.dtype).index_copy(1, group.source, part[:, group.place])
            order += group.members
            found += [] if states is None else [states]
        if not found:
            return y, None
        place = torch.tensor(order, device=x.device).argsort()
        fast, slow = (torch.cat(group_states)[place] for group_states in zip(*found, strict=True))
        return y, (fast, slow)

    def _mix(
        self, x: Tensor, chunk_size: int, cu_seqlens: Tensor | None, return_states: bool, cache: DualCoreCache | None = None
    ) -> tuple[Tensor, States | None]:
        """Projections, memory, merge, norm and output on one grid of chunks."""
        gate_later = x.shape[0] * x.shape[1] >= _GATE_LATER and not torch.is_grad_enabled()
        joint = self._projections(x, self._names(return_states, not gate_later))
        o, states = self._remembered(joint, chunk_size, cu_seqlens, return_states, cache)
        if gate_later:
            joint = self._projections(x, _GATE)
        y: Tensor = self.o_proj(self._normed(o, joint["g_proj"]).flatten(2))
        return y, states

    def _normed(self, o: Tensor, gate: Tensor) -> Tensor:
        """The gated norm, `[B, T, H, V]`."""
        return cast(Tensor, self.o_norm(o, gate))

    def _names(self, return_states: bool, gate: bool) -> tuple[str, ...]:
        """The projections that a call needs, neighbours in their storage."""
        decays = _DECAYS if self.form.mode == "loop" else _DECAYS[: self.form.mode != "flat" or return_states]
        return (*(_GATE if gate else ()), *_QKV, *_PER_HEAD, *decays, *(LEVELS if self.form.levels else ()))

    def _projections(self, x: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        """x's projections without their biases by name, views of one product: a head's width apart, `[B, T, H, K]`, the wide ones; `b_proj` has the gates behind it."""
        modules = [cast(nn.Linear, self._modules[name]) for name in names]
        for name, module in zip(names, modules, strict=True):
            bias = getattr(module, "bias", None)
            if bias is not None and not isinstance(bias, Tensor):
                raise TypeError(
                    f"{type(self).__name__}: {name} is a {type(module).__module__}.{type(module).__qualname__}, whose bias is no tensor but a "
                    f"{type(bias).__name__}; leave the layer's projections as they are (of a quantization: exclude them), or undo() the swap"
                )
            if name not in _DECAYS and bias is not None:
                raise ValueError(
                    f"{type(self).__name__}: {name} has a bias, which the layer does not have and its one product leaves out; give it bias=False"
                )
        product = joint_projection(x, modules, self._standing)
        batch, tokens, padding = product.shape
        widths = {name: module.out_features for name, module in zip(names, modules, strict=True) if name not in _PER_HEAD[1:]}
        if "b_proj" in widths:
            widths["b_proj"] *= len(_PER_HEAD)
        sizes = list(widths.values())
        padding -= sum(sizes)
        found = dict(zip(widths, torch.split_with_sizes(product, [*sizes, padding] if padding else sizes, -1), strict=False))
        for name in _BY_HEAD:
            if name in found:
                found[name] = found[name].view(batch, tokens, self.num_heads, widths[name] // self.num_heads)
        return found

    def _remembered(
        self, joint: dict[str, Tensor], chunk_size: int, cu_seqlens: Tensor | None, return_states: bool, cache: DualCoreCache | None
    ) -> tuple[Tensor, States | None]:
        """The merged cores' o `[B, T, H, V]` by the form's mode, and its states. Takes out of `joint` what only the memory needs."""
        held = self._memory(joint, chunk_size, cu_seqlens, cache)
        alpha = self._alpha(held)
        o, states = _RUNS[self.form.mode](self.form, self.resonance_flux, held, alpha, return_states)
        if self.form.levels:
            eta, gate = (joint.pop(name).sigmoid() for name in LEVELS)
            o = with_levels(o, self.form.levels, held, eta, gate)
        if cache is not None:
            cache.store(**held.next)
            cache.advance(o.shape[1])
        return o, states

    def _memory(self, joint: dict[str, Tensor], chunk_size: int, cu_seqlens: Tensor | None, cache: DualCoreCache | None) -> Memory:
        """Everything that the memory ops take."""
        heads = self.num_heads
        q, k, v = joint.pop("q_proj"), joint.pop("k_proj"), joint.pop("v_proj")
        (q_weight, q_bias), (k_weight, k_bias), (v_weight, v_bias) = (
            by_head(cast(nn.Conv1d, cast(nn.Module, self._modules[name])._modules["conv"]), heads) for name in ("q_conv1d", "k_conv1d", "v_conv1d")
        )
        found = self.ops.op("qkv_prepare")(
            q, k, v, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias,
            lookahead=self.form.look_ahead, cu_seqlens=cu_seqlens, output_final_state=cache is not None,
            q_state=None if cache is None else cache.q, k_state=None if cache is None else cache.k, v_state=None if cache is None else cache.v,
        )  # fmt: skip
        q, k, v = (cast(Tensor, tensor) for tensor in found[:3])
        beta, fast_gate, slow_gate = joint.pop("b_proj").sigmoid().chunk(3, -1)
        slow_logit = self._decay_logit("slow", joint) if "slow_decay_proj" in joint else None
        fast_logit = self._decay_logit("fast", joint) if "fast_decay_proj" in joint else None
        after = {} if cache is None else {name: cast(Tensor, state) for name, state in zip("qkv", found[3:], strict=True)}
        return Memory(q, k, v, beta, fast_gate, slow_gate, slow_logit, fast_logit, chunk_size, cu_seqlens, cache, after, self.ops)

    def _decay_logit(self, core: str, joint: dict[str, Tensor]) -> Tensor:
        """`[B, T, H]`, with both of its biases."""
        bias, more = cast(nn.Linear, self._modules[f"{core}_decay_proj"]).bias, getattr(self, f"{core}_decay_bias")
        return joint.pop(f"{core}_decay_proj") + cast(Tensor, bias + more)

    def _alpha(self, x: Memory) -> Tensor | float:
        """The merge's weight of S_fast: a number, 0-d, `[H]` or `[B, T, H]`."""
        if self.form.merge == "flux":
            return flux_merge(token_flux(self.resonance_flux, x.k, x.v, x.beta, x.ops))
        return self.form.alpha if self.form.merge == "fixed" or self.merge is None else cast(Tensor, self.merge())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As every module's; afterwards the projections' weights stand together again."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        stand_together(self)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's weights stand together too."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        stand_together(self)


def stand_together(layer: Mixing, _: object = None) -> None:
    """The weights of all that projects x, side by side in memory, in the order in which `_names` has them."""
    names = (*_GATE, *_QKV, *_PER_HEAD, *_DECAYS, *LEVELS)
    modules = [layer._modules.get(name) for name in names]
    if all(isinstance(module, nn.Linear) for module in modules[: -len(LEVELS)]):
        layer._standing.move([module for module in modules if isinstance(module, nn.Linear)])
