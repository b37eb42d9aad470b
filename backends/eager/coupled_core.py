"""coupled_core: both states as one pair on the chunk grid, with one transform and one Q K^T for both (SPEC.md 5).

The backward computes the pairs at the chunks' starts again. A packed call's cu_seqlens is read on the host.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.coupled_core import COUPLING_BASE, COUPLING_SLOPE, CoupledCore
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .causal import product, row_sum, scores, scores_backward
from .chunk_grid import ChunkGrid, Slab, compute_dtype
from .coupled_states import Mixing, Pair, PairGradients, Seen, advance, retreat
from .delta_rule import RuleInputs, RuleSlab
from .packing import refuse_packed_graph
from .recurrence import OperandGradients, Operands
from .scratch import HeadRange, by_heads, chunk_bytes, head_ranges, refuse_huge_chunk, slab_budget
from .triangular import DEPENDS_ON_PLACE, INVERSES

__all__ = ["backward_candidates", "candidates", "run", "run_backward", "supports"]

_INPUTS = (
    "q", "k", "v", "beta", "psi", "coupling", "fast_decay", "slow_decay", "fast_gate", "slow_gate", "alpha", "initial_state", "initial_fast_state",
)  # fmt: skip
_AXES = (2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1)
_STATES = frozenset({"initial_state", "initial_fast_state"})


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Everything but chunks above 4096 tokens, and packed calls in a captured graph."""
    return refuse_huge_chunk(signature) & refuse_packed_graph(signature)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One loop; with the exact transform either inverse."""
    inverses = INVERSES if signature.option("transform") == "exact" else INVERSES[:1]
    return [Candidate("eager", "coupled", (("inverse", inverse),), batch_invariant=inverse not in DEPENDS_ON_PLACE) for inverse in inverses]


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """As forward, from recomputed states."""
    return [replace(candidate, direction="backward") for candidate in candidates(signature, machine)]


_Loaded = tuple[RuleSlab, Operands, Mixing]


class _Coupled:
    """A call on its chunk grid."""

    def __init__(self, call: CoupledCore, inverse: str) -> None:
        self.call, v = call, call.v
        self.heads, self.dtype, self.device = v.shape[2], compute_dtype(v), v.device
        self.widths = (call.k.shape[3], v.shape[3])
        self.grid = ChunkGrid(v.shape[0], v.shape[1], call.chunk_size, cu_seqlens=call.cu_seqlens, device=v.device)
        self.inputs = RuleInputs(call.q, call.k, v, call.beta, None, None, call.scale, call.qk_l2norm, call.transform, inverse, call.delta)
        self.alpha = call.alpha.expand(v.shape[:3]) if isinstance(call.alpha, Tensor) else None

    def pair(self, fast: Tensor | None, slow: Tensor | None) -> Tensor:
        """Both states, or their gradients, side by side in the grid's order."""
        return torch.cat([self.grid.states(given, self.call.v, self.heads, self.widths) for given in (fast, slow)], -1)

    def single(self, pair: Tensor) -> tuple[Tensor, Tensor]:
        """(fast, slow) in the call's order."""
        fast, slow = (part.contiguous() for part in pair.chunk(2, -1))
        return self.grid.in_call_order(fast), self.grid.in_call_order(slow)

    def slabs(self, *, backward: bool = False) -> list[Slab]:
        keys, values = self.widths
        size = chunk_bytes(self.heads, self.grid.chunk, keys, 2 * values, self.dtype, states=8 if backward else 0)
        return list(self.grid.slabs(size, slab_budget(self.device, backward=backward)))

    def gather(self, slab: Slab, x: Tensor | None) -> Tensor | None:
        return None if x is None else self.grid.gather(slab, x, self.heads, self.dtype)

    def per_chunk(self, slab: Slab, x: Tensor | None) -> Tensor | None:
        """`[B, M, H]` as `[n, H]`."""
        return None if x is None else self.grid.gather_per_chunk(slab, x, self.dtype)

    def numbers(self, slab: Slab) -> tuple[Tensor, Tensor]:
        """psi and the coupling, `[n, H]`."""
        psi, given = self.per_chunk(slab, self.call.psi), self.per_chunk(slab, self.call.coupling)
        assert psi is not None
        return psi, COUPLING_BASE + COUPLING_SLOPE * psi if given is None else given

    def mixing(self, slab: Slab) -> Mixing:
        psi, coupling = self.numbers(slab)
        fast, slow = self.per_chunk(slab, self.call.fast_decay), self.per_chunk(slab, self.call.slow_decay)
        decay = None
        if fast is not None or slow is not None:
            one = torch.ones_like(psi)
            decay = torch.stack([one if part is None else part for part in (fast, slow)], -1)[:, :, None, :, None]
        return Mixing((coupling * psi)[..., None, None], (coupling * (1 - psi))[..., None, None], decay)

    def shares(self, slab: Slab) -> tuple[tuple[Tensor | None, Tensor | None], Tensor | float, list[Tensor | float]]:
        """The gates, alpha, and each core's factor in o."""
        fast, slow = self.gather(slab, self.call.fast_gate), self.gather(slab, self.call.slow_gate)
        if self.alpha is None:
            assert not isinstance(self.call.alpha, Tensor)
            alpha: Tensor | float = self.call.alpha
        else:
            alpha = self.grid.gather(slab, self.alpha, self.heads, self.dtype)
        return (fast, slow), alpha, [share if gate is None else gate * share for gate, share in ((fast, alpha), (slow, 1 - alpha))]

    def forward(self) -> tuple[Tensor | None, ...]:
        call, v = self.call, self.call.v
        o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        pair = Pair.of(self.pair(call.initial_fast_state, call.initial_state))
        for slab in self.slabs():
            x = self.inputs.load(self.grid, slab).operands()
            update, held = advance(pair, slab, x, self.mixing(slab), outputs=True)
            assert held is not None
            held.flatten(0, 1).baddbmm_(scores(x.q, x.k, None).flatten(0, 1), update.flatten(0, 1))
            fast, slow = held.chunk(2, -1)
            _, _, (by_fast, by_slow) = self.shares(slab)
            self.grid.scatter(slab, (fast * by_fast).add_(slow * by_slow), o)
        if not call.output_final_state:
            return o, None, None
        last_fast, last_slow = self.single(pair.value())
        return o, last_slow, last_fast

    def load(self, slab: Slab) -> _Loaded:
        rule = self.inputs.load(self.grid, slab)
        return rule, rule.operands(), self.mixing(slab)

    def starts(self, slabs: list[Slab]) -> tuple[Tensor, _Loaded | None]:
        """The pair at every chunk's start, `[chunks, H, K, 2V]`, and the last slab as it was loaded, which the reverse sweep begins with."""
        pair = Pair.of(self.pair(self.call.initial_fast_state, self.call.initial_state))
        starts = torch.empty(self.grid.chunks, *pair.states.shape[1:], dtype=self.dtype, device=self.device)
        loaded: _Loaded | None = None
        for slab in slabs:
            loaded = self.load(slab)
            advance(pair, slab, loaded[1], loaded[2], outputs=False, starts=starts[slab.first : slab.last])
        return starts, loaded

    def backward(self, grads: tuple[Tensor | None, ...], needs: frozenset[str]) -> dict[str, Tensor]:
        call, slabs = self.call, self.slabs(backward=True)
        starts, loaded = self.starts(slabs)
        d_pair = self.pair(grads[2], grads[1])
        out = {name: self._target(name) for name in needs - _STATES}
        for slab in reversed(slabs):
            self._backward_slab(slab, loaded or self.load(slab), d_pair, starts[slab.first : slab.last], grads[0], needs, out)
            loaded = None
        if "alpha" in out and isinstance(call.alpha, Tensor):
            out["alpha"] = (out["alpha"].sum_to_size(call.alpha.shape) if call.alpha.dim() else out["alpha"].sum()).to(call.alpha.dtype)
        if needs & _STATES:
            for name, grad in zip(("initial_fast_state", "initial_state"), self.single(d_pair), strict=True):
                if name in needs:
                    out[name] = grad.to(getattr(call, name).dtype)
        return out

    def _target(self, name: str) -> Tensor:
        if name == "alpha":
            return torch.empty(self.call.v.shape[:3], dtype=self.dtype, device=self.device)
        return torch.empty_like(getattr(self.call, name), memory_format=torch.contiguous_format)

    def _backward_slab(
        self,
        slab: Slab,
        loaded: _Loaded,
        d_pair: Tensor,
        starts: Tensor,
        d_o: Tensor | None,
        needs: frozenset[str],
        out: dict[str, Tensor],
    ) -> None:
        rule, x, mixing = loaded
        seen = Seen.of(starts, x, mixing)
        m = scores(x.q, x.k, None)
        do = self.gather(slab, d_o)
        gates, alpha, shares = self.shares(slab)
        dy = torch.zeros_like(seen.update) if do is None else torch.cat([do * share for share in shares], -1)
        if needs & {"fast_gate", "slow_gate", "alpha"}:
            y = product(x.q, seen.read)
            y.flatten(0, 1).baddbmm_(m.flatten(0, 1), seen.update.flatten(0, 1))
            self._gate_gradients(slab, do, gates, alpha, y, out)
        d = retreat(d_pair, slab, x, seen, mixing, product(m.mT, dy), product(x.q.mT, dy))
        self._chunk_gradients(slab, d, out)
        if needs & {"q", "k", "v", "beta"}:
            self._input_gradients(slab, rule, x, seen, m, d, dy, needs, out)

    def _gate_gradients(
        self,
        slab: Slab,
        do: Tensor | None,
        gates: tuple[Tensor | None, Tensor | None],
        alpha: Tensor | float,
        y: Tensor,
        out: dict[str, Tensor],
    ) -> None:
        """dgates and dalpha from both Y."""
        by_fast, by_slow = (torch.zeros_like(part[..., :1]) if do is None else row_sum(do, part) for part in y.chunk(2, -1))
        if "fast_gate" in out:
            self.grid.scatter(slab, by_fast * alpha, out["fast_gate"])
        if "slow_gate" in out:
            self.grid.scatter(slab, by_slow * (1 - alpha), out["slow_gate"])
        if "alpha" in out:
            fast, slow = (part if gate is None else part * gate for part, gate in zip((by_fast, by_slow), gates, strict=True))
            self.grid.scatter(slab, fast - slow, out["alpha"])

    def _chunk_gradients(self, slab: Slab, d: PairGradients, out: dict[str, Tensor]) -> None:
        """dpsi, dcoupling and both ddecays."""
        psi, coupling = self.numbers(slab)
        d_coupling = psi * d.to_fast + (1 - psi) * d.to_slow
        d_psi = coupling * (d.to_fast - d.to_slow)
        found = {"psi": d_psi if self.call.coupling is not None else d_psi + COUPLING_SLOPE * d_coupling, "coupling": d_coupling}
        if d.decay is not None:
            found["fast_decay"], found["slow_decay"] = d.decay[:, :, 0, :, 0].unbind(-1)
        for name, grad in found.items():
            if name in out:
                self.grid.scatter_per_chunk(slab, grad, out[name])

    def _input_gradients(
        self,
        slab: Slab,
        rule: RuleSlab,
        x: Operands,
        seen: Seen,
        m: Tensor,
        d: PairGradients,
        dy: Tensor,
        needs: frozenset[str],
        out: dict[str, Tensor],
    ) -> None:
        """dq, dk, dv, dbeta: a product over 2V columns adds up the two cores."""
        inner = scores_backward(x.q, x.k, m, None, product(dy, seen.update.mT), needs)
        operands = OperandGradients(u=torch.add(*d.update.chunk(2, -1)))
        if inner.q is not None:
            operands.q = inner.q.add_(product(dy, seen.read.mT))
        if inner.k is not None:
            operands.k = inner.k.add_(product(seen.update, d.written.mT))
        if x.w is not None and needs & {"k", "beta"}:
            operands.w = product(d.update, seen.read.mT).neg_()
        found = rule.gradients(x, operands, needs)
        for name, grad in (("q", found.q), ("k", found.k), ("v", found.v), ("beta", found.beta)):
            if name in out and grad is not None:
                self.grid.scatter(slab, grad, out[name])


def _ranges(call: CoupledCore) -> list[HeadRange]:
    return head_ranges(call.v.shape[2], call.q.shape[2], min(call.chunk_size, call.v.shape[1]), compute_dtype(call.v))


def run(call: CoupledCore, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o and both final states."""
    ranges = _ranges(call)
    if len(ranges) > 1:
        return by_heads(call, ranges, lambda part, _: run(part, candidate), (2, 1, 1))
    return _Coupled(call, str(candidate.param("inverse"))).forward()


def run_backward(
    call: CoupledCore, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of the tensor arguments in the order of the op's signature."""
    ranges = _ranges(call)
    if len(ranges) > 1:

        def part(narrowed: CoupledCore, heads: HeadRange) -> tuple[Tensor | None, ...]:
            return run_backward(narrowed, (heads.of(grads[0], 2), heads.of(grads[1], 1), heads.of(grads[2], 1)), None, needs, candidate)

        return by_heads(call, ranges, part, _AXES)
    given = frozenset(name for name in needs if isinstance(getattr(call, name), Tensor))
    found = _Coupled(call, str(candidate.param("inverse"))).backward(grads, given)
    return tuple(found.get(name) for name in _INPUTS)
