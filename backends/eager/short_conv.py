"""short_conv: a shifted product for each tap, and what the state adds to a sequence's first tokens (the contract has the formula).

Where packed sequences begin and end stays on the device: nothing here waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.short_conv import TAPS, ShortConv
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import ACCEPTED, Verdict, refused

from .chunk_grid import compute_dtype

__all__ = ["backward_candidates", "candidates", "convolved", "convolved_backward", "run", "run_backward", "supports"]

_INPUTS = ("x", "weight", "bias", "initial_state")


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Everything but packed calls in a captured graph."""
    if signature.launch == "graph" and signature.packed:
        return refused("a packed call copies cu_seqlens to the device where it lies on the host, which a captured graph cannot")
    return ACCEPTED


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return [Candidate("eager", "taps")]


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return [Candidate("eager", "taps", direction="backward")]


class _Rows:
    """The sequences of a call: which shifted tokens they may read, their first tokens, and their last four inputs."""

    def __init__(self, call: ShortConv) -> None:
        self.tokens, self.ends = call.x.shape[1], None
        if call.cu_seqlens is None:
            return
        self.ends = ends = call.cu_seqlens.to(device=call.x.device, dtype=torch.int64)
        self.place = torch.arange(self.tokens, device=call.x.device)
        row = torch.searchsorted(ends[1:].contiguous(), self.place, right=True)
        self.begin, self.stop = ends[row], ends[row + 1]

    def spans(self, shift: int) -> tuple[slice, slice]:
        """The tokens t for which t + shift is a token of the call, and those t + shift."""
        first, stop = max(0, -shift), max(0, -shift, self.tokens - max(0, shift))
        return slice(first, stop), slice(first + shift, stop + shift)

    def inside(self, x: Tensor, shift: int) -> Tensor:
        """`x`, whose tokens are the first of `spans`, with zeros where t + shift lies in another sequence."""
        if self.ends is None or shift == 0:
            return x
        at, read = self.spans(shift)
        place = self.place[read]
        return x.masked_fill(((place < self.begin[at]) | (place >= self.stop[at]))[:, None, None], 0)

    def _nth(self, n: int) -> tuple[Tensor, Tensor]:
        """Where token n of each sequence lies, and `[N, 1, 1]` which of them are too short to have one."""
        assert self.ends is not None
        place = self.ends[:-1] + n
        return place.clamp(max=max(self.tokens - 1, 0)), (place >= self.ends[1:])[:, None, None]

    def nth(self, x: Tensor, n: int) -> Tensor | None:
        """Token n of each sequence, `[N, H, V]`, zeros where it has none; None where none has."""
        if n >= self.tokens:
            return None
        if self.ends is None:
            return x[:, n]
        place, missing = self._nth(n)
        return x[0].index_select(0, place).masked_fill(missing, 0)

    def add_nth(self, x: Tensor, n: int, change: Tensor) -> None:
        """Adds `[N, H, V]` to token n of each sequence that has one, in place."""
        if n >= self.tokens:
            return
        if self.ends is None:
            x[:, n] += change
            return
        place, missing = self._nth(n)
        x[0].index_add_(0, place, change.masked_fill(missing, 0))

    def _last(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the four last inputs of each packed sequence: their tokens `[N, 4]`, which are tokens of it, and the others' places in its state."""
        assert self.ends is not None
        step = torch.arange(TAPS, device=self.ends.device)
        token, length = self.ends[1:, None] - TAPS + step, self.ends.diff()[:, None]
        return token.clamp(0, max(self.tokens - 1, 0)), token >= self.ends[:-1, None], (length + step).clamp(max=TAPS - 1)

    def last(self, x: Tensor, before: Tensor) -> Tensor:
        """The last four inputs of each sequence, `[N, H, V, 4]`, where `before` holds the four before its first token."""
        if self.ends is None:
            kept = min(TAPS, self.tokens)
            return torch.cat([before[..., kept:], x[:, self.tokens - kept :].movedim(1, -1)], -1)
        if not self.tokens:
            return before.clone()
        token, mine, older = self._last()
        found = x[0].index_select(0, token.flatten()).unflatten(0, token.shape).movedim(1, -1)
        return torch.where(mine[:, None, None], found, before.gather(-1, older[:, None, None].expand_as(before)))

    def last_backward(self, grad: Tensor, dx: Tensor, d_before: Tensor) -> None:
        """Adds the gradient of `last` to those of its arguments, in place."""
        if self.ends is None:
            kept = min(TAPS, self.tokens)
            dx[:, self.tokens - kept :] += grad[..., TAPS - kept :].movedim(-1, 1)
            d_before[..., kept:] += grad[..., : TAPS - kept]
            return
        if not self.tokens:
            d_before += grad
            return
        token, mine, older = self._last()
        arrived = grad.masked_fill(~mine[:, None, None], 0).movedim(-1, 1).flatten(0, 1)
        dx[0].index_add_(0, token.flatten(), arrived)
        d_before.scatter_add_(-1, older[:, None, None].expand_as(grad), grad.masked_fill(mine[:, None, None], 0))


class _Conv:
    """A call in the arithmetic's dtype. Tap j of token t reads token t + shifts[j]."""

    def __init__(self, call: ShortConv) -> None:
        self.call, self.dtype, self.rows = call, compute_dtype(call.x), _Rows(call)
        self.x, self.weight = call.x.to(self.dtype), call.weight.to(self.dtype)
        self.state = None if call.initial_state is None else call.initial_state.to(self.dtype)
        self.shifts = tuple(j - (TAPS - 1 - call.lookahead) for j in range(TAPS))

    def sums(self) -> Tensor:
        """z, before the activation."""
        z = torch.zeros_like(self.x, memory_format=torch.contiguous_format)
        if self.call.bias is not None:
            z += self.call.bias.to(self.dtype)
        for j, shift in enumerate(self.shifts):
            at, read = self.rows.spans(shift)
            z[:, at].addcmul_(self.rows.inside(self.x[:, read], shift), self.weight[..., j])
        if self.state is not None:
            for n in range(TAPS - 1):  # token n reads n + 1 inputs of its own, the first taps the state
                self.rows.add_nth(z, n, (self.weight[..., : TAPS - 1 - n] * self.state[..., n + 1 :]).sum(-1))
        return z

    def before(self) -> Tensor:
        """The state that the call starts from, zeros without one."""
        if self.state is not None:
            return self.state
        sequences = self.x.shape[0] if self.rows.ends is None else self.rows.ends.shape[0] - 1
        return self.x.new_zeros(sequences, *self.x.shape[2:], TAPS)

    def d_sums(self, d_y: Tensor) -> Tensor:
        """dz."""
        if self.call.activation == "none":
            return d_y.to(self.dtype)
        z = self.sums()
        open_ = torch.sigmoid(z)
        return d_y.to(self.dtype) * open_ * (1 + z * (1 - open_))

    def d_weight(self, dz: Tensor) -> Tensor:
        """The gradient of weight."""
        spans = [(shift, *self.rows.spans(shift)) for shift in self.shifts]
        found = torch.stack([(dz[:, at] * self.rows.inside(self.x[:, read], shift)).sum((0, 1)) for shift, at, read in spans], -1)
        if self.state is not None:
            for n in range(TAPS - 1):
                first = self.rows.nth(dz, n)
                if first is not None:
                    found[..., : TAPS - 1 - n] += (first[..., None] * self.state[..., n + 1 :]).sum(0)
        return found

    def d_x(self, dz: Tensor) -> Tensor:
        """What reaches x through y."""
        found = torch.zeros_like(self.x, memory_format=torch.contiguous_format)
        for j, shift in enumerate(self.shifts):
            at, read = self.rows.spans(shift)
            found[:, read].addcmul_(self.rows.inside(dz[:, at], shift), self.weight[..., j])
        return found

    def d_before(self, dz: Tensor) -> Tensor:
        """What reaches the initial state through y."""
        found = torch.zeros_like(self.before(), memory_format=torch.contiguous_format)
        for n in range(TAPS - 1):
            first = self.rows.nth(dz, n)
            if first is not None:
                found[..., n + 1 :].addcmul_(first[..., None], self.weight[..., : TAPS - 1 - n])
        return found


def run(call: ShortConv, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """y in x's dtype, and the last four inputs."""
    y, final = convolved(call)
    return y.to(call.x.dtype), final


def convolved(call: ShortConv) -> tuple[Tensor, Tensor | None]:
    """y in the arithmetic's dtype, and the last four inputs where they are asked for."""
    conv = _Conv(call)
    z = conv.sums()
    y = z if call.activation == "none" else torch.nn.functional.silu(z, inplace=True)
    return y, conv.rows.last(conv.x, conv.before()).contiguous() if call.output_final_state else None


def run_backward(
    call: ShortConv, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and initial_state, in that order."""
    return convolved_backward(call, grads[0], grads[1], needs)


def convolved_backward(call: ShortConv, d_y: Tensor | None, d_final: Tensor | None, needs: frozenset[str]) -> tuple[Tensor | None, ...]:
    """The same from the gradients of `convolved`, each in any dtype."""
    conv = _Conv(call)
    dz = torch.zeros_like(conv.x) if d_y is None else conv.d_sums(d_y)
    found: dict[str, Tensor] = {}
    if "weight" in needs:
        found["weight"] = conv.d_weight(dz)
    if "bias" in needs:
        found["bias"] = dz.sum((0, 1))
    if needs & {"x", "initial_state"}:
        found["x"], found["initial_state"] = conv.d_x(dz), conv.d_before(dz)
        if d_final is not None:
            conv.rows.last_backward(d_final.to(conv.dtype), found["x"], found["initial_state"])
    return tuple(_like(getattr(call, name), found[name]) if name in needs else None for name in _INPUTS)


def _like(x: Tensor, grad: Tensor) -> Tensor:
    return grad.to(x.dtype).contiguous()
